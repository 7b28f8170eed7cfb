"""Measures of reconstructions that papers report, image by image: PSNR, SSIM, sharpness."""

import jax
import jax.numpy as jnp
import numpy as np

from varjax.errors import InputError

SSIM_WINDOW = 11  # pixels a side
SSIM_SIGMA = 1.5
SSIM_C1, SSIM_C2 = 0.01**2, 0.03**2  # for values that span 1


def psnr(a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
    """Computes peak signal-to-noise ratios (B,) of images in [0, 1], in dB, at most 120."""
    l2_B = jnp.mean(jnp.square(a_BHWC - b_BHWC), axis=(1, 2, 3))
    return -10 * jnp.log10(jnp.maximum(l2_B, 1e-12))


def ssim(a_BHWC: jax.Array, b_BHWC: jax.Array) -> jax.Array:
    """Computes structural similarities (B,) of images in [0, 1] (Wang et al. 2004).

    Uses a Gaussian window of 11 by 11 pixels (σ 1.5) at every position where it fits, and averages
    the channels. Equals scikit-image's `structural_similarity(gaussian_weights=True,
    use_sample_covariance=False)`.

    Raises:
        InputError: images smaller than the window.
    """
    H, W = a_BHWC.shape[1:3]
    if min(H, W) < SSIM_WINDOW:
        raise InputError(
            f"SSIM needs images of {SSIM_WINDOW} by {SSIM_WINDOW} pixels or more, not {H}×{W}"
        )
    rows, columns = _window(H), _window(W)

    def blur(x_BHWC):
        x_BhWC = jnp.einsum("hH,BHWC->BhWC", rows, x_BHWC, precision="highest")
        return jnp.einsum("wW,BhWC->BhwC", columns, x_BhWC, precision="highest")

    mean_a, mean_b = blur(a_BHWC), blur(b_BHWC)
    variance_a = blur(jnp.square(a_BHWC)) - jnp.square(mean_a)
    variance_b = blur(jnp.square(b_BHWC)) - jnp.square(mean_b)
    covariance = blur(a_BHWC * b_BHWC) - mean_a * mean_b
    brightness = (2 * mean_a * mean_b + SSIM_C1) / (
        jnp.square(mean_a) + jnp.square(mean_b) + SSIM_C1
    )
    structure = (2 * covariance + SSIM_C2) / (variance_a + variance_b + SSIM_C2)
    return jnp.mean(brightness * structure, axis=(1, 2, 3))


def mean_gradient(x_BHWC: jax.Array) -> jax.Array:
    """Computes the mean length (B,) of each gray image's gradient, per pixel: low where blurred.

    Gray is the mean of the channels; the gradient is the differences to the right and down.
    """
    x_BHW = jnp.mean(x_BHWC, axis=-1)
    down_BHW = x_BHW[:, 1:, :-1] - x_BHW[:, :-1, :-1]
    right_BHW = x_BHW[:, :-1, 1:] - x_BHW[:, :-1, :-1]
    return jnp.mean(jnp.hypot(down_BHW, right_BHW), axis=(1, 2))


def _window(size: int) -> np.ndarray:
    """Returns (size - 10, size): in each row, the window at another position."""
    weights = np.exp(-np.square(np.arange(SSIM_WINDOW) - SSIM_WINDOW // 2) / (2 * SSIM_SIGMA**2))
    matrix = np.zeros((size - SSIM_WINDOW + 1, size))
    for i in range(len(matrix)):
        matrix[i, i : i + SSIM_WINDOW] = weights / weights.sum()
    return matrix.astype(np.float32)
