"""The block of a pre-norm transformer whose norms are modulated by a condition (AdaLN)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn.attention import MultiHeadAttention
from varjax.nn.compute import ComputeConfig
from varjax.nn.linear import dense
from varjax.nn.stack import KVCache, LayerCache

MODULATIONS = 6  # gate1, gate2, scale1, scale2, shift1, shift2: the order of the reference
MLP_RATIO = 4


class Block(nn.Module):
    """x + gate1·attention(ln(x)·(1+scale1)+shift1), then the same around the MLP.

    Attributes:
        heads: number of attention heads.
        depth: number of blocks in the stack, which determines the initial size of the residual
            branches.
        cosine: whether queries and keys are L2-normalized; if not, their products get a quarter of
            the usual scale.
        shared_adaln: whether the AdaLN modulation is a learned (6, C) table plus a modulation that
            all blocks share, instead of the result of the block's own linear layer.
        init_std: standard deviation of all linear layers.
        gate_init: factor on `init_std` for the gates.
        compute: number format and execution.
    """

    heads: int
    depth: int
    cosine: bool
    shared_adaln: bool
    init_std: float
    gate_init: float
    compute: ComputeConfig

    def setup(self):
        dtype = self.compute.jax_dtype
        normal = nn.initializers.normal(self.init_std)
        # Residual branches add up over 2 S layers; this keeps their sum at the width of one.
        normal_out = nn.initializers.normal(self.init_std / (2 * self.depth) ** 0.5)
        self.adaln = AdaLN(self.shared_adaln, self.init_std, self.gate_init, dtype)
        self.attn = MultiHeadAttention(
            heads=self.heads,
            scale=None if self.cosine else 0.25,
            key_bias=False,
            compute=self.compute,
            kernel_init=normal,
            out_init=normal_out,
        )
        self.mlp = MLP(dtype, normal, normal_out)

    def modulation(self, cond) -> jax.Array:
        """Computes the block's AdaLN modulation (B, 6, C), which depends on no token.

        cond: (B, C), or with `shared_adaln` what the shared layer computes, (B, 6, C).
        """
        return self.adaln(cond)

    def __call__(
        self,
        x_BlC: jax.Array,
        past: LayerCache | None = None,
        *,
        cond: jax.Array | None = None,
        modulation_B6C: jax.Array | None = None,
        branch_scale_2B: jax.Array | None = None,
        mask_lL: np.ndarray | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Processes tokens.

        Args:
            x_BlC: tokens to process.
            past: earlier tokens, which these also attend to; None in training.
            cond: input of the AdaLN modulation; give it or `modulation_B6C`.
            modulation_B6C: AdaLN modulation, from `modulation`; give it or `cond`.
            branch_scale_2B: factors on the two residual branches; None for 1.
            mask_lL: True where a token may attend to another; None for all.

        Returns:
            The tokens (B, l, C), and the cache with them (None without `past`).
        """
        assert (cond is None) != (modulation_B6C is None)
        dtype = self.compute.jax_dtype
        if modulation_B6C is None:
            modulation_B6C = self.modulation(cond)
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(
            modulation_B6C, MODULATIONS, axis=1
        )
        if branch_scale_2B is not None:
            scale_2B11 = branch_scale_2B[:, :, None, None].astype(dtype)
            gate1, gate2 = gate1 * scale_2B11[0], gate2 * scale_2B11[1]
        y_BlC, cache = self.attn(modulate(x_BlC, scale1, shift1, dtype), past, mask_lL)
        x_BlC = x_BlC + (gate1 * y_BlC).astype(x_BlC.dtype)
        y_BlC = self.mlp(modulate(x_BlC, scale2, shift2, dtype))
        return x_BlC + (gate2 * y_BlC).astype(x_BlC.dtype), cache


