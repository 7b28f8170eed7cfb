"""The multi-scale VQ tokenizer: image <-> K maps of tokens (VAR, section 3.2)."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax import trees
from varjax.config import config_tree
from varjax.errors import check_setting
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
from varjax.nn.compute import EXACT, ComputeConfig, ConvFormat
from varjax.tokenizers.contract import Latents
from varjax.tokenizers.vq.pyramid import SCALES_256, Pyramid, Scale
from varjax.tokenizers.vq.quantizer import Quantized, Quantizer
from varjax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """Describes a multi-scale VQ tokenizer and implements the contract of tokenizers.

        varjax.VQConfig(scales=(1, 2, 4), image_channels=1, width=32, channel_mult=(1, 2))

    The defaults are the released `vae_ch160v4096z32`. Raises InputError where sizes do not fit
    together.

    Attributes:
        scales: side length of each token map, or its (h, w), coarse to fine.
        image_channels: number of image channels: 1 for gray, 3 for colors.
        width: channels of the convolutions at full resolution.
        channel_mult: factors on `width`, one per level; each level after the first halves the map.
        blocks: number of residual blocks per level of the encoder; the decoder has one more.
        groups: number of groups in each group norm.
        vocab: number of codes V.
        code_channels: number of channels Z of a code.
        num_phi: number of φ convolutions that the scales share; 0 for one per scale.
        phi_ratio: weight r of the convolution in φ(x) = r·conv(x) + (1-r)·x.
        cosine_codes: whether the nearest code is the one with the largest cosine, instead of the
            smallest distance.
    """

    scales: tuple[Scale, ...] = SCALES_256
    image_channels: int = 3
    width: int = 160
    channel_mult: tuple[int, ...] = (1, 1, 2, 2, 4)
    blocks: int = 2
    groups: int = 32
    vocab: int = 4096
    code_channels: int = 32
    num_phi: int = 4
    phi_ratio: float = 0.5
    cosine_codes: bool = False

    def __post_init__(self):
        self.pyramid  # noqa: B018  (computed for its checks)
        check_sizes(self.width, self.channel_mult, self.blocks, self.groups)
        for name in ("image_channels", "vocab", "code_channels"):
            check_setting(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check_setting("num_phi", self.num_phi, self.num_phi >= 0, "0 (one per scale) or more")
        check_setting("phi_ratio", self.phi_ratio, 0 <= self.phi_ratio <= 1, "in [0, 1]")

    @property
    def pyramid(self) -> Pyramid:
        """The scales' sizes, and where their tokens are."""
        return Pyramid(self.scales)

    @property
    def downsampling(self) -> int:
        """Number of image pixels per feature along one side."""
        return downsampling(self.channel_mult)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels)."""
        h, w = self.pyramid.finest
        return h * self.downsampling, w * self.downsampling, self.image_channels

    @property
    def latent_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Spec of "tokens_BL", (L,), stored as uint16, or as uint32 for more than 65,536 codes."""
        dtype = np.uint16 if self.vocab <= 2**16 else np.uint32
        return {"tokens_BL": jax.ShapeDtypeStruct((self.pyramid.length,), dtype)}

    def init(self, key: jax.Array) -> PyTree:
        """Draws untrained parameters."""
        return VQTokenizer(self).init(key, jnp.zeros((1, *self.image_shape)))["params"]

    def encode(
        self, params: PyTree, images_BHWC: jax.Array, compute: ComputeConfig = EXACT
    ) -> dict[str, jax.Array]:
        """Encodes images, uint8 or floats in [0, 1], into {"tokens_BL": int32}."""
        quantized = quantize_images(self, params, to_model_range(images_BHWC), compute)
        return {"tokens_BL": quantized.tokens_BL}

    def decode(self, params: PyTree, latents: Latents, compute: ComputeConfig = EXACT) -> jax.Array:
        """Decodes {"tokens_BL": integers} into images (B, H, W, channels) in [0, 1]."""
        tokens_BL = latents["tokens_BL"].astype(jnp.int32)
        f_hat_BhwZ = bound_quantizer(self, params).accumulated_scales(tokens_BL)[-1]
        return to_unit_range(decode_features(self, params, f_hat_BhwZ, compute))

    def identity(self, params: PyTree) -> dict[str, Any]:
        """Returns the config and the weights' digest, which identify this tokenizer."""
        return config_tree.to_dict(self) | {"weights": trees.digest(params)}


