"""Discriminators: maps of logits, high where an image looks real.

Both are functions of one image and the parameters alone, without batch normalization and minibatch
statistics. With these, an image's logits would depend on the rest of the batch, and so on the mesh
and on accumulation, and BatchNorm's running averages would be extra state. Minibatch statistics
reveal a collapse onto few images, which cannot happen here: each reconstruction has an original.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from varjax.nn.compute import matmul_precision

CHANNELS_PER_NORM = 16  # channels that share a mean and a variance
STYLE_MIN_SIDE = 4  # pixels a side at which StyleDiscriminator stops halving


class PatchDiscriminator(nn.Module):
    """Maps images (B, H, W, channels) to logits (B, h, w), each of one patch (PatchGAN).

    A patch is 70 pixels a side with 3 `layers`. As in taming-transformers (Isola et al., arXiv
    1611.07004), with GroupNorm instead of BatchNorm.

    Attributes:
        width: channels of the first convolution, half a multiple of 16.
        layers: number of times that the image is halved.
        dtype: dtype of the convolutions; logits are float32.
    """

    width: int = 64
    layers: int = 3
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        x_BhwC = _leaky(self._conv(self.width, 2, "conv_0")(x_BHWC.astype(self.dtype)))
        for i in range(1, self.layers + 1):
            strides = 2 if i < self.layers else 1
            width = self.width * min(2**i, 8)
            x_BhwC = self._conv(width, strides, f"conv_{i}", bias=False)(x_BhwC)
            norm = nn.GroupNorm(None, CHANNELS_PER_NORM, dtype=self.dtype, name=f"norm_{i}")
            x_BhwC = _leaky(norm(x_BhwC))
        return self._conv(1, 1, "conv_out")(x_BhwC)[..., 0].astype(jnp.float32)

    def _conv(self, width, strides, name, bias=True):
        return _conv(width, 4, self.dtype, name, strides, bias, nn.initializers.normal(0.02))


class StyleDiscriminator(nn.Module):
    """Maps images (B, H, W, channels) to logits (B, 1, 1) by StyleGAN2's residual blocks.

    arXiv 1912.04958. Each block halves the image, blurred so that nothing aliases, until its
    shorter side is at most 4. Weights start at He's scale instead of being rescaled in every step.

    Attributes:
        width: channels of the first convolution.
        dtype: dtype of the convolutions; logits are float32.
    """

    width: int = 64
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        width, i = self.width, 0
        x_BhwC = _leaky(self._conv(width, 1, "conv_in")(x_BHWC.astype(self.dtype)))
        while min(x_BhwC.shape[1:3]) > STYLE_MIN_SIDE:
            y_BhwC = _leaky(self._conv(width, 3, f"block_{i}_conv1")(x_BhwC))
            width = min(2 * width, 8 * self.width)
            y_BhwC = _leaky(self._conv(width, 3, f"block_{i}_conv2")(blur_downsample(y_BhwC)))
            skip = self._conv(width, 1, f"block_{i}_skip", bias=False, gain=1.0)(
                blur_downsample(x_BhwC)
            )
            x_BhwC, i = (y_BhwC + skip) * 0.5**0.5, i + 1
        x_BhwC = _leaky(self._conv(width, 3, "conv_out")(x_BhwC))
        x_BC = x_BhwC.reshape(x_BhwC.shape[0], -1)
        x_BC = _leaky(self._dense(width, "dense")(x_BC))
        return self._dense(1, "logit", gain=1.0)(x_BC)[..., None].astype(jnp.float32)

    def _conv(self, width, size, name, bias=True, gain=2.0):
        return _conv(width, size, self.dtype, name, 1, bias, _scaled(gain))

    def _dense(self, width, name, gain=2.0):
        precision = matmul_precision(self.dtype)
        return nn.Dense(
            width, dtype=self.dtype, precision=precision, kernel_init=_scaled(gain), name=name
        )


def blur_downsample(x_BhwC: jax.Array) -> jax.Array:
    """Halves height and width, rounded down, after the binomial blur 1 3 3 1."""
    for axis in (1, 2):
        padding = [(1, 1) if a == axis else (0, 0) for a in range(4)]
        padded = jnp.pad(x_BhwC, padding, mode="edge")
        n = x_BhwC.shape[axis] // 2
        taps = [jax.lax.slice_in_dim(padded, k, k + 2 * n - 1, 2, axis) for k in range(4)]
        x_BhwC = (taps[0] + 3 * taps[1] + 3 * taps[2] + taps[3]) / 8
    return x_BhwC


def _conv(width, size, dtype, name, strides, bias, init):
    return nn.Conv(
        width,
        (size, size),
        strides,
        "SAME" if size % 2 else ((1, 1), (1, 1)),
        use_bias=bias,
        dtype=dtype,
        precision=matmul_precision(dtype),
        kernel_init=init,
        name=name,
    )


def _scaled(gain):
    return nn.initializers.variance_scaling(gain, "fan_in", "normal")


def _leaky(x_BhwC):
    return nn.leaky_relu(x_BhwC, 0.2)
