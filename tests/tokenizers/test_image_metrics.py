"""PSNR, SSIM and mean gradient of images, against independent computations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from varjax.tokenizers import image_metrics

RNG = np.random.default_rng(0)
A_BHWC = RNG.random((3, 17, 23, 3), np.float32)
B_BHWC = np.clip(A_BHWC + np.float32([0.02, 0.1, 0.5])[:, None, None, None] * RNG.normal(
    size=A_BHWC.shape).astype(np.float32), 0, 1)  # fmt: skip


def skimage_ssim(a_HW, b_HW):
    """Computes SSIM as scikit-image does, with SciPy's filter and without a 5-pixel border."""

    def blur(x):
        return ndimage.gaussian_filter(x, 1.5, truncate=3.5)

    a, b = a_HW.astype(np.float64), b_HW.astype(np.float64)
    ux, uy = blur(a), blur(b)
    vx, vy, vxy = blur(a * a) - ux * ux, blur(b * b) - uy * uy, blur(a * b) - ux * uy
    c1, c2 = 0.01**2, 0.03**2
    s = (2 * ux * uy + c1) * (2 * vxy + c2) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))
    return s[5:-5, 5:-5].mean()


def test_ssim_matches_scikit_image():
    expected = [
        np.mean([skimage_ssim(a[..., c], b[..., c]) for c in range(3)])
        for a, b in zip(A_BHWC, B_BHWC, strict=True)
    ]
    found = jax.jit(image_metrics.ssim)(A_BHWC, B_BHWC)
    np.testing.assert_allclose(found, expected, atol=2e-5)
    np.testing.assert_allclose(image_metrics.ssim(A_BHWC, A_BHWC), 1, atol=1e-5)
    with pytest.raises(ValueError, match="11 by 11 pixels or more, not 8×23"):
        image_metrics.ssim(jnp.zeros((1, 8, 23, 1)), jnp.zeros((1, 8, 23, 1)))


def test_psnr_and_mean_gradient_match_known_values():
    half = jnp.full((1, 2, 2, 1), 0.5)
    np.testing.assert_allclose(image_metrics.psnr(half, half - 0.1), 20, rtol=1e-5)
    ramp_BHWC = (3 * jnp.arange(5.0)[:, None] + 4 * jnp.arange(6.0)[None])[None, ..., None]
    np.testing.assert_allclose(image_metrics.mean_gradient(ramp_BHWC), 5, rtol=1e-6)
    blurred = jnp.asarray(ndimage.gaussian_filter(A_BHWC, (0, 1, 1, 0)))
    assert (
        image_metrics.mean_gradient(blurred)
        < 0.7 * image_metrics.mean_gradient(jnp.asarray(A_BHWC))
    ).all()