class AdaLN(nn.Module):
    """Adaptive layer norm (Peebles and Xie 2022, DiT): computes a block's modulation."""

    shared: bool
    init_std: float
    gate_init: float
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, cond):
        width = cond.shape[-1]
        # Half the usual spread, and the gates nearly closed: a block starts close to the identity.
        factor_6 = np.array([self.gate_init] * 2 + [0.5] * 4, np.float32)
        if self.shared:
            init = scaled_normal_init(width**-0.5 * factor_6[:, None])
            table_6C = self.param("table", init, (MODULATIONS, width), jnp.float32)
            return table_6C[None].astype(self.dtype) + cond
        init = scaled_normal_init(self.init_std * np.repeat(factor_6, width))
        ada_BE = dense(MODULATIONS * width, self.dtype, init, "linear")(nn.silu(cond))
        return ada_BE.reshape(-1, MODULATIONS, width)


class MLP(nn.Module):
    """Linear, GELU, linear.

    Attributes:
        dtype: number format of the matrix products.
        kernel_init: initializer of the first layer.
        out_init: initializer of the second layer.
        tanh_gelu: whether GELU is approximated by tanh.
    """

    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer
    out_init: nn.initializers.Initializer
    tanh_gelu: bool = True

    @nn.compact
    def __call__(self, x_BlC, dropout=None):
        """dropout: dropout of both layers' results; None for none."""
        width = x_BlC.shape[-1]
        h_BlE = dense(MLP_RATIO * width, self.dtype, self.kernel_init, "up")(x_BlC)
        h_BlE = nn.gelu(h_BlE, approximate=self.tanh_gelu)
        if dropout is not None:
            h_BlE = dropout.fold_in(0)(h_BlE)
        y_BlC = dense(width, self.dtype, self.out_init, "down")(h_BlE)
        return y_BlC if dropout is None else dropout.fold_in(1)(y_BlC)


def drop_path(key: jax.Array, depth: int, batch: int, rate: float) -> jax.Array | None:
    """Draws which residual branches to drop (stochastic depth, Huang et al. 2016).

    Args:
        key: random key of the step.
        depth: number of layers S.
        batch: number of examples B.
        rate: fraction that the last layer drops; it rises linearly from 0 at the first.

    Returns:
        branch_scale_S2B: 0 or 1/(1-p) for each of an example's branches; None if `rate` is 0.
    """
    if rate == 0:
        return None
    keep_rate_S11 = 1 - np.linspace(0, rate, depth, dtype=np.float32)[:, None, None]
    kept_S2B = jax.random.bernoulli(key, keep_rate_S11, (depth, 2, batch))
    return kept_S2B.astype(jnp.float32) / keep_rate_S11


@jax.named_scope("modulate")  # its name in profiles and in `varjax benchmark tpu`
def modulate(x_BlC, scale_B1C, shift_B1C, dtype):
    """Applies LayerNorm without affine, then x·(1+scale)+shift; in float32, to give `dtype`."""
    x_BlC, scale_B1C, shift_B1C = (x.astype(jnp.float32) for x in (x_BlC, scale_B1C, shift_B1C))
    x_BlC = x_BlC - jnp.mean(x_BlC, axis=-1, keepdims=True)
    variance_Bl1 = jnp.mean(jnp.square(x_BlC), axis=-1, keepdims=True)
    normed_BlC = x_BlC * jax.lax.rsqrt(variance_Bl1 + 1e-6)
    return (normed_BlC * (1 + scale_B1C) + shift_B1C).astype(dtype)


def scaled_normal_init(std):
    """Makes a normal initializer with a standard deviation per column, or what else broadcasts."""

    def init(key, shape, dtype=jnp.float32):
        rows = np.broadcast_to(std, (*np.shape(std)[:-1], shape[-1]))
        if rows.shape != shape:  # not by NumPy, which makes an array as large as the parameter
            rows = jnp.broadcast_to(rows, shape)
        return rows * jax.random.normal(key, shape, dtype)

    return init
