"""Teacher forcing: targets and inputs from images, or from tokens that were cached."""

import jax
import jax.numpy as jnp

from varjax.nn.autoencoder import to_model_range, to_unit_range
from varjax.nn.compute import EXACT, ComputeConfig
from varjax.tokenizers.vq.model import VQConfig, bound_quantizer, quantize_images
from varjax.training.previews import PREVIEW_IMAGES
from varjax.training.task import Batch
from varjax.trees import PyTree


def targets_and_inputs(
    config: VQConfig, frozen: PyTree, batch: Batch, compute: ComputeConfig = EXACT
) -> tuple[jax.Array, jax.Array]:
    """Computes the transformer's targets and inputs.

    Args:
        config: config of the tokenizer.
        frozen: parameters of the tokenizer.
        batch: batch with "tokens_BL" or else "image_BHWC".
        compute: execution settings: `encoder_precision`, and the platform to compile for.

    Returns:
        Targets (B, L) int32, and inputs (B, l, Z): what the coarser scales add up to, for all
        scales but the first.
    """
    quantizer = bound_quantizer(config, frozen)
    if "tokens_BL" in batch:
        tokens_BL = batch["tokens_BL"]
        f_hats = quantizer.accumulated_scales(tokens_BL)
    else:
        x_BHWC = to_model_range(batch["image_BHWC"])
        quantized = quantize_images(config, frozen, x_BHWC, compute)
        tokens_BL, f_hats = quantized.tokens_BL, quantized.f_hats
    return tokens_BL, quantizer.teacher_forcing_input(f_hats)


def reconstructions(
    config: VQConfig, frozen: PyTree, batch: Batch, compute: ComputeConfig = EXACT
) -> jax.Array:
    """Reconstructs the first 8 images of a batch from their tokens, for a preview.

    Returns:
        (rows, 8, H, W, channels) in [0, 1]: the images, if the batch has them, then their
        reconstructions.
    """
    if "tokens_BL" in batch:
        latents, rows = {"tokens_BL": batch["tokens_BL"][:PREVIEW_IMAGES]}, []
    else:
        images_BHWC = batch["image_BHWC"][:PREVIEW_IMAGES]
        latents = config.encode(frozen, images_BHWC, compute)
        rows = [to_unit_range(to_model_range(images_BHWC))]
    return jnp.stack([*rows, config.decode(frozen, latents, compute)])
