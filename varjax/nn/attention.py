"""Attention: one seam for its implementations, and the transformer's multi-head layer."""

import einops
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn import compute

MAX_LOG_SCALE = float(np.log(100))


def attend(
    q_BlHD: jax.Array,
    k_BLHD: jax.Array,
    v_BLHD: jax.Array,
    mask_lL: np.ndarray | None = None,
    *,
    scale: float,
    implementation: compute.Attention = "xla",
) -> jax.Array:
    """softmax(scale · q kᵀ) v over L, softmax in float32; where `mask_lL` is False nothing is seen.

    "cudnn" wants bfloat16 and a head size D that is a multiple of 8; for a gradient with a mask,
    also even l and L.
    """
    if implementation == "cudnn":
        mask = None if mask_lL is None else jnp.asarray(mask_lL)[None, None]
        return jax.nn.dot_product_attention(
            q_BlHD, k_BLHD, v_BLHD, mask=mask, scale=scale, implementation="cudnn"
        )
    if implementation == "loop":
        # Computing the (l, L) matrices again is cheaper here than to keep them for the gradient.
        image = jax.checkpoint(lambda x: _head_by_head(x[0], x[1], x[2], mask_lL, scale))
        return jax.lax.map(image, (q_BlHD, k_BLHD, v_BLHD))
    precision = compute.precision_of(q_BlHD.dtype)
    logits_BHlL = jnp.einsum(
        "BlHD,BLHD->BHlL",
        q_BlHD,
        k_BLHD,
        precision=precision,
        preferred_element_type=jnp.float32,
    )
    weights_BHlL = _softmax(logits_BHlL * scale, mask_lL).astype(v_BLHD.dtype)
    return jnp.einsum("BHlL,BLHD->BlHD", weights_BHlL, v_BLHD, precision=precision)


def _head_by_head(q_lHD, k_LHD, v_LHD, mask_lL, scale):
    """One image as plain matrix products, which XLA's CPU back end runs 4 times faster."""
    precision = compute.precision_of(q_lHD.dtype)
    heads = []
    for h in range(q_lHD.shape[1]):
        logits_lL = jnp.matmul(
            q_lHD[:, h], k_LHD[:, h].T, precision=precision, preferred_element_type=jnp.float32
        )
        weights_lL = _softmax(logits_lL * scale, mask_lL).astype(v_LHD.dtype)
        heads.append(jnp.matmul(weights_lL, v_LHD[:, h], precision=precision))
    return jnp.stack(heads, axis=1)


def _softmax(logits, mask_lL):
    """Over the last axis of (…, l, L), as if what the mask excludes were not there."""
    if mask_lL is not None:
        lead = (None,) * (logits.ndim - 2)
        logits = jnp.where(mask_lL[lead], logits, -jnp.inf)
    return jax.nn.softmax(logits)


class MultiHeadAttention(nn.Module):
    """Self-attention of the l new tokens over everything in `past` and themselves.

    With `cosine`, q and k are L2-normalized and each head learns a temperature (at most 100);
    without it, the scale is 0.25/√D, as in the reference. q and v have biases, k has none.
    """

    heads: int
    cosine: bool
    dtype: jnp.dtype
    implementation: compute.Attention
    kernel_init: nn.initializers.Initializer
    out_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BlC, past, mask_lL):
        """-> (y_BlC, (k_BlHD, v_BlHD)); past: (keys, values), tuples of earlier (B, l', H, D)."""
        width = x_BlC.shape[-1]

        def project(name, use_bias):
            y_BlC = dense(width, self.dtype, self.kernel_init, name, use_bias=use_bias)(x_BlC)
            return einops.rearrange(y_BlC, "B l (H D) -> B l H D", H=self.heads)

        q_BlHD, k_BlHD, v_BlHD = project("q", True), project("k", False), project("v", True)
        if self.cosine:
            log_scale_H = self.param(
                "log_scale", nn.initializers.constant(np.log(4)), (self.heads,), jnp.float32
            )
            temperature_11H1 = jnp.exp(jnp.minimum(log_scale_H, MAX_LOG_SCALE))[None, None, :, None]
            q_BlHD = (unit(q_BlHD) * temperature_11H1).astype(self.dtype)
            k_BlHD = unit(k_BlHD).astype(self.dtype)
            scale = 1.0
        else:
            scale = 0.25 / (width // self.heads) ** 0.5
        keys, values = past
        k_BLHD = jnp.concatenate([*keys, k_BlHD], axis=1)
        v_BLHD = jnp.concatenate([*values, v_BlHD], axis=1)
        y_BlHD = attend(
            q_BlHD, k_BLHD, v_BLHD, mask_lL, scale=scale, implementation=self.implementation
        )
        y_BlC = einops.rearrange(y_BlHD, "B l H D -> B l (H D)")
        return dense(width, self.dtype, self.out_init, "proj")(y_BlC), (k_BlHD, v_BlHD)


def unit(x_BlHD: jax.Array) -> jax.Array:
    """x / max(|x|, 1e-12) over the last axis, in float32; its gradient at 0 is finite."""
    x_BlHD = x_BlHD.astype(jnp.float32)
    square_BlH1 = jnp.sum(jnp.square(x_BlHD), axis=-1, keepdims=True)
    return x_BlHD * jax.lax.rsqrt(jnp.maximum(square_BlH1, 1e-24))


def dense(features, dtype, init, name, *, use_bias=True) -> nn.Dense:
    """A linear layer in `dtype` with float32 parameters and a zero bias."""
    return nn.Dense(
        features,
        use_bias=use_bias,
        dtype=dtype,
        precision=compute.precision_of(dtype),
        kernel_init=init,
        name=name,
        dot_general=_flat,
    )


def _flat(x, kernel, _, **options):
    """x @ kernel over one long axis: of two, the kernel's gradient is a third slower on a CPU."""
    y = jax.lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return y.reshape(*x.shape[:-1], -1)
