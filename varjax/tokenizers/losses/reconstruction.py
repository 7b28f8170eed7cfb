"""How far reconstructions are from their images, image by image."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from varjax.core.trees import PyTree
from varjax.tokenizers.losses.lpips import lpips


def reconstruction_losses(
    x_BHWC: jax.Array,
    y_BHWC: jax.Array,
    weights: Mapping[str, float],
    lpips_params: PyTree = None,
    dtype=jnp.float32,
) -> dict[str, jax.Array]:
    """Of images and reconstructions in [-1, 1]: "l1", "l2", "psnr" in dB, "perceptual" where there
    are parameters for it (computed in `dtype`), and the weighted sum "loss"; each (B,)."""
    losses = {
        "l1": jnp.mean(jnp.abs(y_BHWC - x_BHWC), axis=(1, 2, 3)),
        "l2": jnp.mean(jnp.square(y_BHWC - x_BHWC), axis=(1, 2, 3)),
    }
    if lpips_params is not None:
        losses["perceptual"] = lpips(lpips_params, x_BHWC, y_BHWC, dtype)
    weighted = [weight * losses[name] for name, weight in weights.items()]
    losses["loss"] = jnp.sum(jnp.stack(weighted), axis=0)
    # Each image's own: what published figures average. Values span 2, from -1 to 1.
    losses["psnr"] = 10 * jnp.log10(4 / jnp.maximum(losses["l2"], 1e-12))
    return losses
