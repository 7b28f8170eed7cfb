"""What a transformer is taught: the tokens of images, made by a tokenizer now or long ago."""

from typing import Any

import jax
import jax.numpy as jnp

from varjax.core import config_tree, trees
from varjax.core.trees import PyTree
from varjax.nn.autoencoder import to_model_range
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer
from varjax.training.task import Batch


def targets_and_inputs(
    config: VQConfig, frozen: PyTree, batch: Batch
) -> tuple[jax.Array, jax.Array]:
    """The "tokens_BL" of a batch, or of its "image_BHWC", and what the transformer reads (B, l, Z).

    It reads what the coarser scales add up to, to predict all scales but the first.
    """
    tokenizer = VQTokenizer(config).bind({"params": frozen})
    if "tokens_BL" in batch:
        return batch["tokens_BL"], tokenizer.teacher_input(batch["tokens_BL"])
    return tokenizer.encode_to_teach(to_model_range(batch["image_BHWC"]))


def tokens_of(config: VQConfig, frozen: PyTree, image_BHWC: jax.Array) -> jax.Array:
    """uint8 images -> (B, L)."""
    return VQTokenizer(config).bind({"params": frozen}).encode(to_model_range(image_BHWC))


def reconstructions(config: VQConfig, frozen: PyTree, batch: Batch) -> jax.Array:
    """What the tokens of the first 8 images keep, (rows, 8, H, W, C), in [0, 1].

    Above them the images themselves, where the batch has them.
    """
    tokenizer = VQTokenizer(config).bind({"params": frozen})
    if "tokens_BL" in batch:
        rows = [tokenizer.decode(batch["tokens_BL"][:8])]
    else:
        x_BHWC = to_model_range(batch["image_BHWC"][:8])
        rows = [x_BHWC, tokenizer.decode(tokenizer.encode(x_BHWC))]
    return (jnp.stack(rows) + 1) / 2


def identity(config: VQConfig, frozen: PyTree) -> dict[str, Any]:
    """What tells this tokenizer from any other, as flat JSON data."""
    return config_tree.to_dict(config) | {"weights": trees.digest(frozen)}
