"""Top-k and top-p filters of logits, exact and without a sort."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


@jax.named_scope("filters")  # its name in profiles and in `varjax benchmark tpu`
def filter_top_k_top_p(
    logits_BlV: jax.Array, top_k: int | jax.Array, top_p: float | jax.Array
) -> jax.Array:
    """Sets logits outside of the top-k, and then outside of the top-p, to -inf.

    Equal logits stay or go together.

    Args:
        logits_BlV: one row per token.
        top_k: number of codes to keep, plus any that equal the last of them; 0 for all.
        top_p: drops the least likely codes that together hold at most 1-p; the best always stays
            (nucleus sampling, Holtzman et al. 2020); 0 for all.
    """
    V, top_p = logits_BlV.shape[-1], jnp.asarray(top_p, jnp.float32)
    top_k = jnp.where((top_k == 0) | (top_k > V), V, top_k)
    order_BlV = _ordered(logits_BlV)
    kth_Bl1 = _largest(order_BlV, lambda t_Bl1: _sum(order_BlV >= t_Bl1) >= top_k)
    logits_BlV = jnp.where(order_BlV >= kth_Bl1, logits_BlV, -jnp.inf)

    probability_BlV, rest = jax.nn.softmax(logits_BlV), jnp.where(top_p > 0, 1 - top_p, -1.0)
    below = lambda t_Bl1: _sum(jnp.where(order_BlV < t_Bl1, probability_BlV, 0))  # noqa: E731
    pth_Bl1 = _largest(order_BlV, lambda t_Bl1: below(t_Bl1) <= rest)
    return jnp.where(order_BlV < pth_Bl1, -jnp.inf, logits_BlV)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 is 0.0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _largest(order_BlV: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest t (B, l, 1), at most a row's greatest value, for which `holds`, by two bits each.

    `holds` must, once false, stay so; where it is never true, t is 0. 16 passes over the numbers
    cost a fifth of a sort, and one pass with three sums less than two passes with one.
    """

    def add_bits(i, t_Bl1):
        step = jnp.uint32(1 << 30) >> (2 * i).astype(jnp.uint32)
        held_Bl1 = sum(holds(t_Bl1 + digit * step).astype(jnp.uint32) for digit in (1, 2, 3))
        return t_Bl1 + held_Bl1 * step

    greatest_Bl1 = jnp.max(order_BlV, axis=-1, keepdims=True)
    t_Bl1 = jax.lax.fori_loop(0, 16, add_bits, jnp.zeros_like(greatest_Bl1))
    return jnp.minimum(t_Bl1, greatest_Bl1)


def _sum(x_BlV):
    return jnp.sum(x_BlV, axis=-1, keepdims=True)
