"""The convolutional encoder and decoder of both tokenizers (the VQGAN design)."""

from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp

from varjax.errors import InputError, check_setting
from varjax.nn.attention import dot_product_attention
from varjax.nn.compute import ComputeConfig, ConvFormat, batch_devices, split_batch
from varjax.nn.upsampling import upsample_and_convolve

PIXELS_OF_LARGE_IMAGES = 64**2  # from this size on, a few at a time are faster
IMAGES_AT_ONCE = 16  # on a device: 256-pixel maps of 160 channels take 42 MB each in float32
# The official ones have 5 levels of 2 blocks. The limits let any file be described in seconds.
MAX_LEVELS, MAX_BLOCKS = 10, 40  # the latter of all levels together
COARSEST = (-1,)  # levels with attention: the last one alone, as in VQGAN at 256 pixels


class Encoder(nn.Module):
    """Maps images (B, H, W, channels) to features (B, H/f, W/f, feature_channels).

    f is `downsampling`.

    Attributes:
        width: channels of the first level.
        channel_mult: factors on `width`, one per level; each level after the first halves the map.
        blocks: number of residual blocks in each level.
        groups: number of groups in each group norm.
        feature_channels: channels of the features.
        attention: levels with attention after each block, -1 for the coarsest, in addition to the
            middle.
        format: dtype of the convolutions.
    """

    width: int
    channel_mult: Sequence[int]
    blocks: int
    groups: int
    feature_channels: int
    attention: Sequence[int] = COARSEST
    format: ConvFormat = ConvFormat()

    @nn.compact
    def __call__(self, image_BHWC: jax.Array) -> jax.Array:
        last = len(self.channel_mult) - 1
        x_BhwC = conv(self.width, self.format, "conv_in")(image_BHWC)
        for i, multiplier in enumerate(self.channel_mult):
            for j in range(self.blocks):
                x_BhwC = _residual(self, multiplier, f"down_{i}_block_{j}")(x_BhwC)
                if i - len(self.channel_mult) in self.attention:
                    x_BhwC = _attention(self, f"down_{i}_attn_{j}")(x_BhwC)
            if i < last:
                x_BhwC = Downsample(self.format, name=f"down_{i}_downsample")(x_BhwC)
        return _project(self, _middle(self, x_BhwC), self.feature_channels)


class Decoder(nn.Module):
    """Maps features (B, h, w, Z) to images (B, f·h, f·w, image_channels), not clipped.

    Attributes:
        width: channels of the encoder's first level, which is the last one here.
        channel_mult: factors on `width`, one per level, in the encoder's order.
        blocks: number of residual blocks in each level of the encoder; a level here has one more.
        groups: number of groups in each group norm.
        image_channels: number of image channels.
        attention: levels with attention, numbered as in the encoder: -1 is the coarsest, the first
            one here.
        format: dtype of the convolutions.
    """

    width: int
    channel_mult: Sequence[int]
    blocks: int
    groups: int
    image_channels: int
    attention: Sequence[int] = COARSEST
    format: ConvFormat = ConvFormat()

    @nn.compact
    def __call__(self, f_BhwZ: jax.Array) -> jax.Array:
        x_BhwC = conv(self.width * self.channel_mult[-1], self.format, "conv_in")(f_BhwZ)
        x_BhwC = _middle(self, x_BhwC)
        for i, multiplier in reversed(list(enumerate(self.channel_mult))):
            for j in range(self.blocks + 1):
                x_BhwC = _residual(self, multiplier, f"up_{i}_block_{j}")(x_BhwC)
                if i - len(self.channel_mult) in self.attention:
                    x_BhwC = _attention(self, f"up_{i}_attn_{j}")(x_BhwC)
            if i > 0:
                x_BhwC = Upsample(self.format, name=f"up_{i}_upsample")(x_BhwC)
        return _project(self, x_BhwC, self.image_channels)


def _residual(coder: Encoder | Decoder, multiplier: int, name: str) -> "ResidualBlock":
    return ResidualBlock(coder.width * multiplier, coder.groups, coder.format, name=name)


def _attention(coder: Encoder | Decoder, name: str) -> "SpatialAttention":
    return SpatialAttention(coder.groups, coder.format, name=name)


def _middle(coder: Encoder | Decoder, x_BhwC):
    """Block, attention, block at the lowest resolution."""
    x_BhwC = _residual(coder, coder.channel_mult[-1], "mid_block_1")(x_BhwC)
    x_BhwC = _attention(coder, "mid_attn_1")(x_BhwC)
    return _residual(coder, coder.channel_mult[-1], "mid_block_2")(x_BhwC)


