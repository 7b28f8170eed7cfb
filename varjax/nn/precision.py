"""How exactly convolutions of float32 numbers multiply: in float32, or in shorter formats.

Accelerators multiply short formats several times faster. Three products of halves, which a format
of n bits splits a number into, are as exact as one of about 2 n bits.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp

Precision = Literal["highest", "bfloat16_3x", "tf32_3x", "tf32", "bfloat16"]
MANTISSA_BITS = {"bfloat16": 7, "tf32": 10}
# What a machine does by itself, by XLA's names; TPUs multiply bfloat16, NVIDIA's GPUs TF32.
NATIVE = {
    ("tpu", "bfloat16_3x"): "high",
    ("tpu", "bfloat16"): "default",
    ("gpu", "tf32"): "default",
}


@dataclasses.dataclass(frozen=True)
class ConvFormat:
    """How convolutions compute.

    Attributes:
        dtype: of what goes in and comes out.
        precision: of products, where `dtype` is float32; as `float32_convolution` takes it.
        platform: the same.
    """

    dtype: Any = jnp.float32
    precision: Precision = "highest"
    platform: str = "cpu"

    @property
    def convolution(self) -> Callable[..., jax.Array] | None:
        """What `nn.Conv` takes as its convolution; None for its own."""
        if jnp.dtype(self.dtype) != jnp.float32:
            return None
        return float32_convolution(self.precision, self.platform)


def float32_convolution(precision: Precision, platform: str) -> Callable[..., jax.Array]:
    """Returns `jax.lax.conv_general_dilated` of float32 numbers with products of a precision.

    Args:
        precision: "highest" is float32; "bfloat16" and "tf32" round both operands; with "_3x" three
            products of such numbers make one, all but the product of the rests.
        platform: "cpu", "gpu" or "tpu". Where the machine does not multiply like that by itself,
            operands are rounded first: the same numbers, but no faster.
    """

    def convolution(lhs: jax.Array, rhs: jax.Array, *args: Any, **options: Any) -> jax.Array:
        def product(a: jax.Array, b: jax.Array, by: str) -> jax.Array:
            return jax.lax.conv_general_dilated(a, b, *args, **(options | {"precision": by}))

        if precision == "highest":
            return product(lhs, rhs, "highest")
        if (platform, precision) in NATIVE:
            return product(lhs, rhs, NATIVE[platform, precision])
        short, three, _ = precision.partition("_3x")
        # Operands that are rounded already lose nothing in the machine's own short format.
        by = NATIVE.get((platform, short), "highest")
        lhs_high, rhs_high = (_rounded(x, short) for x in (lhs, rhs))
        y = product(lhs_high, rhs_high, by)
        if three:
            lhs_low, rhs_low = _rounded(lhs - lhs_high, short), _rounded(rhs - rhs_high, short)
            y = y + (product(lhs_low, rhs_high, by) + product(lhs_high, rhs_low, by))
        return y

    return convolution


def _rounded(x: jax.Array, short: str) -> jax.Array:
    """Rounds float32 numbers to a shorter format; they stay float32."""
    return jax.lax.reduce_precision(x, exponent_bits=8, mantissa_bits=MANTISSA_BITS[short])
