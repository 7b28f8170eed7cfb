"""Attention: one function for all implementations, and the multi-head layer."""

import functools
from collections.abc import Callable
from typing import Any

import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn import compute
from varjax.nn.linear import dense
from varjax.nn.splash_attention import splash_attention, splash_fits
from varjax.nn.stack import KVCache, LayerCache

MAX_LOG_SCALE = float(np.log(100))
MIN_SEGMENT = 65  # queries for which separate matrix products are faster
MIN_FUSED_QUERIES = 64  # for which cuDNN's kernel is faster than two products
FAST_MEMORY = 2**25  # bytes of logits that fit into a TPU's on-chip memory
MAX_HEADS = 128  # on CPUs each is a part of the program; the official models have up to 30


@flax.struct.dataclass
class Dropout:
    """Sets a fraction of numbers to 0 and scales up the others (Srivastava et al. 2014).

    Each example has its own key, so that no batch size or mesh changes what is dropped.

        dropout = Dropout(key_B, rate=0.1)
        y_BlC = dropout.fold_in(layer)(x_BlC)

    Attributes:
        key_B: a random key for each example.
        rate: fraction to drop, rounded to a multiple of 2⁻¹⁶; 0 changes nothing.
    """

    key_B: jax.Array
    rate: float = flax.struct.field(pytree_node=False)

    def fold_in(self, number: int | jax.Array) -> "Dropout":
        """Returns the dropout of another layer, which draws other masks."""
        key_B = jax.vmap(jax.random.fold_in, (0, None))(self.key_B, number)
        return Dropout(key_B, self.rate)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Drops numbers of x, whose first axis is that of the keys."""
        return jax.vmap(_drop, (0, 0, None))(self.key_B, x, self.rate) if self.rate else x


def _drop(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Drops numbers of x with a single key."""
    # 16 random bits decide about a number; drawing 32 takes longer than attention's products.
    rows, dropped = -(-len(x) // 2), min(round(rate * 2**16), 2**16 - 1)
    bits = jax.random.bits(key, (rows, *x.shape[1:]), jnp.uint32)
    kept = jnp.concatenate([half >= dropped for half in (bits % 2**16, bits // 2**16)])[: len(x)]
    return jnp.where(kept, x / (1 - dropped / 2**16), 0)


def dot_product_attention(
    q_BlAD: jax.Array,
    k_BLAD: jax.Array,
    v_BLAD: jax.Array,
    mask_lL: np.ndarray | None = None,
    *,
    scale: float,
    implementation: compute.AttentionImpl = "xla",
    key_mask_BL: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Computes softmax(scale · q kᵀ) v, the softmax in float32.

    Args:
        q_BlAD: queries of l tokens.
        k_BLAD: keys of L tokens.
        v_BLAD: values of L tokens.
        mask_lL: True where a query may attend to a key; None for everywhere.
        scale: factor on the products of queries and keys.
        implementation: "xla", "loop", "cudnn" or "splash"; see `ComputeConfig`. "xla" replaces both
            fused kernels with dropout, in formats other than bfloat16, and where the devices do not
            divide images and heads; "cudnn" also for head sizes D above 128 or not a multiple of 8,
            and for fewer than 64 queries.
        key_mask_BL: True for keys of each example that may be attended to, at least one; None for
            all.
        dropout: dropout of the softmax weights; None for none.

    Returns:
        (B, l, A, D) in the format of `v_BLAD`.
    """
    if implementation == "splash" and (dropout is not None or not splash_fits(q_BlAD)):
        implementation = "xla"
    with jax.named_scope("attention"):  # its name in profiles and in `varjax benchmark tpu`
        if implementation == "splash":  # which itself skips what the mask excludes
            return splash_attention(q_BlAD, k_BLAD, v_BLAD, mask_lL, key_mask_BL, scale=scale)
        attend = functools.partial(_IMPLEMENTATIONS[implementation], dropout=dropout, scale=scale)
        if mask_lL is None or dropout is not None:  # which draws for the whole (l, L)
            return attend(q_BlAD, k_BLAD, v_BLAD, mask_lL, key_mask_BL)
        parts = []
        for rows, seen, mask in mask_segments(mask_lL):
            key_mask = None if key_mask_BL is None else key_mask_BL[:, :seen]
            q, k, v = q_BlAD[:, rows], k_BLAD[:, :seen], v_BLAD[:, :seen]
            parts.append(attend(q, k, v, mask, key_mask))
        return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _at_once(q_BlAD, k_BLAD, v_BLAD, mask_lL, key_mask_BL, *, dropout, scale):
    """Attends by two products for the whole batch."""
    precision = compute.matmul_precision(q_BlAD.dtype)
    logits_BAlL = jnp.einsum(
        "BlAD,BLAD->BAlL",
        q_BlAD,
        k_BLAD,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    mask_B1lL = _joint_mask(mask_lL, key_mask_BL, q_BlAD.shape[1])
    weights_BAlL = _softmax(logits_BAlL * scale, mask_B1lL)
    if dropout is not None:
        weights_BAlL = jax.vmap(_drop_by_head, (0, 0, None))(
            dropout.key_B, weights_BAlL, dropout.rate
        )
    weights_BAlL = weights_BAlL.astype(v_BLAD.dtype)
    return jnp.einsum("BAlL,BLAD->BlAD", weights_BAlL, v_BLAD, precision=precision)


def cudnn_fits(queries: int, D: int, dtype: jnp.dtype) -> bool:
    """Returns whether cuDNN's kernel takes heads of size D in this dtype, and pays."""
    return queries >= MIN_FUSED_QUERIES and dtype == jnp.bfloat16 and D % 8 == 0 and D <= 128


def _by_cudnn(q_BlAD, k_BLAD, v_BLAD, mask_lL, key_mask_BL, *, dropout, scale):
    """Attends by cuDNN's kernel, where it can and pays."""
    _, queries, _, D = q_BlAD.shape
    fits = cudnn_fits(queries, D, q_BlAD.dtype) and compute.divides_attention(q_BlAD)
    if dropout is not None or not fits:
        whole = q_BlAD, k_BLAD, v_BLAD, mask_lL, key_mask_BL
        return _at_once(*whole, dropout=dropout, scale=scale)
    attend = functools.partial(_by_cudnn_on_a_device, mask_lL=mask_lL, scale=scale)
    return compute.on_each_device(attend, q_BlAD, k_BLAD, v_BLAD, key_mask_BL)


def _by_cudnn_on_a_device(q_BlAD, k_BLAD, v_BLAD, key_mask_BL=None, *, mask_lL, scale):
    """Attends by cuDNN's kernel in the images and heads of one device."""
    (B, keys), queries = k_BLAD.shape[:2], q_BlAD.shape[1]
    mask_B1lL = _joint_mask(mask_lL, key_mask_BL, queries)
    lengths: dict[str, Any] = {}
    if queries % 2 or keys % 2:  # odd lengths have no gradient
        q_BlAD, k_BLAD, v_BLAD = (
            jnp.pad(x, ((0, 0), (0, x.shape[1] % 2), (0, 0), (0, 0)))
            for x in (q_BlAD, k_BLAD, v_BLAD)
        )
        if mask_B1lL is None:
            lengths = {
                "query_seq_lengths": jnp.full(B, queries, jnp.int32),
                "key_value_seq_lengths": jnp.full(B, keys, jnp.int32),
            }
        else:
            rows = (0, 0), (0, 0), (0, queries % 2), (0, 0)
            mask_B1lL = jnp.pad(mask_B1lL, rows, mode="edge")
            mask_B1lL = jnp.pad(mask_B1lL, ((0, 0), (0, 0), (0, 0), (0, keys % 2)))
    y_BlAD = jax.nn.dot_product_attention(
        q_BlAD,
        k_BLAD,
        v_BLAD,
        mask=mask_B1lL,
        scale=scale,
        implementation="cudnn",
        **lengths,
    )
    return y_BlAD[:, :queries]


def _image_by_image(q_BlAD, k_BLAD, v_BLAD, mask_lL, key_mask_BL, *, dropout, scale):
    """Attends in one image and head after another: plain products are faster on a CPU."""
    # Computing the (l, L) matrices again is cheaper here than to keep them for the gradient.
    key_B, rate = (None, 0.0) if dropout is None else (dropout.key_B, dropout.rate)
    head_by_head = functools.partial(_head_by_head, rate=rate, mask_lL=mask_lL, scale=scale)
    image = jax.checkpoint(lambda x: head_by_head(*x))
    return jax.lax.map(image, (q_BlAD, k_BLAD, v_BLAD, key_mask_BL, key_B))


_IMPLEMENTATIONS: dict[str, Callable[..., jax.Array]] = {
    "xla": _at_once,
    "cudnn": _by_cudnn,
    "loop": _image_by_image,
}


def cached_attention(
    q_BlAD: jax.Array,
    past: LayerCache,
    mask_lL: np.ndarray | None = None,
    *,
    scale: float,
    implementation: compute.AttentionImpl = "xla",
    key_mask_BL: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Attends to the keys and values of a cache; (B, l, A, D), as `dot_product_attention`.

    Args:
        q_BlAD: queries of l tokens.
        past: cache, which already holds the keys and values of these tokens.
        mask_lL: True where a query may attend to a key; None for everywhere.
        scale: factor on the products of queries and keys.
        implementation: an implementation of `dot_product_attention`, or "grouped": "xla" for as
            many images at a time as keep their logits in fast memory, with keys and values read
            from the cache without copying all of it.
        key_mask_BL: True for keys of each example that may be attended to, at least one; None for
            all.
        dropout: dropout of the softmax weights; None for none.
    """
    B, queries, heads, _ = q_BlAD.shape

    def attend(q_BlAD, number, count):
        k_BLAD, v_BLAD = (_split_heads(x, heads) for x in past.read(number * count, count))
        return dot_product_attention(
            q_BlAD,
            k_BLAD,
            v_BLAD,
            mask_lL,
            scale=scale,
            implementation="xla" if implementation == "grouped" else implementation,
            key_mask_BL=key_mask_BL,
            dropout=dropout,
        )

    images = max(1, FAST_MEMORY // (4 * heads * queries * past.stop))
    # On a mesh a loop over images would gather them.
    grouped = implementation == "grouped" and key_mask_BL is None and dropout is None
    if not grouped or images >= B or compute.batch_devices() > 1:
        return attend(q_BlAD, 0, B)
    while B % images:
        images -= 1
    groups = q_BlAD.reshape(B // images, images, *q_BlAD.shape[1:])
    numbered = jnp.arange(len(groups)), groups
    return jax.lax.map(lambda x: attend(x[1], x[0], images), numbered).reshape(q_BlAD.shape)


def block_causal_mask(level_L: np.ndarray) -> np.ndarray:
    """Makes the mask (L, L): token i attends to j (True) if j's level is not above i's."""
    return level_L[:, None] >= level_L[None, :]


def mask_segments(mask_lL: np.ndarray) -> list[tuple[slice, int, np.ndarray | None]]:
    """Cuts a mask into segments of queries that see as many of the first keys, and no others.

    With the block-causal mask of VAR these are the scales: each sees all tokens up to its own end.

    Returns:
        [(queries, number of keys, what they see of these: None for all)]. Neighbors with fewer than
        MIN_SEGMENT queries are one segment, which needs a mask.
    """
    length = mask_lL.shape[1]
    seen_l = np.where(mask_lL, np.arange(1, length + 1), 0).max(axis=1)
    starts = [0, *(np.flatnonzero(np.diff(seen_l)) + 1).tolist(), len(seen_l)]
    cuts: list[list[int]] = []  # [start, stop] of the queries
    for start, stop in zip(starts, starts[1:], strict=False):
        short = stop - start < MIN_SEGMENT
        if short and cuts and cuts[-1][2]:
            cuts[-1][1] = stop
        else:
            cuts.append([start, stop, int(short)])
    segments = []
    for start, stop, _ in cuts:
        seen = int(seen_l[start:stop].max())
        mask = mask_lL[start:stop, :seen]
        segments.append((slice(start, stop), seen, None if mask.all() else mask))
    return segments


def _head_by_head(q_lAD, k_LAD, v_LAD, key_mask_L, key, rate, mask_lL, scale):
    """Attends in one image by plain matrix products, 4 times faster with XLA's CPU back end."""
    precision = compute.matmul_precision(q_lAD.dtype)
    if key_mask_L is not None:
        mask_lL = key_mask_L[None] if mask_lL is None else mask_lL & key_mask_L[None]
    heads = []
    for h in range(q_lAD.shape[1]):
        logits_lL = jnp.matmul(
            q_lAD[:, h], k_LAD[:, h].T, precision=precision, preferred_element_type=jnp.float32
        )
        weights_lL = _softmax(logits_lL * scale, mask_lL)
        if rate:
            weights_lL = _drop(jax.random.fold_in(key, h), weights_lL, rate)
        weights_lL = weights_lL.astype(v_LAD.dtype)
        heads.append(jnp.matmul(weights_lL, v_LAD[:, h], precision=precision))
    return jnp.stack(heads, axis=1)


def _drop_by_head(key, weights_AlL, rate):
    """Drops weights of one image as `_head_by_head` does."""
    key_A = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(weights_AlL)))
    return jax.vmap(_drop, (0, 0, None))(key_A, weights_AlL, rate)


def _joint_mask(mask_lL, key_mask_BL, queries):
    """Joins both masks to one of shape (B or 1, 1, l, L); None where nothing is masked."""
    masks = [] if mask_lL is None else [jnp.asarray(mask_lL)[None, None]]
    if key_mask_BL is not None:
        B, L = key_mask_BL.shape
        masks.append(jnp.broadcast_to(key_mask_BL[:, None, None], (B, 1, queries, L)))
    return functools.reduce(jnp.logical_and, masks) if masks else None


def _softmax(logits, mask):
    """Computes the softmax over the last axis, with weight 0 for what the mask excludes."""
    return jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, -jnp.inf))


class MultiHeadAttention(nn.Module):
    """Self-attention of the l new tokens over everything in `past` and themselves.

    Attributes:
        heads: number of attention heads.
        scale: factor f in f·q·k/√D; None for L2-normalized q and k, with a temperature (at most
            100) that each head learns.
        key_bias: whether keys have a bias; queries and values always do.
        compute: dtype and implementation.
        kernel_init: initializer of q, k and v.
        out_init: initializer of the output projection.
    """

    heads: int
    scale: float | None
    key_bias: bool
    compute: compute.ComputeConfig
    kernel_init: nn.initializers.Initializer
    out_init: nn.initializers.Initializer

    @nn.compact
    def __call__(
        self,
        x_BlC: jax.Array,
        past: LayerCache | None = None,
        mask_lL: np.ndarray | None = None,
        key_mask_BL: jax.Array | None = None,
        dropout: Dropout | None = None,
    ) -> tuple[jax.Array, KVCache | None]:
        """Returns y (B, l, C), and the cache with the new tokens (None without `past`).

        past: earlier tokens; masks are over them and the new ones. The rest as in
            `dot_product_attention`.
        """
        width, dtype = x_BlC.shape[-1], self.compute.jax_dtype

        def project(name, use_bias):
            layer = dense(width, dtype, self.kernel_init, name, use_bias=use_bias)
            return _split_heads(layer(x_BlC), self.heads)

        q_BlAD, v_BlAD = project("q", True), project("v", True)
        k_BlAD = project("k", self.key_bias)
        if self.scale is None:
            log_scale_A = self.param(
                "log_scale", nn.initializers.constant(np.log(4)), (self.heads,), jnp.float32
            )
            temperature_11A1 = jnp.exp(jnp.minimum(log_scale_A, MAX_LOG_SCALE))[None, None, :, None]
            q_BlAD = (l2_normalize(q_BlAD) * temperature_11A1).astype(dtype)
            k_BlAD = l2_normalize(k_BlAD).astype(dtype)
            scale = 1.0
        else:
            scale = self.scale / (width // self.heads) ** 0.5
        options: dict[str, Any] = {
            "scale": scale,
            "implementation": self.compute.attention_implementation(cached=past is not None),
            "key_mask_BL": key_mask_BL,
            "dropout": dropout,
        }
        if past is None:
            y_BlAD = dot_product_attention(q_BlAD, k_BlAD, v_BlAD, mask_lL, **options)
        else:
            past = past.write(_join_heads(k_BlAD), _join_heads(v_BlAD))
            y_BlAD = cached_attention(q_BlAD, past, mask_lL, **options)
        cache = None if past is None else past.cache
        return dense(width, dtype, self.out_init, "proj")(_join_heads(y_BlAD)), cache


def _split_heads(x_BlC, heads):
    return einops.rearrange(x_BlC, "B l (A D) -> B l A D", A=heads)


def _join_heads(x_BlAD):
    return einops.rearrange(x_BlAD, "B l A D -> B l (A D)")


def l2_normalize(x_BlAD: jax.Array) -> jax.Array:
    """Computes x / max(|x|, 1e-12) over the last axis, in float32; its gradient at 0 is finite."""
    x_BlAD = x_BlAD.astype(jnp.float32)
    square_BlA1 = jnp.sum(jnp.square(x_BlAD), axis=-1, keepdims=True)
    return x_BlAD * jax.lax.rsqrt(jnp.maximum(square_BlA1, 1e-24))
