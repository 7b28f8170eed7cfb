"""Teacher forcing: targets and inputs from images, or from tokens that were cached."""

import jax
import jax.numpy as jnp

from varjax.nn.autoencoder import to_model_range, to_unit_range
from varjax.nn.compute import EXACT, ComputeConfig
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer
from varjax.training.task import Batch
from varjax.trees import PyTree


def targets_and_inputs(
    config: VQConfig, frozen: PyTree, batch: Batch, compute: ComputeConfig = EXACT
) -> tuple[jax.Array, jax.Array]:
    """Computes what the transformer predicts, and what it reads to predict it.

    Args:
        config: config of the tokenizer.
        frozen: parameters of the tokenizer.
        batch: batch with "tokens_BL" or else "image_BHWC".
        compute: execution settings: `encoder_precision`, and the platform to compile for.

    Returns:
        Targets (B, L) int32, and inputs (B, l, Z): what the coarser scales add up to, for all
        scales but the first.
    """
    tokenizer = VQTokenizer(config, compute).bind({"params": frozen})
    if "tokens_BL" in batch:
        return batch["tokens_BL"], tokenizer.teacher_forcing_input(batch["tokens_BL"])
    return tokenizer.encode_for_teacher_forcing(to_model_range(batch["image_BHWC"]))


def reconstructions(
    config: VQConfig, frozen: PyTree, batch: Batch, compute: ComputeConfig = EXACT
) -> jax.Array:
    """Reconstructs the first 8 images of a batch from their tokens, for a preview.

    Returns:
        (rows, 8, H, W, channels) in [0, 1]; above the reconstructions stand the images themselves,
        where the batch has them.
    """
    tokenizer = VQTokenizer(config, compute).bind({"params": frozen})
    if "tokens_BL" in batch:
        rows = [tokenizer.decode(batch["tokens_BL"][:8])]
    else:
        x_BHWC = to_model_range(batch["image_BHWC"][:8])
        rows = [x_BHWC, tokenizer.decode(tokenizer.encode(x_BHWC))]
    return to_unit_range(jnp.stack(rows))
