"""How often, and how evenly, the scales use their codes."""

from typing import Any

import jax
import jax.numpy as jnp

from varjax.tokenizers.vq.pyramid import Pyramid


def count_codes(
    pyramid: Pyramid, vocab: int, tokens_BL: jax.Array, weight_B: jax.Array
) -> jax.Array:
    """How often each scale uses each code, (K, V), where an image counts as much as its weight."""
    weight_Bl = weight_B.astype(jnp.float32)[:, None]
    return jnp.stack(
        [jnp.zeros(vocab).at[tokens_BL[:, scale]].add(weight_Bl) for scale in pyramid.slices]
    )


def perplexity(weight_KV: Any, xp: Any) -> Any:
    """e^entropy of each row: the number of codes in use, were they used equally. xp: np or jnp."""
    p_KV = weight_KV / xp.sum(weight_KV, axis=-1, keepdims=True)
    return xp.exp(-xp.sum(p_KV * xp.log(xp.maximum(p_KV, 1e-12)), axis=-1))
