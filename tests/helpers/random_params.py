"""Draws parameters for tests that need neither a training run nor an initialization."""

from collections.abc import Callable

import jax
import numpy as np

from varjax import trees
from varjax.trees import PyTree


def random_params(init: Callable[[jax.Array], PyTree], std: float = 0.1) -> PyTree:
    """Draws nonzero parameters with NumPy, so that no program is compiled.

    Args:
        init: function of a random key that returns parameters; only their shapes matter.
        std: standard deviation; the mean of scales and of "latent_std" is 1, of all others 0.
    """
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        mean = path.endswith(("scale", "latent_std"))
        return rng.normal(mean, std, leaf.shape).astype(np.float32)

    return trees.map_with_path(fill, jax.eval_shape(init, jax.random.key(0)))
