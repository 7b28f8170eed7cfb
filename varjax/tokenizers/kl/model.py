"""The KL tokenizer: image <-> map of Gaussian latents (LDM's AutoencoderKL; MAR's KL-16)."""

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax import trees
from varjax.config import config_tree
from varjax.errors import InputError, check_setting
from varjax.nn.autoencoder import (
    COARSEST,
    Decoder,
    Encoder,
    check_attention,
    check_sizes,
    conv,
    downsampling,
    map_images,
    to_model_range,
    to_unit_range,
)
from varjax.nn.compute import EXACT, ComputeConfig, ConvFormat
from varjax.tokenizers.contract import Latents
from varjax.trees import PyTree

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # LDM's
LATENT_STD_PATH = "latent_std"  # where parameters and their average keep it
LATER_FIELDS = (
    "encoder_attention",
    "decoder_attention",
    "feature_channels",
    "quant_convs",
    "latent_shift",
)
# Latent diffusion's released autoencoders (arXiv 2112.10752, models/first_stage_models), whose f8
# is Stable Diffusion's too, and MAR's. The number in a name is the downsampling.
PRESETS: dict[str, dict[str, Any]] = {
    "kl16": {},
    "kl_f4": {
        "channel_mult": (1, 2, 4),
        "latent_channels": 3,
        "encoder_attention": (),
    },
    "kl_f8": {
        "channel_mult": (1, 2, 4, 4),
        "latent_channels": 4,
        "encoder_attention": (),
    },
    "kl_f16": {"decoder_attention": (-1,)},
    "kl_f32": {
        "channel_mult": (1, 1, 2, 2, 4, 4),
        "latent_channels": 64,
        "encoder_attention": (-2, -1),
        "decoder_attention": (-2, -1),
    },
}


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """Describes a KL tokenizer and implements the contract of tokenizers.

        varjax.KLConfig(image_size=8, image_channels=1, width=32, channel_mult=(1, 2), groups=8)

    The defaults are the released KL-16 (`kl16.ckpt`). In addition to the network, the parameters
    hold the scalar "latent_std": the standard deviation of the latents over the data, by which a
    model of latents divides them. No gradient reaches it. Raises InputError where sizes do not fit.

    Attributes:
        image_size: pixels of both sides, or (height, width); any multiple of the downsampling.
        image_channels: number of image channels: 1 for gray, 3 for colors.
        width: channels of the convolutions at full resolution.
        channel_mult: factors on `width`, one per level; each level after the first halves the map.
        blocks: number of residual blocks per level of the encoder; the decoder has one more.
        groups: number of groups in each group norm.
        latent_channels: number of channels Z of a latent.
        encoder_attention: levels of the encoder with attention in addition to the middle,
            ascending; -1 is the coarsest.
        decoder_attention: levels of the decoder with attention in addition to the middle,
            ascending; -1 is the coarsest.
        feature_channels: channels between the encoder and `quant_conv`, and between
            `post_quant_conv` and the decoder; none for `latent_channels`.
        quant_convs: whether there are `quant_conv` and `post_quant_conv`.
        latent_shift: number that a model of latents subtracts from them before it divides.
    """

    image_size: int | tuple[int, int] = 256
    image_channels: int = 3
    width: int = 128
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    latent_channels: int = 16
    encoder_attention: tuple[int, ...] = COARSEST
    decoder_attention: tuple[int, ...] = ()
    feature_channels: int | None = None
    quant_convs: bool = True
    latent_shift: float = 0.0

    def __post_init__(self):
        check_sizes(self.width, self.channel_mult, self.blocks, self.groups)
        for name in ("encoder_attention", "decoder_attention"):
            check_attention(name, getattr(self, name), self.channel_mult)
        for name in ("image_channels", "latent_channels"):
            check_setting(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check_setting("feature_channels", self.features, self.features >= 1, "1 or more")
        if not self.quant_convs and self.features != self.latent_channels:
            raise InputError(
                f"feature_channels={self.features}: without quant_convs the encoder's features "
                f"are the latents, of latent_channels={self.latent_channels}; leave it out"
            )
        finite = math.isfinite(self.latent_shift)
        check_setting("latent_shift", self.latent_shift, finite, "a finite number")
        H, W, _ = self.image_shape
        if min(H, W) < 1 or H % self.downsampling or W % self.downsampling:
            raise InputError(
                f"image_size={self.image_size}: {len(self.channel_mult)} levels halve an image to "
                f"a map, so its sides must be multiples of {self.downsampling}"
            )

    @classmethod
    def preset(cls, name: str, image_size: int | tuple[int, int] = 256) -> "KLConfig":
        """Returns a released autoencoder's; raises InputError for a name not in PRESETS."""
        if name not in PRESETS:
            raise InputError(f"preset {name!r}: allowed are {', '.join(PRESETS)}")
        return cls(image_size=image_size, **PRESETS[name])

    @property
    def features(self) -> int:
        """Channels of the encoder's features, of which there are two sets, and the decoder's."""
        return self.latent_channels if self.feature_channels is None else self.feature_channels

    @property
    def downsampling(self) -> int:
        """Number of image pixels per latent along one side."""
        return downsampling(self.channel_mult)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels)."""
        size = self.image_size
        return *((size, size) if isinstance(size, int) else size), self.image_channels

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(h, w, Z)."""
        H, W, _ = self.image_shape
        return H // self.downsampling, W // self.downsampling, self.latent_channels

    @property
    def latent_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Specs of "mean_BhwZ" and "std_BhwZ", each of `latent_shape` and float32."""
        array = jax.ShapeDtypeStruct(self.latent_shape, np.float32)
        return {"mean_BhwZ": array, "std_BhwZ": array}

    def init(self, key: jax.Array) -> PyTree:
        """Draws untrained parameters; "latent_std" is 1."""
        return KLTokenizer(self).init(key, jnp.zeros((1, *self.image_shape)))["params"]

    def encode(
        self, params: PyTree, images_BHWC: jax.Array, compute: ComputeConfig = EXACT
    ) -> dict[str, jax.Array]:
        """Encodes images, uint8 or floats in [0, 1], into the posterior's moments, not scaled."""
        return encode_posteriors(self, params, to_model_range(images_BHWC), compute)

    def decode(self, params: PyTree, latents: Latents, compute: ComputeConfig = EXACT) -> jax.Array:
        """Decodes latents into images (B, H, W, channels) in [0, 1].

        Args:
            params: parameters in the layout of `init`.
            latents: arrays of `latent_spec`; only "mean_BhwZ", the mode, is read. Pass
                another latent instead to decode that one.
            compute: dtype of the decoder, and the platform to compile for.
        """
        return to_unit_range(decode_latents(self, params, latents["mean_BhwZ"], compute))

    def identity(self, params: PyTree) -> dict[str, Any]:
        """Returns the config and the weights' digest, which identify this tokenizer.

        Caches of latents keep it, older ones without LATER_FIELDS, so their defaults are left out.
        """
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        old = {n for n in LATER_FIELDS if getattr(self, n) == defaults[n]}
        config = {n: x for n, x in config_tree.to_dict(self).items() if n not in old}
        return config | {"weights": trees.digest(params)}


