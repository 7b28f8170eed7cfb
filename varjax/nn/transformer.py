"""The blocks of pre-norm transformers, modulated by a condition (AdaLN) or plain; their memory."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn.attention import Dropout, MultiHeadAttention, cudnn_fits
from varjax.nn.compute import ComputeConfig
from varjax.nn.linear import dense
from varjax.nn.stack import KVCache, LayerCache, init_stack, run_stack
from varjax.trees import PyTree

MODULATIONS = 6  # gate1, gate2, scale1, scale2, shift1, shift2: the order of the reference
MLP_RATIO = 4
EPSILON = 1e-6  # of every layer norm


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
        compute: dtype and execution.
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


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x, norms and softmax are float32.

    Dosovitskiy et al. 2020 (ViT).

    Attributes:
        heads: number of attention heads.
        compute: dtype and execution.
    """

    heads: int
    compute: ComputeConfig

    def setup(self):
        dtype = self.compute.jax_dtype
        xavier = nn.initializers.xavier_uniform()
        # The reference draws q, k and v as one matrix of three times the width.
        qkv_init = nn.initializers.variance_scaling(0.5, "fan_avg", "uniform")
        self.norm1 = layer_norm()
        self.attn = MultiHeadAttention(self.heads, 1.0, True, self.compute, qkv_init, xavier)
        self.norm2 = layer_norm()
        self.mlp = MLP(dtype, xavier, xavier, tanh_gelu=False)

    def __call__(
        self,
        x_BlC,
        past: LayerCache | None = None,
        mask_lL=None,
        key_mask_BL=None,
        attention_dropout: Dropout | None = None,
        dropout: Dropout | None = None,
    ):
        """Returns (x_BlC, cache); the arguments are those of `run_vit_blocks`."""
        dtype = self.compute.jax_dtype
        h_BlC = self.norm1(x_BlC).astype(dtype)
        y_BlC, cache = self.attn(h_BlC, past, mask_lL, key_mask_BL, attention_dropout)
        if dropout is not None:
            y_BlC = dropout.fold_in(0)(y_BlC)
        x_BlC = x_BlC + y_BlC.astype(jnp.float32)
        h_BlC = self.norm2(x_BlC).astype(dtype)
        y_BlC = self.mlp(h_BlC, None if dropout is None else dropout.fold_in(1))
        return x_BlC + y_BlC.astype(jnp.float32), cache


def init_vit_blocks(block: ViTBlock, key: jax.Array, depth: int, width: int) -> PyTree:
    """Draws parameters of `depth` `ViTBlock`s, stacked along a leading axis S."""
    x_BlC = jnp.zeros((1, 1, width), jnp.float32)
    return init_stack(lambda key: block.init(key, x_BlC), key, depth)


def run_vit_blocks(
    block: ViTBlock,
    params: PyTree,
    x_BlC: jax.Array,
    *,
    mask_lL: np.ndarray | None = None,
    key_mask_BL: jax.Array | None = None,
    cache: KVCache | None = None,
    start: int | jax.Array = 0,
    attention_dropout: Dropout | None = None,
    dropout: Dropout | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Runs stacked `ViTBlock`s.

    Args:
        block: the module of one block.
        params: parameters of all blocks, stacked by `init_vit_blocks`.
        x_BlC: tokens to process, float32.
        mask_lL: True where a token may attend to another; None for all.
        key_mask_BL: True for tokens of each example that may be attended to; with a cache, over all
            its positions.
        cache: cache of earlier tokens, to which these are added.
        start: position of the first new token in the cache.
        attention_dropout: dropout of the attention weights; None for none.
        dropout: dropout of the outputs of attention and of each MLP layer; None for none.

    Returns:
        The tokens (B, l, C), and the cache with them (None without one).
    """
    number_S = jnp.arange(len(jax.tree.leaves(params)[0]))
    dropouts = {"attention_dropout": attention_dropout, "dropout": dropout}
    return run_stack(
        block,
        params,
        x_BlC,
        block.compute,
        cache=cache,
        start=start,
        by_layer={n: jax.vmap(d.fold_in)(number_S) for n, d in dropouts.items() if d is not None},
        mask_lL=mask_lL,
        key_mask_BL=key_mask_BL,
    )


class MLP(nn.Module):
    """Linear, GELU, linear.

    Attributes:
        dtype: dtype of the matrix products.
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


def layer_norm(name: str | None = None) -> nn.LayerNorm:
    """Makes a layer norm, with scale and bias, that computes in float32 and gives float32.

    name: inside of @nn.compact.
    """
    return nn.LayerNorm(epsilon=EPSILON, dtype=jnp.float32, use_fast_variance=False, name=name)


def cache_bytes(depth: int, width: int, rows: int, length: int, item: int) -> int:
    """Estimates the bytes of a key-value cache, and of the copy that one layer makes of its part.

    Args:
        depth: number of layers.
        width: total channels of all heads.
        rows: number of sequences.
        length: length of the sequences.
        item: bytes of a number.
    """
    return 2 * (depth + 1) * rows * length * width * item


def layer_bytes(
    width: int,
    heads: int,
    rows: int,
    tokens: int,
    length: int,
    compute: ComputeConfig,
    *,
    cached: bool,
    key_mask: bool = False,
) -> int:
    """Estimates the bytes that a layer computes at once.

    Args:
        width: channels of a token.
        heads: number of attention heads.
        rows: number of sequences.
        tokens: number of tokens of each that are processed.
        length: number of tokens of each that these attend to.
        compute: dtype and execution.
        cached: whether keys and values come from a cache.
        key_mask: whether each sequence has its own mask of the tokens that are attended to.
    """
    dtype, kind = compute.jax_dtype, compute.attention_implementation(cached)
    item = dtype.itemsize
    # Residual stream and norm in float32; q, k, v, and twice the MLP's inner width.
    token_bytes = width * (2 * 4 + 11 * item)
    fused = {
        "loop": True,
        "grouped": not key_mask,
        "cudnn": cudnn_fits(tokens, width // heads, dtype),
        "splash": dtype == jnp.bfloat16,
    }
    if not fused.get(kind, False):  # the attention matrix and its softmax
        token_bytes += heads * length * 2 * 4
    elif kind == "cudnn" and key_mask:  # JAX's call of the kernel makes it a bias for all queries
        token_bytes += length * item
    return rows * tokens * token_bytes


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
    normed_BlC = x_BlC * jax.lax.rsqrt(variance_Bl1 + EPSILON)
    return (normed_BlC * (1 + scale_B1C) + shift_B1C).astype(dtype)


def scaled_normal_init(std):
    """Makes a normal initializer with a standard deviation per column, or what else broadcasts."""

    def init(key, shape, dtype=jnp.float32):
        rows = np.broadcast_to(std, (*np.shape(std)[:-1], shape[-1]))
        if rows.shape != shape:  # not by NumPy, which makes an array as large as the parameter
            rows = jnp.broadcast_to(rows, shape)
        return rows * jax.random.normal(key, shape, dtype)

    return init
