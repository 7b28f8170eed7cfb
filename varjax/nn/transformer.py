"""A pre-norm transformer whose norms are modulated by a condition (AdaLN), layers stacked."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn.attention import MultiHeadAttention, dense
from varjax.nn.compute import Compute, spread_rows

SIGNALS = 6  # gate1, gate2, scale1, scale2, shift1, shift2: the order of the reference
MLP_RATIO = 4


@flax.struct.dataclass
class Cache:
    """Keys and values of the scales seen so far: one (N, B, l, H, D) array per scale, coarse first.

    One array a scale keeps every shape static, and what is there is never written again.
    """

    keys: tuple[jax.Array, ...] = ()
    values: tuple[jax.Array, ...] = ()


class Block(nn.Module):
    """x + gate1·attention(ln(x)·(1+scale1)+shift1), then the same around the MLP.

    depth: number of such blocks, over which the residual branches add up.
    shared_adaln: the signals are a learned (6, C) table plus signals that all blocks share, instead
        of a linear layer of the block's own.
    init_std, gate_init: standard deviation of all linear layers; factor on it for the gates.
    """

    heads: int
    depth: int
    cosine: bool
    shared_adaln: bool
    init_std: float
    gate_init: float
    compute: Compute

    def setup(self):
        dtype = self.compute.jax_dtype
        normal = nn.initializers.normal(self.init_std)
        # Residual branches add up over 2 N layers; this keeps their sum at the width of one.
        normal_out = nn.initializers.normal(self.init_std / (2 * self.depth) ** 0.5)
        self.adaln = AdaLN(self.shared_adaln, self.init_std, self.gate_init, dtype)
        self.attn = MultiHeadAttention(
            self.heads, self.cosine, dtype, self.compute.attention_here, normal, normal_out
        )
        self.mlp = MLP(dtype, normal, normal_out)

    def signals(self, cond):
        """The six AdaLN signals (B, 6, C) of this block; they depend on no token, so on no scale.

        cond: (B, C), or with `shared_adaln` the shared signals (B, 6, C).
        """
        return self.adaln(cond)

    def __call__(self, x_BlC, signals_B6C, past, mask_lL, keep_2B):
        """-> (x_BlC, (k_BlHD, v_BlHD)); keep_2B multiplies the two branches, None keeps both."""
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(signals_B6C, SIGNALS, axis=1)
        if keep_2B is not None:
            keep_2B11 = keep_2B[:, :, None, None].astype(x_BlC.dtype)
            gate1, gate2 = gate1 * keep_2B11[0], gate2 * keep_2B11[1]
        y_BlC, new = self.attn(modulate(x_BlC, scale1, shift1), past, mask_lL)
        x_BlC = x_BlC + gate1 * y_BlC
        y_BlC = self.mlp(modulate(x_BlC, scale2, shift2))
        return x_BlC + gate2 * y_BlC, new

    def touch(self, x_BlC, cond):
        """Runs everything once, so that `init` makes every parameter."""
        return self(x_BlC, self.signals(cond), ((), ()), None, None)


class AdaLN(nn.Module):
    """A condition's six signals for one block: see `Block`."""

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
            init = scaled_normal(width**-0.5 * factor_6[:, None])
            table_6C = self.param("table", init, (SIGNALS, width), jnp.float32)
            return table_6C[None].astype(self.dtype) + cond
        init = scaled_normal(self.init_std * np.repeat(factor_6, width))
        ada_BE = dense(SIGNALS * width, self.dtype, init, "linear")(nn.silu(cond))
        return ada_BE.reshape(-1, SIGNALS, width)


class MLP(nn.Module):
    """Linear, GELU (tanh), linear."""

    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer
    out_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BlC):
        width = x_BlC.shape[-1]
        h_BlE = nn.gelu(dense(MLP_RATIO * width, self.dtype, self.kernel_init, "up")(x_BlC))
        return dense(width, self.dtype, self.out_init, "down")(h_BlE)


