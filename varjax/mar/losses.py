"""The losses of MAR's training: random masks, and the loss of each token that is masked."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
import optax

from varjax.mar.causal import causal_hidden
from varjax.mar.model import DiffusionHead, MARConfig, bind_denoiser, bind_mar
from varjax.mar.sample import draw_orders
from varjax.nn.attention import Dropout
from varjax.nn.compute import ComputeConfig
from varjax.nn.diffusion import TRAINING_STEPS, diffusion_loss
from varjax.nn.rng import ImageStream, stream_keys
from varjax.trees import PyTree

MASK_MEAN, MASK_STD = 1.0, 0.25  # of the masked share, before it is truncated (MAR, section 3.3)


@flax.struct.dataclass
class LossDraws:
    """Holds all that is random in the loss of a batch.

    Attributes:
        order_BL: positions, in the order in which they become known.
        known_B: number of known tokens in each image.
        timestep_BLU: noise levels of each token, U draws of each; None with a categorical head.
        noise_BLUZ: normal noise at these levels; None with a categorical head.
        attention_dropout: dropout of the attention weights; None for none.
        dropout: dropout of the layers' results; None for none.
    """

    order_BL: jax.Array
    known_B: jax.Array
    timestep_BLU: jax.Array | None = None
    noise_BLUZ: jax.Array | None = None
    attention_dropout: Dropout | None = None
    dropout: Dropout | None = None


def mask_ratio(key: jax.Array, least: float) -> jax.Array:
    """Draws the share of tokens to mask: normal around 1, truncated to [least, 1]."""
    lowest = (least - MASK_MEAN) / MASK_STD
    return MASK_MEAN + MASK_STD * jax.random.truncated_normal(key, lowest, 0.0)


def known_count(length: int, share: jax.Array | float) -> jax.Array:
    """Returns how many of `length` tokens are known where a share of them is masked."""
    return length - jnp.ceil(length * jnp.asarray(share)).astype(jnp.int32)


def draw_losses(
    config: MARConfig,
    key_B: jax.Array,
    known_B: jax.Array,
    repeats: int = 1,
    attention_dropout: float = 0.0,
    dropout: float = 0.0,
) -> LossDraws:
    """Draws masks, noise and dropout, each image's by its own key.

    Args:
        config: config of the transformer.
        key_B: one key per image.
        known_B: number of known tokens in each image.
        repeats: number U of noise levels for each token.
        attention_dropout: fraction of the attention weights to drop.
        dropout: fraction of the layers' results to drop.
    """
    draws = LossDraws(
        draw_orders(config, key_B),
        known_B,
        attention_dropout=_dropout(
            stream_keys(key_B, ImageStream.ATTENTION_DROPOUT), attention_dropout
        ),
        dropout=_dropout(stream_keys(key_B, ImageStream.DROPOUT), dropout),
    )
    if not isinstance(config.head, DiffusionHead):
        return draws
    shape, Z = (config.length, repeats), config.head.token_shape[0]
    timesteps = jax.vmap(lambda key: jax.random.randint(key, shape, 0, TRAINING_STEPS))
    noise = jax.vmap(lambda key: jax.random.normal(key, (*shape, Z)))
    return dataclasses.replace(
        draws,
        timestep_BLU=timesteps(stream_keys(key_B, ImageStream.TIMESTEP)),
        noise_BLUZ=noise(stream_keys(key_B, ImageStream.DIFFUSION_NOISE)),
    )


def token_losses(
    config: MARConfig,
    params: PyTree,
    token_BL: jax.Array,
    label_B: jax.Array,
    draws: LossDraws,
    most_known: int,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
) -> dict[str, jax.Array]:
    """Computes the losses of all tokens of a batch.

    Args:
        config: config of the transformer.
        params: parameters of the transformer.
        token_BL: tokens by position, (B, L, Z) or (B, L).
        label_B: classes; `config.classes` means "no class".
        draws: random numbers from `draw_losses`.
        most_known: upper bound on the number of known tokens in an image.
        compute: number format and execution of the transformer.

    Returns:
        "masked_BL", True where a token is to be predicted: with causal attention, everywhere. With
        a diffusion head "mse_BLU" and "vlb_BLU", the two terms of `diffusion_loss`; with a
        categorical one "cross_entropy_BL" and "correct_BL", 1 where the likeliest code is right.
    """
    apply = bind_mar(config, params, compute)
    class_BC = apply(label_B, method="class_vectors")
    dropouts = draws.attention_dropout, draws.dropout
    B, L = token_BL.shape[:2]
    if config.attention == "causal":
        masked_BL = jnp.ones((B, L), bool)
        z_BLC = apply(token_BL, draws.order_BL, class_BC, *dropouts, method=causal_hidden)
    else:
        rank_BL = jnp.argsort(draws.order_BL, axis=1)
        masked_BL = rank_BL >= draws.known_B[:, None]
        place_Bn = draws.order_BL[:, :most_known]
        known_Bn = jnp.arange(most_known)[None] < draws.known_B[:, None]
        token_Bn = jax.vmap(lambda token_L, place_n: token_L[place_n])(token_BL, place_Bn)
        z_BLC = apply(token_Bn, place_Bn, known_Bn, class_BC, *dropouts, method="hidden")
    if not isinstance(config.head, DiffusionHead):
        logits_BLV = apply(z_BLC, method="logits")
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels
        return {
            "masked_BL": masked_BL,
            "cross_entropy_BL": cross_entropy(logits_BLV, token_BL),
            "correct_BL": (jnp.argmax(logits_BLV, axis=-1) == token_BL).astype(jnp.float32),
        }
    assert draws.timestep_BLU is not None and draws.noise_BLUZ is not None
    mlp = bind_denoiser(config.head, params, compute)
    U, Z = draws.noise_BLUZ.shape[2:]
    cond_BLE = mlp(z_BLC, method="condition")
    repeat = lambda x_BLC: jnp.repeat(x_BLC[:, :, None], U, axis=2).reshape(B * L * U, -1)  # noqa: E731
    cond_NE = repeat(cond_BLE)
    mse_N, vlb_N = diffusion_loss(
        lambda xt_NZ, t_N: mlp(xt_NZ, t_N, cond_NE),
        repeat(token_BL),
        draws.timestep_BLU.reshape(-1),
        draws.noise_BLUZ.reshape(-1, Z),
    )
    shape = B, L, U
    return {
        "masked_BL": masked_BL,
        "mse_BLU": mse_N.reshape(shape),
        "vlb_BLU": vlb_N.reshape(shape),
    }


def masked_mean(x_BL: jax.Array, masked_BL: jax.Array) -> jax.Array:
    """Averages over the masked tokens of each image, (B,), and then over images."""
    masked_BL = masked_BL.astype(jnp.float32)
    return jnp.mean(jnp.sum(x_BL * masked_BL, axis=1) / jnp.sum(masked_BL, axis=1))


def content_keys(batch: dict[str, jax.Array]) -> jax.Array:
    """Derives a key (B,) for each example from its numbers, so that no batch size changes it."""
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


def _dropout(key_B: jax.Array, rate: float) -> Dropout | None:
    return Dropout(key_B, rate) if rate else None
