"""A digest of what JAX draws: it changes with flags, and may change with versions.

jax_draws()["random_numbers"]
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.runtime.reproducibility import arrays_digest

JAX_FLAGS = "jax_default_prng_impl", "jax_threefry_partitionable"


def jax_draws() -> dict[str, Any]:
    """Returns how JAX draws: a digest of some numbers, its version, and the flags that matter."""
    flags = {name: getattr(jax.config, name) for name in JAX_FLAGS}
    return {"version": jax.__version__, **flags, "random_numbers": _jax_digest(*flags.values())}


@functools.cache
def _jax_digest(implementation: str, partitionable: bool) -> str:
    """Digest under the current flags, which are `partitionable` too, for the cache."""
    drawn = jax.device_get(jax.jit(lambda: _draws(implementation))())
    # Other devices round the normal distribution differently, but none of these near a half.
    drawn["normal"] = np.rint(drawn["normal"] * 8).astype(np.int32)
    return arrays_digest(*(drawn[name] for name in sorted(drawn)))


def _draws(implementation: str) -> dict[str, jax.Array]:
    seed = jax.random.key(3, impl=implementation)
    key, other = jax.random.split(seed)
    return {
        "bits": jax.random.bits(jax.random.fold_in(other, 5), (32,), jnp.uint32),
        "keys": jax.random.key_data(jax.random.split(key, 3)),
        "normal": jax.random.normal(seed, (32,), jnp.float32),
        "order": jax.random.permutation(other, 32),
        "uniform": jax.random.uniform(key, (32,), jnp.float32),
    }