def _project(coder: Encoder | Decoder, x_BhwC, channels: int):
    """The last layers: norm, swish, convolution."""
    x_BhwC = nn.silu(norm(coder.groups, coder.format, "norm_out")(x_BhwC))
    coder.sow("intermediates", "last", x_BhwC)  # for the gradient of the last kernel
    return conv(channels, coder.format, "conv_out")(x_BhwC)


class ResidualBlock(nn.Module):
    """Two pre-normalized 3×3 convolutions and a skip (1×1 where the width changes)."""

    width: int
    groups: int
    format: ConvFormat

    @nn.compact
    def __call__(self, x_BhwC):
        y_BhwC = nn.silu(norm(self.groups, self.format, "norm1")(x_BhwC))
        y_BhwC = conv(self.width, self.format, "conv1")(y_BhwC)
        y_BhwC = nn.silu(norm(self.groups, self.format, "norm2")(y_BhwC))
        y_BhwC = conv(self.width, self.format, "conv2")(y_BhwC)
        if x_BhwC.shape[-1] != self.width:
            x_BhwC = conv(self.width, self.format, "shortcut", size=1)(x_BhwC)
        return x_BhwC + y_BhwC


class SpatialAttention(nn.Module):
    """One head of attention over all positions of the map."""

    groups: int
    format: ConvFormat

    @nn.compact
    def __call__(self, x_BhwC):
        B, h, w, C = x_BhwC.shape
        y_BhwC = norm(self.groups, self.format, "norm")(x_BhwC)
        qkv_Bhw3C = conv(3 * C, self.format, "qkv", size=1)(y_BhwC)
        q_BLAD, k_BLAD, v_BLAD = jnp.split(qkv_Bhw3C.reshape(B, h * w, 1, 3 * C), 3, axis=-1)
        y_BhwC = dot_product_attention(q_BLAD, k_BLAD, v_BLAD, scale=C**-0.5).reshape(B, h, w, C)
        return x_BhwC + conv(C, self.format, "proj", size=1)(y_BhwC)


class Downsample(nn.Module):
    """Halves height and width with a strided convolution that pads below and right only."""

    format: ConvFormat

    @nn.compact
    def __call__(self, x_BhwC):
        padding = ((0, 1), (0, 1))
        return conv(x_BhwC.shape[-1], self.format, "conv", strides=2, padding=padding)(x_BhwC)


class Upsample(nn.Module):
    """Doubles height and width: nearest neighbor, then a convolution."""

    format: ConvFormat

    @nn.compact
    def __call__(self, x_BhwC):
        C = x_BhwC.shape[-1]
        if self.format.platform == "cpu":
            return conv(C, self.format, "conv", convolution=_upsample_and_convolve)(x_BhwC)
        B, h, w, _ = x_BhwC.shape
        # Both axes at once: by `repeat`, each would write an array of its own to memory.
        x_Bh2w2C = jnp.broadcast_to(x_BhwC[:, :, None, :, None], (B, h, 2, w, 2, C))
        return conv(C, self.format, "conv")(x_Bh2w2C.reshape(B, 2 * h, 2 * w, C))


def _upsample_and_convolve(x_BhwC, kernel_33CN, *_, **__):
    return upsample_and_convolve(x_BhwC, kernel_33CN)  # the rest are strides, padding and so on


def conv(
    features,
    format: ConvFormat,
    name=None,
    *,
    size=3,
    strides=1,
    padding: str | tuple = "SAME",
    convolution: Callable[..., jax.Array] | None = None,
) -> nn.Conv:
    """Makes a square convolution with PyTorch's default scale of initialization.

    convolution: function that takes the place of the format's `conv_general_dilated`.
    """
    return nn.Conv(
        features,
        (size, size),
        strides,
        padding,
        dtype=format.dtype,
        kernel_init=nn.initializers.variance_scaling(1 / 3, "fan_in", "uniform"),
        conv_general_dilated=convolution or format.convolution,
        name=name,
    )


def norm(groups, format: ConvFormat, name) -> Callable[[jax.Array], jax.Array]:
    """Makes a group norm, computed in float32."""
    # E[x²]-E[x]² needs one pass, which a TPU fuses with the convolution before it. It loses float32
    # digits that can change tokens. bfloat16, and products of such operands, lack them anyway.
    exact = jnp.dtype(format.dtype) == jnp.float32 and format.precision in ("highest", "tf32_3x")
    module = nn.GroupNorm(
        groups, epsilon=1e-6, dtype=jnp.float32, use_fast_variance=not exact, name=name
    )
    return lambda x_BhwC: module(x_BhwC.astype(jnp.float32)).astype(format.dtype)


