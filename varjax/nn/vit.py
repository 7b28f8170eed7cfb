"""A plain pre-norm transformer (ViT, Dosovitskiy et al. 2020), layers stacked and scanned."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn.attention import Dropout, MultiHeadAttention
from varjax.nn.compute import ComputeConfig
from varjax.nn.stack import KVCache, LayerCache, init_stack, run_stack
from varjax.nn.transformer import MLP
from varjax.trees import PyTree

EPSILON = 1e-6  # of every layer norm


class ViTBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)); x, norms and softmax are float32.

    Attributes:
        heads: number of attention heads.
        compute: number format and execution.
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
    """Draws parameters of `depth` blocks, stacked along a leading axis S."""
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
    """Runs stacked blocks.

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


def layer_norm(name: str | None = None, affine: bool = True) -> nn.LayerNorm:
    """Makes a layer norm that computes in float32 and gives float32.

    name: inside of @nn.compact; affine: whether it has a scale and a bias.
    """
    return nn.LayerNorm(
        epsilon=EPSILON,
        dtype=jnp.float32,
        use_fast_variance=False,
        use_scale=affine,
        use_bias=affine,
        name=name,
    )
