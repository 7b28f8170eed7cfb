"""Attention: one seam for its implementations, and the transformer's multi-head layer."""

import functools

import einops
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn import compute

MAX_LOG_SCALE = float(np.log(100))
MAX_HEADS = 128  # on CPUs each is a part of the program; the official models have up to 30


@flax.struct.dataclass
class Dropout:
    """Sets a share of numbers to 0 and divides the others by what is left (Srivastava et al. 2014).

    Each example has a key of its own, so that no batch size or mesh changes what is dropped.

        dropout = Dropout(key_B, rate=0.1)
        y_BlC = dropout.fold_in(layer)(x_BlC)

    Attributes:
        key_B: a random key for each example.
        rate: the share; 0 leaves everything as it is.
    """

    key_B: jax.Array
    rate: float = flax.struct.field(pytree_node=False)

    def fold_in(self, number: int | jax.Array) -> "Dropout":
        """Returns the dropout of another place in the network, which draws other masks."""
        key_B = jax.vmap(jax.random.fold_in, (0, None))(self.key_B, number)
        return Dropout(key_B, self.rate)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Drops numbers of x, whose first axis is that of the keys."""
        return jax.vmap(_drop, (0, 0, None))(self.key_B, x, self.rate) if self.rate else x


def _drop(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Drops numbers of x with a single key."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)


def dot_product_attention(
    q_BlAD: jax.Array,
    k_BLAD: jax.Array,
    v_BLAD: jax.Array,
    mask_lL: np.ndarray | None = None,
    *,
    scale: float,
    implementation: compute.Attention = "xla",
    key_mask_BL: jax.Array | None = None,
    dropout: Dropout | None = None,
) -> jax.Array:
    """Computes softmax(scale · q kᵀ) v, the softmax in float32.

    Args:
        q_BlAD: queries.
        k_BLAD: keys.
        v_BLAD: values.
        mask_lL: where it is False nothing is seen; None for everything.
        scale: factor on the products of queries and keys.
        implementation: "xla", "loop" or "cudnn"; see `Compute`. "cudnn" needs bfloat16 and a head
            size D that is a multiple of 8; for a gradient with a mask, also even l and L.
        key_mask_BL: the keys of each example that may be seen, one at least; None for all.
        dropout: of the softmax's weights, which "cudnn" does not have; None for none.

    Returns:
        (B, l, A, D) in the format of `v_BLAD`.
    """
    if implementation == "cudnn":
        assert dropout is None
        mask_B1lL = _joint_mask(mask_lL, key_mask_BL, q_BlAD.shape[1])
        return jax.nn.dot_product_attention(
            q_BlAD, k_BLAD, v_BLAD, mask=mask_B1lL, scale=scale, implementation="cudnn"
        )
    if implementation == "loop":
        # Computing the (l, L) matrices again is cheaper here than to keep them for the gradient.
        key_B, rate = (None, 0.0) if dropout is None else (dropout.key_B, dropout.rate)
        head_by_head = functools.partial(_head_by_head, rate=rate, mask_lL=mask_lL, scale=scale)
        image = jax.checkpoint(lambda x: head_by_head(*x))
        return jax.lax.map(image, (q_BlAD, k_BLAD, v_BLAD, key_mask_BL, key_B))
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
    """Softmax over the last axis, as if what the mask excludes were not there."""
    return jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, -jnp.inf))


class MultiHeadAttention(nn.Module):
    """Self-attention of the l new tokens over everything in `past` and themselves.

    Attributes:
        heads: number of heads.
        scale: factor f in f·q·k/√D; None for q and k that are L2-normalized, with a temperature (at
            most 100) that each head learns.
        key_bias: whether keys have a bias, as queries and values always do.
        dtype: format of the matrix products.
        implementation: see `Compute`.
        kernel_init: initializer of q, k and v.
        out_init: initializer of the output projection.
    """

    heads: int
    scale: float | None
    key_bias: bool
    dtype: jnp.dtype
    implementation: compute.Attention
    kernel_init: nn.initializers.Initializer
    out_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BlC, past=((), ()), mask_lL=None, key_mask_BL=None, dropout=None):
        """Returns (y_BlC, (k_BlAD, v_BlAD)).

        past: tuples of earlier keys and of values; the rest as in `dot_product_attention`.
        """
        width = x_BlC.shape[-1]

        def project(name, use_bias):
            y_BlC = dense(width, self.dtype, self.kernel_init, name, use_bias=use_bias)(x_BlC)
            return einops.rearrange(y_BlC, "B l (A D) -> B l A D", A=self.heads)

        q_BlAD, v_BlAD = project("q", True), project("v", True)
        k_BlAD = project("k", self.key_bias)
        if self.scale is None:
            log_scale_A = self.param(
                "log_scale", nn.initializers.constant(np.log(4)), (self.heads,), jnp.float32
            )
            temperature_11A1 = jnp.exp(jnp.minimum(log_scale_A, MAX_LOG_SCALE))[None, None, :, None]
            q_BlAD = (l2_normalize(q_BlAD) * temperature_11A1).astype(self.dtype)
            k_BlAD = l2_normalize(k_BlAD).astype(self.dtype)
            scale = 1.0
        else:
            scale = self.scale / (width // self.heads) ** 0.5
        keys, values = past
        k_BLAD = jnp.concatenate([*keys, k_BlAD], axis=1)
        v_BLAD = jnp.concatenate([*values, v_BlAD], axis=1)
        y_BlAD = dot_product_attention(
            q_BlAD,
            k_BLAD,
            v_BLAD,
            mask_lL,
            scale=scale,
            implementation=self.implementation,
            key_mask_BL=key_mask_BL,
            dropout=dropout,
        )
        y_BlC = einops.rearrange(y_BlAD, "B l A D -> B l (A D)")
        return dense(width, self.dtype, self.out_init, "proj")(y_BlC), (k_BlAD, v_BlAD)


def l2_normalize(x_BlAD: jax.Array) -> jax.Array:
    """Computes x / max(|x|, 1e-12) over the last axis, in float32; its gradient at 0 is finite."""
    x_BlAD = x_BlAD.astype(jnp.float32)
    square_BlA1 = jnp.sum(jnp.square(x_BlAD), axis=-1, keepdims=True)
    return x_BlAD * jax.lax.rsqrt(jnp.maximum(square_BlA1, 1e-24))


def dense(features, dtype, init, name, *, use_bias=True) -> nn.Dense:
    """Makes a linear layer in `dtype` with float32 parameters and a zero bias."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        precision=compute.matmul_precision(dtype),
        kernel_init=init,
        name=name,
        dot_general=_flat,
    )


def _flat(x, kernel, _, **options):
    """x @ kernel over one long axis: of two, the kernel's gradient is a third slower on a CPU."""
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], kernel.shape[-1])
