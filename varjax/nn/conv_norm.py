"""A convolution with batch normalization by stored statistics, for inference."""

from collections.abc import Sequence

import flax.linen as nn
import jax


class ConvNorm(nn.Module):
    """Applies a convolution, batch normalization with stored statistics, and ReLU.

    Attributes:
        width: number of output channels.
        kernel: height and width of the kernel.
        stride: stride along both axes.
        padding: "SAME", "VALID", or pixels (before, after) along both axes; None for "SAME" with
            stride 1, else "VALID".
        epsilon: number added to the variance.
        relu: whether ReLU follows.
    """

    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str | Sequence[tuple[int, int]] | None = None
    epsilon: float = 1e-3
    relu: bool = True

    @nn.compact
    def __call__(self, x_BHWC: jax.Array) -> jax.Array:
        shape = *self.kernel, x_BHWC.shape[-1], self.width
        kernel = self.param("kernel", nn.initializers.he_normal(), shape)
        zeros, ones = nn.initializers.zeros, nn.initializers.ones
        scale_C, variance_C = (self.param(n, ones, self.width) for n in ("scale", "variance"))
        bias_C, mean_C = (self.param(n, zeros, self.width) for n in ("bias", "mean"))
        padding = self.padding or ("SAME" if self.stride == 1 else "VALID")
        unpadded = padding == "VALID"
        if unpadded:
            # Without padding, jax 0.10 takes up to three times as long on a CPU. The outputs that
            # see this row and column are dropped.
            padding = (0, 1), (0, 1)
        y_BHWC = jax.lax.conv_general_dilated(
            x_BHWC,
            kernel,
            (self.stride, self.stride),
            padding,
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",  # TF32 or bfloat16 change FID in its second digit
        )
        if unpadded:
            (_, H, W, _), (rows, columns) = x_BHWC.shape, self.kernel
            h, w = (H - rows) // self.stride + 1, (W - columns) // self.stride + 1
            y_BHWC = y_BHWC[:, :h, :w]
        factor_C = scale_C * jax.lax.rsqrt(variance_C + self.epsilon)
        y_BHWC = (y_BHWC - mean_C[None, None, None]) * factor_C[None, None, None]
        y_BHWC = y_BHWC + bias_C[None, None, None]
        return nn.relu(y_BHWC) if self.relu else y_BHWC