def init_blocks(block: Block, key: jax.Array, cond: jax.Array):
    """Parameters of `block.depth` blocks, stacked along a leading axis N; cond gives the width."""
    x_BlC = jnp.zeros((1, 1, cond.shape[-1]), block.compute.jax_dtype)

    def init(key):
        return block.init(key, x_BlC, cond, method=Block.touch)["params"]

    return jax.vmap(init)(jax.random.split(key, block.depth))


def all_signals(block: Block, params, cond) -> jax.Array:
    """The signals of all layers, (N, B, 6, C): once per image instead of once per scale."""
    return jax.lax.map(lambda p: block.apply({"params": p}, cond, method=Block.signals), params)


def run_blocks(
    block: Block,
    params,
    x_BlC: jax.Array,
    *,
    cond: jax.Array | None = None,
    signals_NB6C: jax.Array | None = None,
    cache: Cache | None = None,
    mask_lL: np.ndarray | None = None,
    keep_N2B: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs the stacked blocks; the AdaLN signals are given, or made from `cond` layer by layer.

    With a `cache`, the l tokens also see all that is in it, and the result holds them as its last
    scale. In training no mask is needed for what is not there: give `mask_lL` and no cache.
    """
    assert (cond is None) != (signals_NB6C is None)

    def layer(x_BlC, scanned):
        p, signals_B6C, past, keep_2B = scanned
        x_BlC = spread_rows(x_BlC)
        if signals_B6C is None:
            signals_B6C = block.apply({"params": p}, cond, method=Block.signals)
        x_BlC, (k_BlHD, v_BlHD) = block.apply(
            {"params": p}, x_BlC, signals_B6C, past, mask_lL, keep_2B
        )
        # Without a cache nobody reads keys and values: do not stack them.
        return x_BlC, None if cache is None else (k_BlHD, v_BlHD)

    past = ((), ()) if cache is None else (cache.keys, cache.values)
    new: Any
    x_BlC, new = jax.lax.scan(
        _remat(layer, block.compute),
        x_BlC,
        (params, signals_NB6C, past, keep_N2B),
        unroll=block.depth if block.compute.unroll else 1,
    )
    if cache is None:
        return x_BlC, Cache()
    k_NBlHD, v_NBlHD = new
    return x_BlC, Cache((*cache.keys, k_NBlHD), (*cache.values, v_NBlHD))


def drop_path(key: jax.Array, depth: int, batch: int, rate: float) -> jax.Array | None:
    """keep_N2B of `run_blocks`: 0 or 1/(1-p) per example and branch, p rising linearly to rate."""
    if rate == 0:
        return None
    keep_N11 = 1 - np.linspace(0, rate, depth, dtype=np.float32)[:, None, None]
    kept_N2B = jax.random.bernoulli(key, keep_N11, (depth, 2, batch))
    return kept_N2B.astype(jnp.float32) / keep_N11


def modulate(x_BlC, scale_B1C, shift_B1C):
    """LayerNorm without affine (statistics in float32), then x·(1+scale)+shift."""
    x32_BlC = x_BlC.astype(jnp.float32)
    x32_BlC = x32_BlC - jnp.mean(x32_BlC, axis=-1, keepdims=True)
    variance_Bl1 = jnp.mean(jnp.square(x32_BlC), axis=-1, keepdims=True)
    normed_BlC = (x32_BlC * jax.lax.rsqrt(variance_Bl1 + 1e-6)).astype(x_BlC.dtype)
    return normed_BlC * (1 + scale_B1C) + shift_B1C


def scaled_normal(std):
    """A normal initializer with a standard deviation per column (or whatever broadcasts)."""

    def init(key, shape, dtype=jnp.float32):
        return np.broadcast_to(std, shape) * jax.random.normal(key, shape, dtype)

    return init


def _remat(layer, compute: Compute):
    if compute.remat == "none":
        return layer
    saved = jax.checkpoint_policies.dots_with_no_batch_dims_saveable
    return jax.checkpoint(layer, policy=saved if compute.remat == "dots" else None)
