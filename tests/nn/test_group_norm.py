"""Group norms of the autoencoders: exact in float32, in one pass for shorter formats."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax.nn.autoencoder import norm
from varjax.nn.compute import ConvFormat, Precision


class Norm(nn.Module):
    dtype: str
    precision: Precision = "highest"

    @nn.compact
    def __call__(self, x_BhwC):
        return norm(2, ConvFormat(self.dtype, self.precision), "norm")(x_BhwC)


@pytest.mark.parametrize(
    ("dtype", "mean", "atol"), [("float32", 300, 3e-4), ("bfloat16", 10, 0.02)]
)
def test_group_norm_is_accurate_despite_a_large_mean(dtype, mean, atol):
    noise_BhwC = np.random.default_rng(0).normal(size=(2, 16, 16, 8))
    x_BhwC = jnp.asarray(mean + noise_BhwC, dtype)
    y_BhwC, _ = Norm(dtype).init_with_output(jax.random.key(0), x_BhwC)
    x_BhwGc = np.asarray(x_BhwC, np.float64).reshape(2, 16, 16, 2, 4)
    mean_BG = x_BhwGc.mean(axis=(1, 2, 4), keepdims=True)
    expected = (x_BhwGc - mean_BG) / x_BhwGc.std(axis=(1, 2, 4), keepdims=True)
    np.testing.assert_allclose(
        np.asarray(y_BhwC, np.float64), expected.reshape(y_BhwC.shape), atol=atol
    )


@pytest.mark.parametrize(
    ("dtype", "precision", "one_pass"),
    [
        ("float32", "highest", False),
        ("float32", "tf32_3x", False),
        ("float32", "bfloat16_3x", True),
        ("bfloat16", "highest", True),
    ],
)
def test_only_exact_norms_subtract_the_mean_before_squaring(dtype, precision, one_pass):
    module, x_BhwC = Norm(dtype, precision), jnp.ones((2, 4, 4, 8), dtype)
    params = module.init(jax.random.key(0), x_BhwC)
    names = [eqn.primitive.name for eqn in jax.make_jaxpr(module.apply)(params, x_BhwC).eqns]
    centered = names.index("sub") > len(names) - names[::-1].index("reduce_sum")
    assert names.count("reduce_sum") == 2 and centered == one_pass
