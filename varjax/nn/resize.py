"""Resizing of maps: a constant (out, in) matrix per axis, two einsums.

As PyTorch does it: `area` is adaptive average pooling (not TensorFlow's area resize, which differs
where sizes do not divide); `bicubic` and `bilinear` are half-pixel-centered, without antialiasing,
edges clamped. `antialiased_bilinear` is what PIL does, `bilinear_tf1` is what TensorFlow 1 did, for
networks that were trained with them.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def area_matrix(size: int, out: int) -> np.ndarray:
    """Makes the (out, size) matrix of adaptive average pooling.

    Row i averages inputs ⌊i·size/out⌋ … ⌈(i+1)·size/out⌉-1.
    """
    matrix = np.zeros((out, size), np.float32)
    for i in range(out):
        start, stop = i * size // out, -(-(i + 1) * size // out)
        matrix[i, start:stop] = 1 / (stop - start)
    return matrix


@functools.cache
def bicubic_matrix(size: int, out: int) -> np.ndarray:
    """Makes the (out, size) matrix of Keys' cubic convolution (1981) with a = -0.75."""
    a = -0.75

    def near(t):
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t):
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    start, t = _sample_points(size, out)
    weights = np.stack([far(t + 1), near(t), near(1 - t), far(2 - t)], axis=1)
    return _gather_matrix(size, start - 1, weights)


@functools.cache
def bilinear_matrix(size: int, out: int) -> np.ndarray:
    """Makes the (out, size) matrix that interpolates linearly between the two nearest inputs."""
    start, t = _sample_points(size, out, clamp=True)
    return _gather_matrix(size, start, np.stack([1 - t, t], axis=1))


@functools.cache
def antialiased_bilinear_matrix(size: int, out: int) -> np.ndarray:
    """Makes the (out, size) matrix of PIL's bilinear resize, whose kernel is wider to shrink."""
    center = (np.arange(out) + 0.5) * size / out
    distance = np.abs(np.arange(size) + 0.5 - center[:, None]) / max(size / out, 1)
    weights = np.maximum(1 - distance, 0)
    return (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)


@functools.cache
def bilinear_tf1_matrix(size: int, out: int) -> np.ndarray:
    """Makes the (out, size) matrix of TensorFlow 1's bilinear resize.

    Output i is at input i·size/out: the corners' centers do not matter, and the last rows repeat.
    """
    position = np.arange(out, dtype=np.float32) * np.float32(size / out)  # rounded as there
    start = np.floor(position).astype(int)
    return _gather_matrix(size, start, np.stack([1 - (position - start), position - start], axis=1))


def area(x_BhwC: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Area-averages (B, h, w, C) down to (B, *shape, C)."""
    return _resize(area_matrix, x_BhwC, shape)


def bicubic(x_BhwC: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Bicubically resizes (B, h, w, C) to (B, *shape, C)."""
    return _resize(bicubic_matrix, x_BhwC, shape)


def bilinear(x_BhwC: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Bilinearly resizes (B, h, w, C) to (B, *shape, C)."""
    return _resize(bilinear_matrix, x_BhwC, shape)


def antialiased_bilinear(x_BhwC: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Bilinearly resizes (B, h, w, C) to (B, *shape, C) with antialiasing."""
    return _resize(antialiased_bilinear_matrix, x_BhwC, shape)


def bilinear_tf1(x_BhwC: jax.Array, shape: tuple[int, int]) -> jax.Array:
    """Bilinearly resizes (B, h, w, C) to (B, *shape, C) as TensorFlow 1 does."""
    return _resize(bilinear_tf1_matrix, x_BhwC, shape)


def _resize(matrix, x_BhwC, shape):
    h, w = x_BhwC.shape[1:3]
    if (h, w) == tuple(shape):
        return x_BhwC
    rows, columns = matrix(h, shape[0]), matrix(w, shape[1])
    # Tokens hang on these values: full precision also where the default is TF32 or bfloat16.
    x_BHwC = jnp.einsum("Hh,BhwC->BHwC", rows, x_BhwC, precision="highest")
    return jnp.einsum("Ww,BHwC->BHWC", columns, x_BHwC, precision="highest")


def _sample_points(size, out, clamp=False):
    """For every output its left neighbor and the distance from it, in input pixels."""
    position = (np.arange(out) + 0.5) * size / out - 0.5
    if clamp:
        position = np.maximum(position, 0)
    start = np.floor(position).astype(int)
    return start, position - start


def _gather_matrix(size, start, weights):
    """Puts weights[i, j] at column start[i] + j, adding up what falls over the clamped edges."""
    matrix = np.zeros((len(start), size), np.float64)
    for j in range(weights.shape[1]):
        columns = np.clip(start + j, 0, size - 1)
        np.add.at(matrix, (np.arange(len(start)), columns), weights[:, j])
    return matrix.astype(np.float32)
