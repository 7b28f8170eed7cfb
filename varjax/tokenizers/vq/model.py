"""The multi-scale VQ tokenizer: image <-> K maps of tokens (VAR, section 3.2)."""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax.core import config_tree, trees
from varjax.core.errors import InputError
from varjax.core.trees import PyTree
from varjax.nn.autoencoder import Decoder, Encoder, conv, to_model_range, to_unit_range
from varjax.nn.compute import is_single_cpu_device
from varjax.tokenizers.contract import Latents
from varjax.tokenizers.vq.pyramid import SCALES_256, Pyramid, Scale
from varjax.tokenizers.vq.quantizer import Quantized, Quantizer


@dataclasses.dataclass(frozen=True)
class VQConfig:
    """What a tokenizer is; the defaults are the released `vae_ch160v4096z32`.

    Raises InputError where sizes do not fit one another.
    """

    scales: tuple[Scale, ...] = SCALES_256
    image_channels: int = 3
    width: int = 160
    multipliers: tuple[int, ...] = (1, 1, 2, 2, 4)  # one per level; each further one halves the map
    blocks: int = 2
    groups: int = 32
    vocab: int = 4096
    code_channels: int = 32
    phis: int = 4  # φ convolutions shared by the scales; 0: one per scale
    phi_ratio: float = 0.5
    cosine_codes: bool = False

    def __post_init__(self):
        self.pyramid  # noqa: B018  (its own checks)
        for name in ("image_channels", "width", "blocks", "groups", "vocab", "code_channels"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be 1 or more")
        if not self.multipliers or min(self.multipliers) < 1:
            raise InputError(f"multipliers={self.multipliers}: give one per level, each 1 or more")
        if self.width % self.groups:
            raise InputError(f"width={self.width} is not a multiple of groups={self.groups}")
        if self.phis < 0:
            raise InputError(f"phis={self.phis}: must be 0 (one per scale) or more")
        if not 0 <= self.phi_ratio <= 1:
            raise InputError(f"phi_ratio={self.phi_ratio}: must lie in [0, 1]")

    @property
    def pyramid(self) -> Pyramid:
        return Pyramid(self.scales)

    @property
    def downsampling(self) -> int:
        """Image pixels per feature along one side."""
        return 2 ** (len(self.multipliers) - 1)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels)."""
        h, w = self.pyramid.finest
        return h * self.downsampling, w * self.downsampling, self.image_channels

    @property
    def latent_spec(self) -> dict[str, jax.ShapeDtypeStruct]:
        """{"tokens_BL": shape (L,), stored as uint16, or as uint32 for more than 65,536 codes}."""
        dtype = np.uint16 if self.vocab <= 2**16 else np.uint32
        return {"tokens_BL": jax.ShapeDtypeStruct((self.pyramid.length,), dtype)}

    def init(self, key: jax.Array) -> PyTree:
        """Draws untrained parameters."""
        return VQTokenizer(self).init(key, jnp.zeros((1, *self.image_shape)))["params"]

    def encode(self, params: PyTree, images_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Encodes images, uint8 or floats in [0, 1], into {"tokens_BL": int32}."""
        model = VQTokenizer(self).bind({"params": params})
        return {"tokens_BL": model.encode(to_model_range(images_BHWC))}

    def decode(self, params: PyTree, latents: Latents) -> jax.Array:
        """Decodes {"tokens_BL": integers} into images (B, H, W, channels) in [0, 1]."""
        model = VQTokenizer(self).bind({"params": params})
        return to_unit_range(model.decode(latents["tokens_BL"].astype(jnp.int32)))

    def identity(self, params: PyTree) -> dict[str, Any]:
        """Returns the config and the weights' digest, which tell this tokenizer from any other."""
        return config_tree.to_dict(self) | {"weights": trees.digest(params)}


