"""The KL tokenizer: image <-> map of Gaussian latents (LDM's AutoencoderKL; MAR's KL-16)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax.core import config_tree, trees
from varjax.core.errors import InputError, check_setting
from varjax.core.trees import PyTree
from varjax.nn.autoencoder import (
    Decoder,
    Encoder,
    check_sizes,
    conv,
    downsampling,
    map_images,
    to_model_range,
    to_unit_range,
)
from varjax.nn.compute import EXACT, Compute, ConvFormat
from varjax.tokenizers.contract import Latents

LOG_VARIANCE_RANGE = (-30.0, 20.0)  # LDM's
LATENT_STD_PATH = "latent_std"  # where parameters and their average keep it


@dataclasses.dataclass(frozen=True)
class KLConfig:
    """Describes a KL tokenizer and implements the contract of tokenizers.

        KLConfig(image_size=(8, 8), image_channels=1, width=32, multipliers=(1, 2), groups=8)

    The defaults are the released KL-16 (`kl16.ckpt`). The parameters hold, besides the network,
    the scalar "latent_std": the standard deviation of the latents over the data, by which a model
    of latents divides them. No gradient reaches it. Raises InputError where sizes do not fit.

    Attributes:
        image_size: pixels of both sides, or (height, width); any that the levels divide.
        image_channels: 1 for gray, 3 for colors.
        width: channels of the convolutions at full resolution.
        multipliers: of `width`, one per level; each level after the first halves the map.
        blocks: residual blocks per level of the encoder; the decoder has one more.
        groups: of the group norms.
        latent_channels: size Z of a latent.
    """

    image_size: int | tuple[int, int] = 256
    image_channels: int = 3
    width: int = 128
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    latent_channels: int = 16

    def __post_init__(self):
        check_sizes(self.width, self.multipliers, self.blocks, self.groups)
        for name in ("image_channels", "latent_channels"):
            check_setting(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        H, W, _ = self.image_shape
        if min(H, W) < 1 or H % self.downsampling or W % self.downsampling:
            raise InputError(
                f"image_size={self.image_size}: {len(self.multipliers)} levels halve an image to "
                f"a map, so its sides must be multiples of {self.downsampling}"
            )

    @property
    def downsampling(self) -> int:
        """Number of image pixels per latent along one side."""
        return downsampling(self.multipliers)

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
        """{"mean_BhwZ", "std_BhwZ"}: each of `latent_shape`, float32."""
        array = jax.ShapeDtypeStruct(self.latent_shape, np.float32)
        return {"mean_BhwZ": array, "std_BhwZ": array}

    def init(self, key: jax.Array) -> PyTree:
        """Draws untrained parameters; "latent_std" is 1."""
        return KLTokenizer(self).init(key, jnp.zeros((1, *self.image_shape)))["params"]

    def encode(
        self, params: PyTree, images_BHWC: jax.Array, compute: Compute = EXACT
    ) -> dict[str, jax.Array]:
        """Encodes images, uint8 or floats in [0, 1], into the posterior's moments, not scaled."""
        return encode_posteriors(self, params, to_model_range(images_BHWC), compute)

    def decode(self, params: PyTree, latents: Latents, compute: Compute = EXACT) -> jax.Array:
        """Decodes latents into images (B, H, W, channels) in [0, 1].

        Args:
            params: as `init` gives them.
            latents: of which only "mean_BhwZ" counts, for it is the likeliest latent; whoever
                wants another one gives that in its place.
            compute: the decoder's number format, and what to compile for.
        """
        return to_unit_range(decode_latents(self, params, latents["mean_BhwZ"], compute))

    def identity(self, params: PyTree) -> dict[str, Any]:
        """Returns the config and the weights' digest, which tell this tokenizer from any other."""
        return config_tree.to_dict(self) | {"weights": trees.digest(params)}


class KLTokenizer(nn.Module):
    """Computes a KL tokenizer, as a module that is bound to its parameters.

        model = KLTokenizer(config).bind({"params": params})
        latents = split_moments(model.moments(image_BHWC))

    Images are (B, H, W, channels) in [-1, 1] here, latents (B, h, w, Z), not scaled.

    Attributes:
        config: its sizes.
        compute: number format of the decoder, precision of the encoder, and execution.
        encoder_dtype: number format of the encoder; moments are float32 always.
    """

    config: KLConfig
    compute: Compute = EXACT
    encoder_dtype: jnp.dtype = jnp.float32

    def setup(self):
        c, compute = self.config, self.compute
        sizes = c.width, c.multipliers, c.blocks, c.groups
        inward = ConvFormat(self.encoder_dtype, compute.frozen_encoder, compute.target)
        outward = ConvFormat(compute.jax_dtype)
        self.encoder = Encoder(*sizes, 2 * c.latent_channels, inward)
        self.quant_conv = conv(2 * c.latent_channels, ConvFormat(), size=1)
        self.post_quant_conv = conv(c.latent_channels, outward, size=1)
        self.decoder = Decoder(*sizes, c.image_channels, level_attention=False, format=outward)
        self.latent_std = self.param(LATENT_STD_PATH, nn.initializers.ones, ())

    def __call__(
        self, image_BHWC: jax.Array, noise_BhwZ: jax.Array | None = None
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Reconstructs images for training.

        Args:
            image_BHWC: images in [-1, 1].
            noise_BhwZ: standard normal; None for the posterior's mode.

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
        f_BhwC = self.encoder(image_BHWC.astype(self.encoder_dtype))
        return self.quant_conv(f_BhwC.astype(jnp.float32))

    def decode(self, z_BhwZ: jax.Array) -> jax.Array:
        """Decodes latents into images, not clipped."""
        image_BHWC = self.decoder(self.post_quant_conv(z_BhwZ.astype(self.compute.jax_dtype)))
        return image_BHWC.astype(jnp.float32)


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
    config: KLConfig, params: PyTree, image_BHWC: jax.Array, compute: Compute = EXACT
) -> dict[str, jax.Array]:
    """Encodes images in [-1, 1] into {"mean_BhwZ", "std_BhwZ"}, not scaled; not for training."""
    model = KLTokenizer(config, compute).bind({"params": params})
    return split_moments(map_images(model.moments, image_BHWC, config.image_shape, compute))


def decode_latents(
    config: KLConfig, params: PyTree, z_BhwZ: jax.Array, compute: Compute = EXACT
) -> jax.Array:
    """Decodes latents, not scaled, into images clipped to [-1, 1]; not for training."""
    model = KLTokenizer(config, compute).bind({"params": params})
    decode = lambda z_BhwZ: jnp.clip(model.decode(z_BhwZ), -1, 1)  # noqa: E731
    return map_images(decode, z_BhwZ, config.image_shape, compute)
