"""Sampling: K scales, each predicted at once, from labels and keys to tokens and images.

Zero-shot editing (VAR, section 5.3) is the same loop with the image's own tokens kept.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.core.errors import InputError
from varjax.nn import resize
from varjax.nn.autoencoder import to_unit_range
from varjax.nn.compute import Compute
from varjax.nn.transformer import Cache
from varjax.sampling.sampler import fold_in_each, option_field
from varjax.tokenizers.vq.model import VQConfig, decode_images, make_quantizer
from varjax.tokenizers.vq.pyramid import Pyramid
from varjax.var.model import VAR, VARConfig


@flax.struct.dataclass
class VAROptions:
    """Sampling options: how tokens are chosen.

    Numbers may change without a new compilation; `smooth` may not.

    Attributes:
        cfg: classifier-free guidance at the last scale, growing linearly from 0 at the first; 0
            turns it off.
        top_k: draw from so many likeliest codes; 0 for all, 1 is greedy.
        top_p: draw from the likeliest codes that together hold this probability; 0 for all.
        smooth: mix codes by a Gumbel softmax instead of drawing one. Pleasing pictures, but not for
            benchmarks (the reference's `more_smooth`).
    """

    cfg: float = option_field(1.5, "guidance at the last scale; 0 turns it off")
    top_k: int = option_field(900, "draw from the likeliest codes only; 0: from all")
    top_p: float = option_field(0.96, "draw from this much of the mass; 0: from all")
    smooth: bool = option_field(False, "mix codes: smoother pictures", static=True)

    def check(self) -> "VAROptions":
        """Returns the options in plain Python types, so that equal ones share a compilation.

        Raises InputError for a value out of range.
        """
        if self.top_k < 0 or self.top_k != int(self.top_k):
            raise InputError(f"top_k={self.top_k}: must be a whole number, 0 (off) or more")
        if not 0 <= self.top_p <= 1:
            raise InputError(f"top_p={self.top_p}: must lie in [0, 1]; 0 turns it off")
        if not 0 <= self.cfg < float("inf"):
            raise InputError(f"cfg={self.cfg}: must be a finite number, 0 (off) or more")
        return dataclasses.replace(
            self,
            cfg=float(self.cfg),
            top_k=int(self.top_k),
            top_p=float(self.top_p),
            smooth=bool(self.smooth),
        )


@flax.struct.dataclass
class KeptTokens:
    """Tokens that sampling must keep, for editing.

    Attributes:
        tokens_BL: the tokens of an image.
        keep_BL: True where they stand, False where new ones are drawn.
    """

    tokens_BL: jax.Array
    keep_BL: jax.Array


def keep_at_every_scale(pyramid: Pyramid, keep_Bhw: jax.Array | np.ndarray) -> jax.Array:
    """Resizes a mask of what to keep to every scale, as the reference does.

    Bilinear, then True where more than half is kept. A first scale of a single token is always
    kept.

    Args:
        pyramid: the scales.
        keep_Bhw: bool, over the finest token map.

    Returns:
        (B, L) bool.
    """
    weight_Bhw1 = jnp.asarray(keep_Bhw, jnp.float32)[..., None]
    keeps = []
    for shape in pyramid.shapes:
        keep = resize.bilinear(weight_Bhw1, shape).reshape(weight_Bhw1.shape[0], -1) > 0.5
        keeps.append(keep | (shape == (1, 1)))
    return jnp.concatenate(keeps, axis=1)


def sample_tokens(
    tokenizer: VQConfig,
    var: VARConfig,
    params,
    label_B: jax.Array,
    key_B: jax.Array,
    options: VAROptions,
    known: KeptTokens | None = None,
    compute: Compute = Compute(),  # noqa: B008  (frozen)
) -> tuple[jax.Array, jax.Array]:
    """Samples the tokens of all scales, coarse to fine (VAR, section 3.1).

    Args:
        tokenizer: config of the tokenizer, whose quantizer adds the scales up.
        var: config of the transformer.
        params: {"tokenizer": …, "var": …}.
        label_B: classes; `var.classes` means "no class".
        key_B: one key an image, see `image_keys`.
        options: how tokens are chosen.
        known: tokens to keep.
        compute: how the transformer is computed.

    Returns:
        Tokens (B, L) int32 and what their codes add up to, f_hat (B, h, w, Z). With
        `options.smooth`, f_hat is made of mixed codes and a token is the likeliest of its mixture.
    """
    pyramid = var.pyramid
    model = VAR(var, compute).bind({"params": params["var"]})
    quantizer = make_quantizer(tokenizer).bind({"params": params["tokenizer"]["quantizer"]})
    # Both streams of guidance as one batch. The second must run at the first scale, too, where
    # guidance is 0: it fills its cache.
    cond = model.condition(jnp.concatenate([label_B, jnp.full_like(label_B, var.classes)]))
    tokens, cache, input_2BlZ = [], Cache(), None
    f_hat_BhwZ = quantizer.initial_f_hat(label_B.shape[0])
    for k, scale in enumerate(pyramid.slices):
        logits_2BlV, cache = model.predict(input_2BlZ, cond, k, cache)
        logits_BlV = classifier_free_guidance(logits_2BlV, options.cfg * pyramid.progress(k))
        logits_BlV = filter_top_k_top_p(logits_BlV, options.top_k, options.top_p)
        key_B_k = fold_in_each(key_B, k)
        noise_BlV = gumbel_noise(key_B_k, logits_BlV)
        if options.smooth:
            weights_BlV = gumbel_softmax_weights(
                logits_BlV, gumbel_noise(key_B_k, logits_BlV), pyramid.progress(k)
            )
            tokens_Bl = jnp.argmax(weights_BlV, axis=-1)
            codes_BlZ = quantizer.mix_codes(weights_BlV)
        else:
            tokens_Bl = jnp.argmax(logits_BlV + noise_BlV, axis=-1)
            codes_BlZ = quantizer.look_up(tokens_Bl)
        if known is not None:
            keep_Bl, known_Bl = known.keep_BL[:, scale], known.tokens_BL[:, scale]
            tokens_Bl = jnp.where(keep_Bl, known_Bl, tokens_Bl)
            codes_BlZ = jnp.where(keep_Bl[..., None], quantizer.look_up(known_Bl), codes_BlZ)
        tokens.append(tokens_Bl.astype(jnp.int32))
        f_hat_BhwZ = quantizer.add_scale(f_hat_BhwZ, codes_BlZ, k)
        if k + 1 < len(pyramid):
            input_BlZ = quantizer.next_input(f_hat_BhwZ, k)
            input_2BlZ = jnp.concatenate([input_BlZ, input_BlZ])
    return jnp.concatenate(tokens, axis=1), f_hat_BhwZ


def sample_images(
    tokenizer: VQConfig,
    var: VARConfig,
    params,
    label_B: jax.Array,
    key_B: jax.Array,
    options: VAROptions,
    known: KeptTokens | None = None,
    compute: Compute = Compute(),  # noqa: B008  (frozen)
) -> jax.Array:
    """Samples tokens and decodes them in `compute.dtype`; meant to be jitted as a whole.

    Takes what `sample_tokens` takes; returns images (B, H, W, channels) float32 in [0, 1].
    """
    _, f_hat_BhwZ = sample_tokens(tokenizer, var, params, label_B, key_B, options, known, compute)
    image_BHWC = decode_images(tokenizer, params["tokenizer"], f_hat_BhwZ, compute)
    return to_unit_range(image_BHWC)


def classifier_free_guidance(logits_2BlV: jax.Array, t: float | jax.Array) -> jax.Array:
    """Guides by (1+t)·conditional - t·unconditional (Ho and Salimans 2022).

    Args:
        logits_2BlV: the conditional ones, then the unconditional ones.
        t: strength, 0 for none.
    """
    conditional_BlV, unconditional_BlV = jnp.split(logits_2BlV, 2)
    return (1 + t) * conditional_BlV - t * unconditional_BlV


def filter_top_k_top_p(
    logits_BlV: jax.Array, top_k: int | jax.Array, top_p: float | jax.Array
) -> jax.Array:
    """Sets logits outside of the top-k, and then outside of the top-p, to -inf.

    Args:
        logits_BlV: one row a token.
        top_k: codes to keep; ties with the k-th stay, too; 0 for all.
        top_p: drops the least likely codes that together hold at most 1-p, of equal ones the first;
            the best always stays (nucleus sampling, Holtzman et al. 2020); 0 for all.
    """
    V = logits_BlV.shape[-1]
    top_k = jnp.where((top_k == 0) | (top_k > V), V, top_k)
    order_BlV = _ordered(logits_BlV)
    kth_Bl1 = _largest(order_BlV, lambda t_Bl1: _sum(order_BlV >= t_Bl1) >= top_k)
    logits_BlV = jnp.where(order_BlV >= kth_Bl1, logits_BlV, -jnp.inf)

    share_BlV, rest = jax.nn.softmax(logits_BlV), 1 - top_p
    below = lambda t_Bl1: _sum(jnp.where(order_BlV < t_Bl1, share_BlV, 0))  # noqa: E731
    pth_Bl1 = _largest(order_BlV, lambda t_Bl1: below(t_Bl1) <= rest)
    # Codes as likely as the limit go one by one, for as long as the rest has room for them.
    equal_BlV = order_BlV == pth_Bl1
    rank_BlV = jnp.cumsum(equal_BlV.astype(jnp.float32), axis=-1)
    mass_BlV = below(pth_Bl1) + rank_BlV * share_BlV
    drop_BlV = equal_BlV & (mass_BlV <= rest) & (rank_BlV < rank_BlV[..., -1:])
    drop_BlV = (drop_BlV | (order_BlV < pth_Bl1)) & (top_p > 0)
    return jnp.where(drop_BlV, -jnp.inf, logits_BlV)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 is 0.0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _largest(order_BlV: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest t (B, l, 1), at most a row's greatest value, for which `holds`, bit by bit.

    `holds` must be true of 0 and, once false, stay so. 32 sums cost a tenth of a sort.
    """

    def add_bit(i, t_Bl1):
        more_Bl1 = t_Bl1 | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        return jnp.where(holds(more_Bl1), more_Bl1, t_Bl1)

    greatest_Bl1 = jnp.max(order_BlV, axis=-1, keepdims=True)
    t_Bl1 = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros_like(greatest_Bl1))
    return jnp.minimum(t_Bl1, greatest_Bl1)


def _sum(x_BlV):
    return jnp.sum(x_BlV, axis=-1, keepdims=True)


def gumbel_softmax_weights(
    logits_BlV: jax.Array, gumbel_BlV: jax.Array, progress: float
) -> jax.Array:
    """Returns the mixture over codes of `smooth`, sharper the finer the scale (progress 0 … 1)."""
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return jax.nn.softmax((logits_BlV * (1 + progress) + gumbel_BlV) / temperature)


def gumbel_noise(key_B: jax.Array, like_BlV: jax.Array) -> jax.Array:
    """Draws Gumbel noise (B, l, V), each image's by its own key.

    The argmax of logits and noise is a draw from the softmax of the logits.
    """
    return jax.vmap(lambda key: jax.random.gumbel(key, like_BlV.shape[1:]))(key_B)
