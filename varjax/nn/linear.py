"""Linear layers, with float32 parameters and products in the compute dtype."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from varjax.nn import compute


def dense(
    features: int,
    dtype: jnp.dtype,
    init: nn.initializers.Initializer,
    name: str | None,
    *,
    use_bias: bool = True,
) -> nn.Dense:
    """Makes a linear layer; its parameters are float32, its bias is 0 at first.

    Args:
        features: number of output features.
        dtype: dtype of the operands and the results.
        init: initializer of the kernel.
        name: name of the layer among the parameters; None for the attribute's name.
        use_bias: whether the layer has a bias.
    """
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        precision=compute.matmul_precision(dtype),
        kernel_init=init,
        name=name,
        dot_general=_matmul_over_one_axis,
    )


class OutputHead(nn.Module):
    """A linear layer whose results are float32, exact sums of products of `dtype`.

    Attributes:
        features: number of output features.
        dtype: dtype of the operands.
        kernel_init: initializer of the kernel; the bias starts at 0.
    """

    features: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BlC: jax.Array) -> jax.Array:
        """Returns (B, l, features) float32."""
        shape = x_BlC.shape[-1], self.features
        kernel = self.param("kernel", self.kernel_init, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape[1:], jnp.float32)
        y = _matmul_over_one_axis(
            x_BlC.astype(self.dtype),
            kernel.astype(self.dtype),
            None,
            precision=compute.matmul_precision(self.dtype),
            preferred_element_type=jnp.float32,
        )
        return y + jnp.broadcast_to(bias, y.shape)


def _matmul_over_one_axis(x, kernel, _, **options):
    """x @ kernel over one long axis: of two, the kernel's gradient is a third slower on a CPU."""
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])