def to_model_range(image_BHWC: jax.Array) -> jax.Array:
    """Maps images, uint8 or floats in [0, 1], to float32 in [-1, 1], as autoencoders take them."""
    if image_BHWC.dtype == jnp.uint8:
        return image_BHWC.astype(jnp.float32) / 127.5 - 1
    return image_BHWC.astype(jnp.float32) * 2 - 1


def to_unit_range(image_BHWC: jax.Array) -> jax.Array:
    """Maps images from [-1, 1] to [0, 1], as pictures are written and compared."""
    return (image_BHWC + 1) / 2


def check_sizes(width: int, channel_mult: Sequence[int], blocks: int, groups: int) -> None:
    """Raises InputError for sizes that no encoder and decoder can have."""
    levels = len(channel_mult)
    if levels > MAX_LEVELS or levels * blocks > MAX_BLOCKS:
        raise InputError(
            f"channel_mult of {levels} levels and blocks={blocks}; allowed are {MAX_LEVELS} levels "
            f"with {MAX_BLOCKS} blocks together"
        )
    for name, value in (("width", width), ("blocks", blocks), ("groups", groups)):
        check_setting(name, value, value >= 1, "1 or more")
    if not channel_mult or min(channel_mult) < 1:
        raise InputError(f"channel_mult={channel_mult}: give one per level, each 1 or more")
    if width % groups:
        raise InputError(f"width={width} is not a multiple of groups={groups}")


def check_attention(name: str, attention: Sequence[int], channel_mult: Sequence[int]) -> None:
    """Raises InputError unless `attention` names levels, each once, the finest first."""
    levels = len(channel_mult)
    fits = list(attention) == sorted(set(attention)) and all(-levels <= i < 0 for i in attention)
    allowed = f"levels from {-levels} (full resolution) to -1 (the coarsest), ascending, each once"
    check_setting(name, tuple(attention), fits, allowed)


def downsampling(channel_mult: Sequence[int]) -> int:
    """Returns the number of image pixels per feature along one side."""
    return 2 ** (len(channel_mult) - 1)


def map_images(
    function: Callable[[jax.Array], jax.Array],
    x: jax.Array,
    image_shape: tuple[int, int, int],
    compute: ComputeConfig,
) -> jax.Array:
    """Applies a function to a batch, piece by piece where that is better; not for training.

    Args:
        function: function of arrays with a leading batch axis, whose rows do not depend on each
            other.
        x: batch of images or features.
        image_shape: (H, W, channels) of the input or output images.
        compute: execution settings, which name the platform to compile for.
    """
    H, W, _ = image_shape
    if compute.loops_over_images and H * W >= PIXELS_OF_LARGE_IMAGES:
        # A CPU's convolutions of large images are 1.4 times faster one by one: docs/benchmarks.md.
        return jax.lax.map(lambda x: function(x[None])[0], x)
    pieces = _pieces(x.shape[0], batch_devices(), H * W)
    if pieces == 1:
        return function(x)
    y = jax.lax.map(function, split_batch(x, pieces)).swapaxes(0, 1)
    return y.reshape(-1, *y.shape[2:])


def decoding_bytes(batch: int, image_shape: tuple[int, int, int], width: int) -> int:
    """Estimates how much memory a decoder needs in addition to its weights, for one device's batch.

    Args:
        batch: number of images.
        image_shape: (H, W, channels) of an image.
        width: channels of the decoder at full resolution, where three float32 maps exist at once.
    """
    H, W, channels = image_shape
    at_once = batch // _pieces(batch, 1, H * W)
    return 4 * H * W * (3 * width * at_once + 2 * channels * batch)


def _pieces(rows: int, devices: int, pixels: int) -> int:
    """Returns into how many equal pieces a batch is cut, so that a device has few rows at once."""
    if pixels < PIXELS_OF_LARGE_IMAGES or not isinstance(rows, int):
        return 1  # an exported program may be for any number of rows
    for pieces in range(1, rows + 1):
        size = rows / pieces / devices
        if size.is_integer() and IMAGES_AT_ONCE // 2 <= size <= IMAGES_AT_ONCE:
            return pieces
    return 1  # few images on each device, or a number with no divisor that suits
