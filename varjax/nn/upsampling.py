"""Nearest upsampling and a 3×3 convolution, computed on the small map, faster on a CPU.

Upsampling repeats each pixel, so the nine taps of the convolution fall on four pixels of the small
map. Which four, and which sums of taps each of them gets, depends on whether the row and the column
of the output are even or odd. For each of these four phases, the output is a 2×2 convolution of the
small map, with 4/9 of the products altogether (the sub-pixel convolution of arXiv 1609.05158).

docs/benchmarks.md has what a CPU gains. By the compiler's estimate, a TPU loses: 5.3 ms instead of
1.8 for the four layers of the official decoder and one image.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from varjax.nn.compute import matmul_precision

PHASES = (0, 0), (0, 1), (1, 0), (1, 1)  # row and column of the output, modulo 2


@jax.custom_jvp
def upsample_and_convolve(x_BhwC: jax.Array, kernel_33CN: jax.Array) -> jax.Array:
    """Doubles a map by nearest neighbor, and convolves it with zeros around: (B, 2·h, 2·w, N)."""
    _, h, w, _ = x_BhwC.shape
    N = kernel_33CN.shape[-1]
    kernel_22CM = jnp.concatenate(_phase_kernels(kernel_33CN), axis=-1)
    y_BhwM = _convolve(_pad(x_BhwC), kernel_22CM)  # all phases in one convolution
    return _interleave(
        [
            y_BhwM[:, row : row + h, column : column + w, n * N : (n + 1) * N]
            for n, (row, column) in enumerate(PHASES)
        ]
    )


def _convolve_by_phase(x_BhwC: jax.Array, kernel_33CN: jax.Array) -> jax.Array:
    """Computes the same with a convolution for each phase, whose gradients XLA computes faster."""
    _, h, w, _ = x_BhwC.shape
    x_BhwC, kernels = _pad(x_BhwC), _phase_kernels(kernel_33CN)
    return _interleave(
        [
            _convolve(x_BhwC[:, row : row + h + 1, column : column + w + 1], kernel_22CN)
            for (row, column), kernel_22CN in zip(PHASES, kernels, strict=True)
        ]
    )


@functools.partial(upsample_and_convolve.defjvp, symbolic_zeros=True)
def _jvp(primals, tangents):
    (x_BhwC, kernel_33CN), (dx_BhwC, dkernel_33CN) = primals, tangents
    # Linear in each argument. The backward pass keeps both arguments, not their padded slices.
    linear = jax.checkpoint(_convolve_by_phase, prevent_cse=False)
    parts = []
    if not isinstance(dx_BhwC, SymbolicZero):
        parts.append(linear(dx_BhwC, kernel_33CN))
    if not isinstance(dkernel_33CN, SymbolicZero):
        parts.append(linear(x_BhwC, dkernel_33CN))
    return upsample_and_convolve(x_BhwC, kernel_33CN), functools.reduce(jnp.add, parts)


def _phase_kernels(kernel_33CN: jax.Array) -> list[jax.Array]:
    """Sums the taps that fall on the same pixel: a kernel (2, 2, C, N) for each phase."""

    def fold(taps, axis):
        first, second, third = jnp.split(taps, 3, axis)
        even = jnp.concatenate([first, second + third], axis)
        return even, jnp.concatenate([first + second, third], axis)

    rows = fold(kernel_33CN.astype(jnp.float32), 0)  # sums of bfloat16 would be rounded twice
    return [kernel.astype(kernel_33CN.dtype) for row in rows for kernel in fold(row, 1)]


def _pad(x_BhwC: jax.Array) -> jax.Array:
    # Padding inside of the convolution would make the gradient of the kernel 10 to 30 times slower.
    return jnp.pad(x_BhwC, ((0, 0), (1, 1), (1, 1), (0, 0)))


def _convolve(x_BhwC: jax.Array, kernel_22CN: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x_BhwC,
        kernel_22CN,
        window_strides=(1, 1),
        padding="VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=matmul_precision(x_BhwC.dtype),
    )


def _interleave(phases: list[jax.Array]) -> jax.Array:
    """Puts maps (B, h, w, N), one for each phase, together: (B, 2·h, 2·w, N)."""
    B, h, w, N = phases[0].shape
    even_rows, odd_rows = jnp.stack(phases[:2], axis=3), jnp.stack(phases[2:], axis=3)
    return jnp.stack([even_rows, odd_rows], axis=2).reshape(B, 2 * h, 2 * w, N)