class VQTokenizer(nn.Module):
    """The network of a multi-scale VQ tokenizer: encoder, quantizer and decoder.

        y_BHWC, f_BhwZ, quantized = VQTokenizer(config).apply({"params": params}, image_BHWC)

    Images are (B, H, W, channels) in [-1, 1] here, tokens (B, L) int32, the scales concatenated.
    Outside of training, the functions below process large images piece by piece.

    Attributes:
        config: config of the tokenizer.
        compute: dtype of the decoder, precision of the encoder, and execution.
        encoder_dtype: dtype of the encoder, which may differ from float32 only in the
            tokenizer's training, because it flips tokens. The quantizer is always float32.
    """

    config: VQConfig
    compute: ComputeConfig = EXACT
    encoder_dtype: jnp.dtype = jnp.float32

    def setup(self):
        c, compute = self.config, self.compute
        sizes = {"width": c.width, "channel_mult": c.channel_mult}
        sizes |= {"blocks": c.blocks, "groups": c.groups}
        encoder_format = ConvFormat(self.encoder_dtype, compute.frozen_encoder, compute.target)
        decoder_format = ConvFormat(compute.jax_dtype, platform=compute.target)
        self.encoder = Encoder(**sizes, feature_channels=c.code_channels, format=encoder_format)
        self.quant_conv = conv(c.code_channels, ConvFormat())
        self.quantizer = make_quantizer(c)
        self.post_quant_conv = conv(c.code_channels, decoder_format)
        self.decoder = Decoder(**sizes, image_channels=c.image_channels, format=decoder_format)

    def __call__(
        self, image_BHWC: jax.Array, kept_B: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Quantized]:
        """Reconstructs images for training.

        The gradient of the image passes the quantizer straight through to the features.

        Args:
            image_BHWC: images in [-1, 1].
            kept_B: number of scales that each image is reconstructed from; None for all.

        Returns:
            (images not clipped, features (B, h, w, Z), what they were quantized to).
        """
        f_BhwZ = self.features(image_BHWC)
        quantized = self.quantizer(f_BhwZ, kept_B)
        f_hat_BhwZ = quantized.f_hats[-1]
        straight_through_BhwZ = f_BhwZ + jax.lax.stop_gradient(f_hat_BhwZ - f_BhwZ)
        return self.decode_unclipped(straight_through_BhwZ), f_BhwZ, quantized

    def features(self, image_BHWC: jax.Array) -> jax.Array:
        """Computes the features (B, h, w, Z) that are to be quantized."""
        f_BhwZ = self.encoder(image_BHWC.astype(self.encoder_dtype))
        return self.quant_conv(f_BhwZ.astype(jnp.float32))

    def decode_unclipped(self, f_hat_BhwZ: jax.Array) -> jax.Array:
        """Decodes f_hat (B, h, w, Z) into images for training, not clipped."""
        f_hat_BhwZ = f_hat_BhwZ.astype(self.compute.jax_dtype)
        return self.decoder(self.post_quant_conv(f_hat_BhwZ)).astype(jnp.float32)


def quantize_images(
    config: VQConfig, params: PyTree, image_BHWC: jax.Array, compute: ComputeConfig = EXACT
) -> Quantized:
    """Encodes and quantizes images in [-1, 1]; not for training."""
    f_BhwZ = image_features(config, params, image_BHWC, compute)
    return bound_quantizer(config, params)(f_BhwZ)


def image_features(
    config: VQConfig, params: PyTree, image_BHWC: jax.Array, compute: ComputeConfig = EXACT
) -> jax.Array:
    """Computes features (B, h, w, Z) of images in [-1, 1]; not for training."""
    model = VQTokenizer(config, compute).bind({"params": params})
    return map_images(model.features, image_BHWC, config.image_shape, compute)


def decode_features(
    config: VQConfig, params: PyTree, f_hat_BhwZ: jax.Array, compute: ComputeConfig = EXACT
) -> jax.Array:
    """Decodes f_hat (B, h, w, Z) into images clipped to [-1, 1]; not for training."""
    model = VQTokenizer(config, compute).bind({"params": params})
    decode = lambda f_hat_BhwZ: jnp.clip(model.decode_unclipped(f_hat_BhwZ), -1, 1)  # noqa: E731
    return map_images(decode, f_hat_BhwZ, config.image_shape, compute)


def decode_every_scale(
    config: VQConfig,
    params: PyTree,
    f_hats: Sequence[jax.Array],
    compute: ComputeConfig = EXACT,
) -> jax.Array:
    """Decodes K f_hats into the image after each scale, (K, B, H, W, channels) in [-1, 1]."""
    decode = functools.partial(decode_features, config, params, compute=compute)
    # One scale at a time: all of them together would need K times the memory.
    return jax.lax.map(decode, jnp.stack(f_hats))


def bound_quantizer(config: VQConfig, params: PyTree) -> Quantizer:
    """Returns the quantizer with its parameters, which are part of the tokenizer's."""
    return make_quantizer(config).bind({"params": params["quantizer"]})


def make_quantizer(config: VQConfig) -> Quantizer:
    """Returns the quantizer without parameters, which are the tokenizer's `params["quantizer"]`."""
    return Quantizer(
        pyramid=config.pyramid,
        vocab=config.vocab,
        code_channels=config.code_channels,
        num_phi=config.num_phi,
        phi_ratio=config.phi_ratio,
        cosine=config.cosine_codes,
    )
