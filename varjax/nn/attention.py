"""Attention: one seam for its implementations, and the transformer's multi-head layer."""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn import compute

MAX_LOG_SCALE = float(np.log(100))


def dot_product_attention(
    q_BlAD: jax.Array,
    k_BLAD: jax.Array,
    v_BLAD: jax.Array,
    mask_lL: np.ndarray | None = None,
    *,
    scale: float,
    implementation: compute.Attention = "xla",
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

    Returns:
        (B, l, A, D) in the format of `v_BLAD`.
    """
    if implementation == "cudnn":
        mask = None if mask_lL is None else jnp.asarray(mask_lL)[None, None]
        return jax.nn.dot_product_attention(
            q_BlAD, k_BLAD, v_BLAD, mask=mask, scale=scale, implementation="cudnn"
        )
    if implementation == "loop":
        # Computing the (l, L) matrices again is cheaper here than to keep them for the gradient.
        image = jax.checkpoint(lambda x: _head_by_head(x[0], x[1], x[2], mask_lL, scale))
        return jax.lax.map(image, (q_BlAD, k_BLAD, v_BLAD))
    precision = compute.matmul_precision(q_BlAD.dtype)
    logits_BAlL = jnp.einsum(
        "BlAD,BLAD->BAlL",
        q_BlAD,
        k_BLAD,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    weights_BAlL = _softmax(logits_BAlL * scale, mask_lL).astype(v_BLAD.dtype)
    return jnp.einsum("BAlL,BLAD->BlAD", weights_BAlL, v_BLAD, precision=precision)


def _head_by_head(q_lAD, k_LAD, v_LAD, mask_lL, scale):
    """Attends in one image by plain matrix products, 4 times faster with XLA's CPU back end."""
    precision = compute.matmul_precision(q_lAD.dtype)
    heads = []
    for h in range(q_lAD.shape[1]):
        logits_lL = jnp.matmul(
            q_lAD[:, h], k_LAD[:, h].T, precision=precision, preferred_element_type=jnp.float32
        )
        weights_lL = _softmax(logits_lL * scale, mask_lL).astype(v_LAD.dtype)
        heads.append(jnp.matmul(weights_lL, v_LAD[:, h], precision=precision))
    return jnp.stack(heads, axis=1)


def _softmax(logits, mask_lL):
    """Softmax over the last axis of (…, l, L), as if what the mask excludes were not there."""
    if mask_lL is not None:
        lead = (None,) * (logits.ndim - 2)
        logits = jnp.where(mask_lL[lead], logits, -jnp.inf)
    return jax.nn.softmax(logits)


class MultiHeadAttention(nn.Module):
    """Self-attention of the l new tokens over everything in `past` and themselves.

    Queries and values have biases, keys have none, as in the reference.

    Attributes:
        heads: number of heads.
        cosine: whether q and k are L2-normalized and each head learns a temperature (at most 100);
            without it, the scale is 0.25/√D.
        dtype: format of the matrix products.
        implementation: see `Compute`.
        kernel_init: initializer of q, k and v.
        out_init: initializer of the output projection.
    """

    heads: int
    cosine: bool
    dtype: jnp.dtype
    implementation: compute.Attention
    kernel_init: nn.initializers.Initializer
    out_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BlC, past, mask_lL):
        """Returns (y_BlC, (k_BlAD, v_BlAD)). past: tuples of earlier keys and of values."""
        width = x_BlC.shape[-1]

        def project(name, use_bias):
            y_BlC = dense(width, self.dtype, self.kernel_init, name, use_bias=use_bias)(x_BlC)
            return einops.rearrange(y_BlC, "B l (A D) -> B l A D", A=self.heads)

        q_BlAD, k_BlAD, v_BlAD = project("q", True), project("k", False), project("v", True)
        if self.cosine:
            log_scale_A = self.param(
                "log_scale", nn.initializers.constant(np.log(4)), (self.heads,), jnp.float32
            )
            temperature_11A1 = jnp.exp(jnp.minimum(log_scale_A, MAX_LOG_SCALE))[None, None, :, None]
            q_BlAD = (l2_normalize(q_BlAD) * temperature_11A1).astype(self.dtype)
            k_BlAD = l2_normalize(k_BlAD).astype(self.dtype)
            scale = 1.0
        else:
            scale = 0.25 / (width // self.heads) ** 0.5
        keys, values = past
        k_BLAD = jnp.concatenate([*keys, k_BlAD], axis=1)
        v_BLAD = jnp.concatenate([*values, v_BlAD], axis=1)
        y_BlAD = dot_product_attention(
            q_BlAD, k_BLAD, v_BLAD, mask_lL, scale=scale, implementation=self.implementation
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
    return y.reshape(*x.shape[:-1], -1)
