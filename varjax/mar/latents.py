"""Tokens from images or latents and back, and which tokenizer fits which transformer."""

import jax
import jax.numpy as jnp

from varjax.errors import InputError
from varjax.mar.heads import NOT_FINITE
from varjax.mar.model import MARConfig
from varjax.nn.compute import EXACT, ComputeConfig
from varjax.tokenizers.contract import Latents
from varjax.tokenizers.kl.model import LATENT_STD_PATH, KLConfig, sample_posterior
from varjax.tokenizers.vq.model import VQConfig
from varjax.trees import PyTree

TokenizerConfig = KLConfig | VQConfig


def check_latents_fit(tokenizer: TokenizerConfig, config: MARConfig) -> None:
    """Raises InputError, with all differences, where a transformer cannot read these latents."""
    kind = type(config.head).__name__
    expected = {"latent_map": tuple(config.latent_map)} | config.head.latent_sizes
    if isinstance(tokenizer, KLConfig):
        h, w, channels = tokenizer.latent_shape
        sizes = {"latent_map": (h, w), "channels": channels}
    else:
        sizes = {"latent_map": tokenizer.pyramid.finest, "vocab": tokenizer.vocab}
    if sizes.keys() != expected.keys():
        allowed = "a KL tokenizer" if "channels" in expected else "a VQ tokenizer"
        raise InputError(
            f"a transformer with a {kind} takes {allowed}, but the tokenizer is a "
            f"{type(tokenizer).__name__}"
        )
    if isinstance(tokenizer, VQConfig) and len(tokenizer.pyramid) > 1:
        raise InputError(
            f"the tokenizer has {len(tokenizer.pyramid)} scales; a transformer with a {kind} takes "
            "one of a single scale"
        )
    lines = [
        f"{name}: tokenizer {sizes[name]}, transformer {expected[name]}"
        for name in sizes
        if sizes[name] != expected[name]
    ]
    if lines:
        raise InputError("tokenizer and transformer do not fit:\n  " + "\n  ".join(lines))


def encode_tokens(
    tokenizer: TokenizerConfig,
    config: MARConfig,
    params: PyTree,
    batch: Latents,
    key_B: jax.Array | None = None,
    compute: ComputeConfig = EXACT,
) -> jax.Array:
    """Makes tokens from images, or from latents that were encoded before.

    Args:
        tokenizer: config of the tokenizer.
        config: config of the transformer.
        params: parameters of the tokenizer.
        batch: "image_BHWC", or the arrays of `tokenizer.latent_spec`.
        key_B: one key per image, to draw from the posterior of a KL tokenizer; None for its mean.
        compute: dtype and execution, as `Tokenizer.encode` takes it.

    Returns:
        (B, L, Z) float32 with a standard deviation of about 1, or codes (B, L) int32.
    """
    latents = batch
    if not tokenizer.latent_spec.keys() <= batch.keys():
        latents = tokenizer.encode(params, batch["image_BHWC"], compute)
    if isinstance(tokenizer, VQConfig):
        return latents["tokens_BL"]
    z_BhwZ = latents["mean_BhwZ"]
    if key_B is not None:
        draw = jax.vmap(lambda key: jax.random.normal(key, tokenizer.latent_shape))
        z_BhwZ = sample_posterior(latents, draw(key_B))
    return config.patchify(to_model_units(tokenizer, params, z_BhwZ))


def decode_tokens(
    tokenizer: TokenizerConfig,
    config: MARConfig,
    params: PyTree,
    tokens_BL: jax.Array,
    compute: ComputeConfig = EXACT,
) -> jax.Array:
    """Decodes tokens, (B, L, Z) or (B, L), into images (B, H, W, channels) in [0, 1].

    An image is NaN if any of its codes is NOT_FINITE.
    """
    if isinstance(tokenizer, VQConfig):
        images_BHWC = tokenizer.decode(params, {"tokens_BL": tokens_BL}, compute)
        finite_B = jnp.all(tokens_BL != NOT_FINITE, axis=1)
        return jnp.where(finite_B[:, None, None, None], images_BHWC, jnp.nan)
    z_BhwZ = from_model_units(tokenizer, params, config.unpatchify(tokens_BL))
    return tokenizer.decode(params, {"mean_BhwZ": z_BhwZ}, compute)


def to_model_units(tokenizer: KLConfig, params: PyTree, z_BhwZ: jax.Array) -> jax.Array:
    """Shifts latents, and divides them by the standard deviation that their tokenizer measured."""
    return (z_BhwZ - tokenizer.latent_shift) / params[LATENT_STD_PATH]


def from_model_units(tokenizer: KLConfig, params: PyTree, z_BhwZ: jax.Array) -> jax.Array:
    """Undoes `to_model_units`."""
    return z_BhwZ * jnp.asarray(params[LATENT_STD_PATH]) + tokenizer.latent_shift


def decode_known(
    tokenizer: TokenizerConfig,
    mar: MARConfig,
    params: PyTree,
    token_BL: jax.Array,
    known_BL: jax.Array,
    compute: ComputeConfig = EXACT,
) -> jax.Array:
    """Decodes the tokens that are known, as an image in which the others are gray.

    Args:
        tokenizer: config of the tokenizer.
        mar: config of the transformer.
        params: parameters of the tokenizer.
        token_BL: tokens by position; only the known ones are shown.
        known_BL: whether each token is known.
        compute: dtype of the decoder.

    Returns:
        (B, H, W, channels) in [0, 1].
    """
    known = known_BL.reshape(known_BL.shape + (1,) * (token_BL.ndim - 2))
    shown_BL = jnp.where(known, token_BL, 0)  # 0 is the mean of latents; of codes, any is as good
    image_BHWC = decode_tokens(tokenizer, mar, params, shown_BL, compute)
    (h, w), (H, W) = mar.grid, image_BHWC.shape[1:3]
    known_Bhw1 = known_BL.reshape(-1, h, w, 1)
    known_BHW1 = known_Bhw1.repeat(H // h, axis=1).repeat(W // w, axis=2)
    return jnp.where(known_BHW1, image_BHWC, 0.5)
