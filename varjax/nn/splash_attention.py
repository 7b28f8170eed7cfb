"""Attention on TPUs by JAX's Pallas kernel, which never writes the (l, L) weights to memory."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn import compute

LANES = 128  # a block of the kernel has a multiple of as many tokens
MAX_BLOCK = 512  # tokens; JAX's own default is 128, which MaxText raises to 512


def splash_attention(
    q_BlAD: jax.Array,
    k_BLAD: jax.Array,
    v_BLAD: jax.Array,
    mask_lL: np.ndarray | None = None,
    key_mask_BL: jax.Array | None = None,
    *,
    scale: float,
) -> jax.Array:
    """Computes softmax(scale · q kᵀ) v block by block, as FlashAttention (Dao et al. 2022) does.

    Blocks that `mask_lL` excludes are skipped. On other platforms JAX interprets the kernel, which
    is slow and meant for tests.

    Args:
        q_BlAD: queries of l tokens.
        k_BLAD: keys of L tokens.
        v_BLAD: values of L tokens.
        mask_lL: True where a query may attend to a key; None for everywhere.
        key_mask_BL: True for keys of each example that may be attended to, at least one; None for
            all.
        scale: factor on the products of queries and keys.

    Returns:
        (B, l, A, D) in the format of `v_BLAD`.
    """
    attend = functools.partial(_attend, mask_lL=mask_lL, scale=scale)
    return compute.on_each_device(attend, q_BlAD, k_BLAD, v_BLAD, key_mask_BL)


def splash_fits(q_BlAD: jax.Array) -> bool:
    """Returns whether the kernel supports these queries.

    It needs bfloat16, and images and heads that can be divided among the devices.
    """
    return q_BlAD.dtype == jnp.bfloat16 and compute.divides_attention(q_BlAD)


def _attend(q_BlAD, k_BLAD, v_BLAD, key_mask_BL=None, *, mask_lL, scale):
    """Attends on one device."""
    # Imported here because it takes a third of a second.
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash

    (_, queries, heads, _), keys = q_BlAD.shape, k_BLAD.shape[1]
    rows, columns = _block(queries), _block(keys)
    mask = np.zeros((_whole_blocks(queries), _whole_blocks(keys)), bool)
    mask[:queries, :keys] = True if mask_lL is None else mask_lL
    mask[queries:, :keys] = True  # a query without keys would divide by 0
    mask_AlL = np.broadcast_to(mask, (heads, *mask.shape))  # a view: d36's copies are 190 MB
    sizes = splash.BlockSizes(
        block_q=rows,
        block_kv=columns,
        block_kv_compute=columns,
        block_q_dkv=rows,
        block_kv_dkv=columns,
        block_kv_dkv_compute=columns,
        # A separate kernel for dq: the fused one writes a partial dq for each block of keys.
        block_q_dq=rows,
        block_kv_dq=columns,
    )

    def by_kernel(q_BAlD, k_BALD, v_BALD, segments, interpret) -> Any:
        kernel = splash.make_splash_mha(
            mask_AlL, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret
        )
        return jax.vmap(kernel)(q_BAlD, k_BALD, v_BALD, segments)

    # The kernel does not scale, so queries are scaled first: exact if head sizes are powers of 4.
    arrays = [_padded(x.swapaxes(1, 2), axis=2) for x in (q_BlAD * scale, k_BLAD, v_BLAD)]
    segments = None
    if key_mask_BL is not None:  # queries attend to keys with the same number, here 1
        ones_Bl = jnp.ones((len(q_BlAD), _whole_blocks(queries)), jnp.int32)
        segments = splash.SegmentIds(ones_Bl, _padded(key_mask_BL.astype(jnp.int32), axis=1))
    y_BAlD = jax.lax.platform_dependent(
        *arrays,
        segments,
        tpu=functools.partial(by_kernel, interpret=False),
        default=functools.partial(by_kernel, interpret=True),
    )
    return y_BAlD[:, :, :queries].swapaxes(1, 2)


def _block(length):
    """Returns the block size in tokens: the largest of those with the least padding."""
    blocks = range(MAX_BLOCK, 0, -LANES)
    return min(blocks, key=lambda block: -(-length // block) * block)


def _whole_blocks(length):
    """Returns the number of tokens, rounded up to whole blocks."""
    return -(-length // _block(length)) * _block(length)


def _padded(x, axis):
    """Appends zeros to the axis of tokens, up to whole blocks."""
    missing = _whole_blocks(x.shape[axis]) - x.shape[axis]
    return jnp.pad(x, [(0, missing * (i == axis)) for i in range(x.ndim)])
