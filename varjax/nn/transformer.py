"""A pre-norm transformer whose norms are modulated by a condition (AdaLN), layers stacked."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn.attention import MultiHeadAttention
from varjax.nn.compute import ComputeConfig, checkpoint_layer, shard_batch
from varjax.nn.kv_cache import KVCache, LayerCache
from varjax.nn.linear import dense

SIGNALS = 6  # gate1, gate2, scale1, scale2, shift1, shift2: the order of the reference
MLP_RATIO = 4


class Block(nn.Module):
    """x + gate1·attention(ln(x)·(1+scale1)+shift1), then the same around the MLP.

    Attributes:
        heads: number of attention heads.
        depth: number of blocks in the stack, which determines the initial size of the residual
            branches.
        cosine: whether queries and keys are L2-normalized; if not, their products get a quarter of
            the usual scale.
        shared_adaln: whether the AdaLN signals are a learned (6, C) table plus signals shared by
            all blocks, instead of the block's linear layer.
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
            self.heads,
            None if self.cosine else 0.25,
            False,
            self.compute,
            normal,
            normal_out,
        )
        self.mlp = MLP(dtype, normal, normal_out)

    def signals(self, cond):
        """Computes the block's six AdaLN signals (B, 6, C), which depend on no token.

        cond: (B, C), or with `shared_adaln` the shared signals (B, 6, C).
        """
        return self.adaln(cond)

    def __call__(self, x_BlC, signals_B6C, past=None, mask_lL=None, keep_2B=None):
        """Returns (x_BlC, cache). keep_2B multiplies the branches; None keeps both."""
        dtype = self.compute.jax_dtype
        gate1, gate2, scale1, scale2, shift1, shift2 = jnp.split(signals_B6C, SIGNALS, axis=1)
        if keep_2B is not None:
            keep_2B11 = keep_2B[:, :, None, None].astype(dtype)
            gate1, gate2 = gate1 * keep_2B11[0], gate2 * keep_2B11[1]
        y_BlC, cache = self.attn(modulate(x_BlC, scale1, shift1, dtype), past, mask_lL)
        x_BlC = x_BlC + (gate1 * y_BlC).astype(x_BlC.dtype)
        y_BlC = self.mlp(modulate(x_BlC, scale2, shift2, dtype))
        return x_BlC + (gate2 * y_BlC).astype(x_BlC.dtype), cache

    def init_all(self, x_BlC, cond):
        """Runs everything once, so that `init` makes every parameter."""
        return self(x_BlC, self.signals(cond))


class AdaLN(nn.Module):
    """Adaptive layer norm (Peebles and Xie 2022, DiT): six signals of a condition for one block."""

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
            table_6C = self.param("table", init, (SIGNALS, width), jnp.float32)
            return table_6C[None].astype(self.dtype) + cond
        init = scaled_normal_init(self.init_std * np.repeat(factor_6, width))
        ada_BE = dense(SIGNALS * width, self.dtype, init, "linear")(nn.silu(cond))
        return ada_BE.reshape(-1, SIGNALS, width)


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
        """dropout: of what each of the two layers gives; None for none."""
        width = x_BlC.shape[-1]
        h_BlE = dense(MLP_RATIO * width, self.dtype, self.kernel_init, "up")(x_BlC)
        h_BlE = nn.gelu(h_BlE, approximate=self.tanh_gelu)
        if dropout is not None:
            h_BlE = dropout.fold_in(0)(h_BlE)
        y_BlC = dense(width, self.dtype, self.out_init, "down")(h_BlE)
        return y_BlC if dropout is None else dropout.fold_in(1)(y_BlC)


def init_blocks(block: Block, key: jax.Array, cond: jax.Array):
    """Draws parameters of `block.depth` blocks, stacked along a leading axis S; cond gives C."""
    x_BlC = jnp.zeros((1, 1, cond.shape[-1]), block.compute.jax_dtype)

    def init(key):
        return block.init(key, x_BlC, cond, method=Block.init_all)["params"]

    return jax.vmap(init)(jax.random.split(key, block.depth))


def adaln_signals(block: Block, params, cond) -> jax.Array:
    """Computes the signals of all layers, (S, B, 6, C): once per image, not once per scale."""
    return jax.lax.map(lambda p: block.apply({"params": p}, cond, method=Block.signals), params)


def run_blocks(
    block: Block,
    params,
    x_BlC: jax.Array,
    *,
    cond: jax.Array | None = None,
    signals_SB6C: jax.Array | None = None,
    cache: KVCache | None = None,
    start: int = 0,
    mask_lL: np.ndarray | None = None,
    keep_S2B: jax.Array | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Runs the stacked blocks.

    Args:
        block: the module of one block.
        params: parameters of all blocks, stacked.
        x_BlC: tokens to process.
        cond: input of the AdaLN signals, which are computed layer by layer; give it or
            `signals_SB6C`.
        signals_SB6C: AdaLN signals of all layers, from `adaln_signals`; give them or `cond`.
        cache: earlier tokens, which these also attend to; None in training.
        start: number of earlier tokens in the cache.
        mask_lL: True where a token may attend to another; None for all.
        keep_S2B: factors on the residual branches, from `drop_path`; None keeps every branch.

    Returns:
        The tokens (B, l, C), and the cache with them (None without one).
    """
    assert (cond is None) != (signals_SB6C is None)

    def layer(carry, scanned):
        x_BlC, cache = carry
        number, p, signals_B6C, keep_2B = scanned
        x_BlC = shard_batch(x_BlC)
        if signals_B6C is None:
            signals_B6C = block.apply({"params": p}, cond, method=Block.signals)
        past = None
        if cache is not None:
            past = LayerCache(cache, number, start, start + x_BlC.shape[1])
        return block.apply({"params": p}, x_BlC, signals_B6C, past, mask_lL, keep_2B), None

    depth = jax.tree.leaves(params)[0].shape[0]
    carry, _ = jax.lax.scan(
        checkpoint_layer(layer, block.compute),
        (x_BlC, cache),
        (jnp.arange(depth), params, signals_SB6C, keep_S2B),
        unroll=depth if block.compute.unroll else 1,
    )
    return carry


def drop_path(key: jax.Array, depth: int, batch: int, rate: float) -> jax.Array | None:
    """Draws which residual branches to drop (stochastic depth, Huang et al. 2016).

    Args:
        key: random key of the step.
        depth: number of layers S.
        batch: number of examples B.
        rate: fraction that the last layer drops; it rises linearly from 0 at the first.

    Returns:
        keep_S2B: 0 or 1/(1-p) per example and branch; None if `rate` is 0.
    """
    if rate == 0:
        return None
    keep_S11 = 1 - np.linspace(0, rate, depth, dtype=np.float32)[:, None, None]
    kept_S2B = jax.random.bernoulli(key, keep_S11, (depth, 2, batch))
    return kept_S2B.astype(jnp.float32) / keep_S11


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
