"""Between tokenizers and the transformer: latents in its units, and what fits what."""

import jax
import jax.numpy as jnp

from varjax.errors import InputError
from varjax.mar.model import CategoricalHead, DiffusionHead, MARConfig
from varjax.nn.compute import EXACT, ComputeConfig
from varjax.tokenizers.contract import Latents
from varjax.tokenizers.kl.model import LATENT_STD_PATH, KLConfig, sample_posterior
from varjax.tokenizers.vq.model import VQConfig
from varjax.trees import PyTree

TokenizerConfig = KLConfig | VQConfig
NOT_FINITE = -1  # stands for a code that was to be drawn from logits with NaN


def check_latents_fit(tokenizer: TokenizerConfig, config: MARConfig) -> None:
    """Raises InputError, with all differences, where a transformer cannot read these latents."""
    head = config.head
    if isinstance(tokenizer, KLConfig) != isinstance(head, DiffusionHead):
        allowed = "a KL tokenizer" if isinstance(head, DiffusionHead) else "a VQ tokenizer"
        raise InputError(
            f"a transformer with a {type(head).__name__} takes {allowed}, but the tokenizer is a "
            f"{type(tokenizer).__name__}"
        )
    if isinstance(tokenizer, KLConfig) and isinstance(head, DiffusionHead):
        h, w, channels = tokenizer.latent_shape
        pairs = {
            "latent_map": ((h, w), tuple(config.latent_map)),
            "channels": (channels, head.channels),
        }
    else:
        assert isinstance(tokenizer, VQConfig) and isinstance(head, CategoricalHead)
        if len(tokenizer.pyramid) > 1:
            raise InputError(
                f"the tokenizer has {len(tokenizer.pyramid)} scales; a transformer with a "
                "CategoricalHead takes one of a single scale"
            )
        pairs = {
            "latent_map": (tokenizer.pyramid.finest, tuple(config.latent_map)),
            "vocab": (tokenizer.vocab, head.vocab),
        }
    if lines := [f"{n}: tokenizer {a}, transformer {b}" for n, (a, b) in pairs.items() if a != b]:
        raise InputError("tokenizer and transformer do not fit:\n  " + "\n  ".join(lines))


def encode_tokens(
    tokenizer: TokenizerConfig,
    config: MARConfig,
    params: PyTree,
    batch: Latents,
    key_B: jax.Array | None = None,
    compute: ComputeConfig = EXACT,
) -> jax.Array:
    """Makes tokens of images, or of latents that were made of them before.

    Args:
        tokenizer: config of the tokenizer.
        config: config of the transformer.
        params: parameters of the tokenizer.
        batch: "image_BHWC", or the arrays of `tokenizer.latent_spec`.
        key_B: one key per image, to draw from the posterior of a KL tokenizer; None for its mean.
        compute: number format and execution, as `Tokenizer.encode` takes it.

    Returns:
        (B, L, Z) float32 of a standard deviation of about 1, or codes (B, L) int32.
    """
    spec = tokenizer.latent_spec
    latents = (
        batch
        if spec.keys() <= batch.keys()
        else tokenizer.encode(params, batch["image_BHWC"], compute)
    )
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

    An image with a code that is NOT_FINITE is NaN.
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