class KLTokenizer(nn.Module):
    """Computes a KL tokenizer, as a module that is bound to its parameters.

        model = KLTokenizer(config).bind({"params": params})
        latents = split_moments(model.moments(image_BHWC))

    Images are (B, H, W, channels) in [-1, 1] here, latents (B, h, w, Z), not scaled.

    Attributes:
        config: config of the tokenizer.
        compute: dtype of the decoder, precision of the encoder, and execution.
        encoder_dtype: dtype of the encoder; moments are float32 always.
    """

    config: KLConfig
    compute: ComputeConfig = EXACT
    encoder_dtype: jnp.dtype = jnp.float32

    def setup(self):
        c, compute = self.config, self.compute
        sizes = c.width, c.channel_mult, c.blocks, c.groups
        inward = ConvFormat(self.encoder_dtype, compute.frozen_encoder, compute.target)
        outward = ConvFormat(compute.jax_dtype, platform=compute.target)
        self.encoder = Encoder(*sizes, 2 * c.features, c.encoder_attention, inward)
        if c.quant_convs:
            self.quant_conv = conv(2 * c.latent_channels, ConvFormat(), size=1)
            self.post_quant_conv = conv(c.features, outward, size=1)
        self.decoder = Decoder(*sizes, c.image_channels, c.decoder_attention, outward)
        self.latent_std = self.param(LATENT_STD_PATH, nn.initializers.ones, ())

    def __call__(
        self, image_BHWC: jax.Array, noise_BhwZ: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Reconstructs images for training.

        Args:
            image_BHWC: images in [-1, 1].
            noise_BhwZ: standard normal noise; None for the posterior's mode.

        Returns:
            (images not clipped, the posterior's moments).
        """
        latents = split_moments(self.moments(image_BHWC))
        z_BhwZ = latents["mean_BhwZ"]
        if noise_BhwZ is not None:
            z_BhwZ = sample_posterior(latents, noise_BhwZ)
        return self.decode(z_BhwZ), latents

    def moments(self, image_BHWC: jax.Array) -> jax.Array:
        """Computes the posterior's means and log variances, (B, h, w, 2 Z)."""
        f_BhwC = self.encoder(image_BHWC.astype(self.encoder_dtype)).astype(jnp.float32)
        return self.quant_conv(f_BhwC) if self.config.quant_convs else f_BhwC

    def decode(self, z_BhwZ: jax.Array) -> jax.Array:
        """Decodes latents into images, not clipped."""
        f_BhwC = z_BhwZ.astype(self.compute.jax_dtype)
        if self.config.quant_convs:
            f_BhwC = self.post_quant_conv(f_BhwC)
        return self.decoder(f_BhwC).astype(jnp.float32)


def split_moments(moments_BhwC: jax.Array) -> dict[str, jax.Array]:
    """Splits means and log variances into {"mean_BhwZ", "std_BhwZ"}."""
    mean_BhwZ, log_variance_BhwZ = jnp.split(moments_BhwC, 2, axis=-1)
    log_variance_BhwZ = jnp.clip(log_variance_BhwZ, *LOG_VARIANCE_RANGE)
    return {"mean_BhwZ": mean_BhwZ, "std_BhwZ": jnp.exp(log_variance_BhwZ / 2)}


def sample_posterior(latents: Latents, noise_BhwZ: jax.Array) -> jax.Array:
    """Turns standard normal noise into samples (B, h, w, Z) of the posterior."""
    return latents["mean_BhwZ"] + latents["std_BhwZ"] * noise_BhwZ


def kl_divergence(latents: Latents) -> jax.Array:
    """Computes KL(posterior ‖ standard normal), (B,), in nats, summed over h, w and Z."""
    mean_BhwZ, std_BhwZ = latents["mean_BhwZ"], latents["std_BhwZ"]
    squares_BhwZ = jnp.square(mean_BhwZ) + jnp.square(std_BhwZ)
    return jnp.sum((squares_BhwZ - 1) / 2 - jnp.log(std_BhwZ), axis=(1, 2, 3))


def latent_moments(latents: Latents) -> dict[str, jax.Array]:
    """Computes mean and mean square of all samples of each image's latents, (B,) each."""
    mean_BhwZ, std_BhwZ = latents["mean_BhwZ"], latents["std_BhwZ"]
    squares_BhwZ = jnp.square(mean_BhwZ) + jnp.square(std_BhwZ)
    return {
        "latent_mean": jnp.mean(mean_BhwZ, axis=(1, 2, 3)),
        "latent_square": jnp.mean(squares_BhwZ, axis=(1, 2, 3)),
    }


def encode_posteriors(
    config: KLConfig, params: PyTree, image_BHWC: jax.Array, compute: ComputeConfig = EXACT
) -> dict[str, jax.Array]:
    """Encodes images in [-1, 1] into {"mean_BhwZ", "std_BhwZ"}, not scaled; not for training."""
    model = KLTokenizer(config, compute).bind({"params": params})
    return split_moments(map_images(model.moments, image_BHWC, config.image_shape, compute))


def decode_latents(
    config: KLConfig, params: PyTree, z_BhwZ: jax.Array, compute: ComputeConfig = EXACT
) -> jax.Array:
    """Decodes latents, not scaled, into images clipped to [-1, 1]; not for training."""
    model = KLTokenizer(config, compute).bind({"params": params})
    decode = lambda z_BhwZ: jnp.clip(model.decode(z_BhwZ), -1, 1)  # noqa: E731
    return map_images(decode, z_BhwZ, config.image_shape, compute)
