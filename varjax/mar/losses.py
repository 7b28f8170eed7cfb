"""The losses of MAR's training: random masks, and the loss of each token that is masked."""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp

from varjax.mar.causal import causal_hidden
from varjax.mar.heads import DiffusionNoise
from varjax.mar.masking import draw_orders, take_at
from varjax.mar.model import MAR, Dropouts, MARConfig, bind_mar
from varjax.nn.attention import Dropout
from varjax.nn.compute import ComputeConfig
from varjax.nn.rng import ImageStream, stream_keys
from varjax.trees import PyTree

MASK_MEAN, MASK_STD = 1.0, 0.25  # normal distribution of the mask ratio, before truncation


def mask_ratio(key: jax.Array, min_mask_ratio: float) -> jax.Array:
    """Draws the fraction of tokens to mask: normal around 1, truncated to [min_mask_ratio, 1]."""
    lower = (min_mask_ratio - MASK_MEAN) / MASK_STD
    return MASK_MEAN + MASK_STD * jax.random.truncated_normal(key, lower, 0.0)


def known_count(length: int, ratio: jax.Array | float) -> jax.Array:
    """Returns how many of `length` tokens are known where a fraction `ratio` is masked."""
    return length - jnp.ceil(length * jnp.asarray(ratio)).astype(jnp.int32)


@flax.struct.dataclass
class LossDraws:
    """Holds all that is random in the loss of a batch.

    Attributes:
        order_BL: positions, in the order in which they become known.
        known_B: number of known tokens in each image.
        noise: noise of the diffusion loss; None with a categorical head.
        dropouts: dropout of the transformer, by name.
    """

    order_BL: jax.Array
    known_B: jax.Array
    noise: DiffusionNoise | None = None
    dropouts: Dropouts = dataclasses.field(default_factory=dict)

    @classmethod
    def from_keys(
        cls,
        config: MARConfig,
        key_B: jax.Array,
        known_B: jax.Array,
        repeats: int = 1,
        attention_dropout: float = 0.0,
        dropout: float = 0.0,
    ) -> "LossDraws":
        """Draws orders, noise and dropout, for each image from its key.

        Args:
            config: config of the transformer.
            key_B: one key per image.
            known_B: number of known tokens in each image.
            repeats: number U of noise levels for each token.
            attention_dropout: fraction of the attention weights to drop.
            dropout: fraction of the layers' results to drop.
        """
        streams = {
            "attention_dropout": (ImageStream.ATTENTION_DROPOUT, attention_dropout),
            "dropout": (ImageStream.DROPOUT, dropout),
        }
        return cls(
            order_BL=draw_orders(config, key_B),
            known_B=known_B,
            noise=config.head.training_noise(key_B, config.length, repeats),
            dropouts={
                name: Dropout(stream_keys(key_B, stream), rate)
                for name, (stream, rate) in streams.items()
                if rate
            },
        )


class MaskedTokenLosses(NamedTuple):
    """Holds the losses of all tokens of a batch.

    Attributes:
        masked_BL: True where a token is predicted: with causal attention, everywhere.
        loss_BLU: the loss to minimize, U draws per token; with a categorical head, U = 1.
        metrics_BLU: further metrics of the head, by name; see its `loss`.
    """

    masked_BL: jax.Array
    loss_BLU: jax.Array
    metrics_BLU: dict[str, jax.Array]

    def means_BL(self) -> dict[str, jax.Array]:
        """Averages over the draws of each token: "loss", and the metrics by name."""
        losses_BLU = {"loss": self.loss_BLU} | self.metrics_BLU
        return {name: jnp.mean(x_BLU, axis=-1) for name, x_BLU in losses_BLU.items()}


def token_losses(
    config: MARConfig,
    params: PyTree,
    token_BL: jax.Array,
    label_B: jax.Array,
    draws: LossDraws,
    max_known: int,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
) -> MaskedTokenLosses:
    """Computes the losses of all tokens of a batch.

    Args:
        config: config of the transformer.
        params: parameters of the transformer.
        token_BL: tokens by position, (B, L, Z) or (B, L).
        label_B: classes; `config.classes` means "no class".
        draws: random numbers of the batch.
        max_known: upper bound on the number of known tokens in an image.
        compute: dtype and execution of the transformer.
    """
    apply = bind_mar(config, params, compute)
    class_BC = apply(label_B, method=MAR.class_vectors)
    if config.causal:
        masked_BL = jnp.ones(token_BL.shape[:2], bool)
        z_BLC = apply(token_BL, draws.order_BL, class_BC, draws.dropouts, method=causal_hidden)
    else:
        rank_BL = jnp.argsort(draws.order_BL, axis=1)
        masked_BL = rank_BL >= draws.known_B[:, None]
        position_Bn = draws.order_BL[:, :max_known]
        known_Bn = jnp.arange(max_known)[None] < draws.known_B[:, None]
        token_Bn = take_at(token_BL, position_Bn)
        z_BLC = apply(token_Bn, position_Bn, known_Bn, class_BC, draws.dropouts, method=MAR.hidden)
    network = config.head.network(params, compute)
    return MaskedTokenLosses(masked_BL, *config.head.loss(network, z_BLC, token_BL, draws.noise))


def masked_mean(x_BL: jax.Array, masked_BL: jax.Array) -> jax.Array:
    """Averages over the masked tokens of each image, (B,), and then over images."""
    masked_BL = masked_BL.astype(jnp.float32)
    return jnp.mean(jnp.sum(x_BL * masked_BL, axis=1) / jnp.sum(masked_BL, axis=1))


def content_keys(batch: dict[str, jax.Array]) -> jax.Array:
    """Derives a key (B,) for each example from its values, independent of the batch size."""
    names = sorted(name for name in batch if name not in ("label_B", "valid_B"))
    checksum_B = jnp.uint32(0)
    for name in names:
        x = batch[name]
        if jnp.issubdtype(x.dtype, jnp.floating):
            x = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        flat_BN = x.reshape(len(x), -1).astype(jnp.uint32)
        weight_N = jnp.arange(flat_BN.shape[1], dtype=jnp.uint32) * 2 + 1
        checksum_B = checksum_B * jnp.uint32(31) + jnp.sum(flat_BN * weight_N[None], axis=1)
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), checksum_B)