class VQTokenizer(nn.Module):
    """Images are (B, H, W, channels) in [-1, 1]; tokens (B, L) int32, scales concatenated.

    The quantizer is float32, and the encoder too wherever tokens count, for other formats flip
    some: `encoder_dtype` is for training a tokenizer. `decoder_dtype` is free.
    """

    config: VQConfig
    decoder_dtype: jnp.dtype = jnp.float32
    encoder_dtype: jnp.dtype = jnp.float32

    def setup(self):
        c = self.config
        self.encoder = Encoder(
            c.width, c.multipliers, c.blocks, c.groups, c.code_channels, self.encoder_dtype
        )
        self.quant_conv = conv(c.code_channels, jnp.float32)
        self.quantizer = make_quantizer(c)
        self.post_quant_conv = conv(c.code_channels, self.decoder_dtype)
        self.decoder = Decoder(
            c.width, c.multipliers, c.blocks, c.groups, c.image_channels, self.decoder_dtype
        )

    def __call__(
        self, image_BHWC: jax.Array, kept_B: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array, Quantized]:
        """For training: (image, features, quantized), the image not clipped.

        kept_B: how many scales each image is made of; None for all.
        The gradient of the image passes the quantizer straight through to the features.
        """
        f_BhwZ = self.features(image_BHWC)
        quantized = self.quantizer(f_BhwZ, kept_B)
        f_hat_BhwZ = quantized.f_hats[-1]
        return self._decode(f_BhwZ + jax.lax.stop_gradient(f_hat_BhwZ - f_BhwZ)), f_BhwZ, quantized

    def features(self, image_BHWC: jax.Array) -> jax.Array:
        """What is quantized: (B, h, w, Z)."""
        f_BhwZ = self.encoder(image_BHWC.astype(self.encoder_dtype))
        return self.quant_conv(f_BhwZ.astype(jnp.float32))

    def encode(self, image_BHWC: jax.Array) -> jax.Array:
        """(B, H, W, channels) -> (B, L)."""
        return self.quantizer(encode_images(self.config, self._params, image_BHWC)).tokens_BL

    def encode_to_teach(self, image_BHWC: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Images -> (tokens (B, L), transformer input (B, L - l of scale 0, Z))."""
        quantized = self.quantizer(encode_images(self.config, self._params, image_BHWC))
        return quantized.tokens_BL, self.quantizer.teacher_input(quantized.f_hats)

    def teacher_input(self, tokens_BL: jax.Array) -> jax.Array:
        """(B, L) -> the transformer's input for all scales but the first."""
        return self.quantizer.teacher_input(self.quantizer.accumulate(tokens_BL))

    def decode(self, tokens_BL: jax.Array) -> jax.Array:
        """(B, L) -> (B, H, W, channels)."""
        return self.decode_features(self.quantizer.accumulate(tokens_BL)[-1])

    def decode_every_scale(self, tokens_BL: jax.Array) -> jax.Array:
        """(B, L) -> (K, B, H, W, channels): the image after each scale."""
        f_hats = self.quantizer.accumulate(tokens_BL)
        image_NHWC = self.decode_features(jnp.concatenate(f_hats))
        return image_NHWC.reshape(len(f_hats), -1, *image_NHWC.shape[1:])

    def decode_features(self, f_hat_BhwZ: jax.Array) -> jax.Array:
        """(B, h, w, Z) -> images clipped to [-1, 1]."""
        return decode_images(self.config, self._params, f_hat_BhwZ, self.decoder_dtype)

    @property
    def _params(self):
        return self.variables["params"]

    def _decode(self, f_hat_BhwZ):
        image_BHWC = self.decoder(self.post_quant_conv(f_hat_BhwZ.astype(self.decoder_dtype)))
        return image_BHWC.astype(jnp.float32)


def encode_images(
    config: VQConfig, params, image_BHWC: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """(B, H, W, channels) in [-1, 1] -> features to quantize (B, h, w, Z). Not for training."""
    model = VQTokenizer(config, encoder_dtype=dtype, parent=None).bind({"params": params})
    return _each(config, model.features, image_BHWC)


def decode_images(
    config: VQConfig, params, f_hat_BhwZ: jax.Array, dtype: Any = jnp.float32
) -> jax.Array:
    """(B, h, w, Z) -> images (B, H, W, channels) clipped to [-1, 1], computed in `dtype`."""
    model = VQTokenizer(config, dtype, parent=None).bind({"params": params})
    return _each(config, lambda f_hat_BhwZ: jnp.clip(model._decode(f_hat_BhwZ), -1, 1), f_hat_BhwZ)


def _each(config, function, x):
    H, W, _ = config.image_shape
    if is_single_cpu_device() and H * W >= 64**2:
        # A CPU's convolutions of large images are 1.4 times faster one by one: docs/benchmarks.md.
        return jax.lax.map(lambda x: function(x[None])[0], x)
    return function(x)


def make_quantizer(config: VQConfig) -> Quantizer:
    """The quantizer alone; its parameters are `params["quantizer"]` of the tokenizer."""
    return Quantizer(
        config.pyramid,
        config.vocab,
        config.code_channels,
        config.phis,
        config.phi_ratio,
        config.cosine_codes,
    )
