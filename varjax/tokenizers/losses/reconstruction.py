"""The reconstruction losses of a tokenizer, image by image: pixels and LPIPS."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from varjax.tokenizers.losses.lpips import lpips
from varjax.trees import PyTree


def reconstruction_losses(
    x_BHWC: jax.Array,
    y_BHWC: jax.Array,
    weights: Mapping[str, float],
    lpips_params: PyTree = None,
    dtype: Any = jnp.float32,
) -> dict[str, jax.Array]:
    """Computes how far reconstructions are from their images.

    Args:
        x_BHWC: images in [-1, 1].
        y_BHWC: their reconstructions, not clipped.
        weights: weight of each loss in the sum, by name.
        lpips_params: parameters of LPIPS, from `load_lpips`; None to skip LPIPS.
        dtype: number format of LPIPS.

    Returns:
        (B,) float32 each: "l1", "l2", "perceptual" where there are parameters for it, their
        weighted sum "loss", and "psnr" in dB.
    """
    losses = {
        "l1": jnp.mean(jnp.abs(y_BHWC - x_BHWC), axis=(1, 2, 3)),
        "l2": jnp.mean(jnp.square(y_BHWC - x_BHWC), axis=(1, 2, 3)),
    }
    if lpips_params is not None:
        losses["perceptual"] = lpips(lpips_params, x_BHWC, y_BHWC, dtype)
    weighted = [weight * losses[name] for name, weight in weights.items()]
    losses["loss"] = jnp.sum(jnp.stack(weighted), axis=0)
    # Published figures average each image's own PSNR. Values span 2, from -1 to 1.
    losses["psnr"] = 10 * jnp.log10(4 / jnp.maximum(losses["l2"], 1e-12))
    return losses
