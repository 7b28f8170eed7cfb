"""Sampling: K scales, each predicted at once, from labels and keys to tokens and images.

Zero-shot editing (VAR, section 5.3) is the same loop with the image's own tokens kept.
"""

import dataclasses
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.config.numbers import (
    INT32_MAX,
    finite_number,
    true_or_false,
    whole_number,
)
from varjax.config.renamed import Renamed
from varjax.nn import resize
from varjax.nn.autoencoder import decoding_bytes, to_unit_range
from varjax.nn.compute import ComputeConfig
from varjax.sampling.guidance import checked_guidance, guide
from varjax.sampling.sampler import fold_in_each, option_field
from varjax.tokenizers.vq.model import VQConfig, decode_images, make_quantizer
from varjax.tokenizers.vq.pyramid import Pyramid
from varjax.tokenizers.vq.quantizer import Quantizer
from varjax.trees import PyTree
from varjax.var.model import VAR, VARConfig


@flax.struct.dataclass
class VAROptions:
    """Sampling options: how tokens are chosen.

    Numbers may change without a new compilation, but for guidance that is turned on or off;
    `smooth` may not.

    Attributes:
        guidance: scale s of classifier-free guidance at the last scale, u + s·(c - u), growing
            linearly from 1 at the first; 1 turns it off. The official `cfg` is s - 1.
        top_k: number of likeliest codes to draw from; 0 for all, 1 is greedy.
        top_p: total probability of the likeliest codes to draw from; 0 for all.
        smooth: whether to mix codes by a Gumbel softmax instead of drawing one. It gives smoother
            pictures, but must not be used for benchmarks (the reference's `more_smooth`).
    """

    guidance: float = option_field(
        2.5,
        "guidance scale at the last scale, growing from 1 at the first; 1 turns it off",
        renamed=Renamed("cfg", 1.0, ", for guidance is VAR's cfg + 1 (1 turns it off)"),
    )
    top_k: int = option_field(900, "number of likeliest codes to draw from; 0: all")
    top_p: float = option_field(0.96, "probability of the codes to draw from; 0: all")
    smooth: bool = option_field(False, "mix codes: smoother pictures", static=True)

    def check(self) -> "VAROptions":
        """Returns the options in plain Python types, so that equal ones share a compilation.

        Raises InputError for a value out of range.
        """
        codes = f"a whole number, 0 (off) … {INT32_MAX}"
        share = "in [0, 1]; 0 turns it off"
        return dataclasses.replace(
            self,
            guidance=checked_guidance(self.guidance),
            top_k=whole_number("top_k", self.top_k, 0, allowed=codes),
            top_p=finite_number("top_p", self.top_p, 0, 1, allowed=share),
            smooth=true_or_false("smooth", self.smooth),
        )


@flax.struct.dataclass
class KeptTokens:
    """Tokens that sampling must keep, for editing.

    Attributes:
        tokens_BL: the tokens of an image.
        keep_BL: True where tokens are kept, False where new ones are drawn.
    """

    tokens_BL: jax.Array
    keep_BL: jax.Array


def keep_at_every_scale(pyramid: Pyramid, keep_Bhw: jax.Array | np.ndarray) -> jax.Array:
    """Resizes a mask of what to keep to every scale, as the reference does.

    Bilinear, then True where more than half is kept. A first scale of a single token is always
    kept.

    Args:
        pyramid: the sizes of the scales.
        keep_Bhw: bool, True on the finest token map where tokens are kept.

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
    params: PyTree,
    label_B: jax.Array,
    key_B: jax.Array,
    options: VAROptions,
    known: KeptTokens | None = None,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
    guided: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Samples the tokens of all scales, coarse to fine (VAR, section 3.1).

    Args:
        tokenizer: config of the tokenizer, whose quantizer adds up the scales.
        var: config of the transformer.
        params: {"tokenizer": …, "var": …}.
        label_B: classes; `var.classes` means "no class".
        key_B: one key per image, see `image_keys`.
        options: how tokens are chosen.
        known: tokens to keep; None for whole images.
        compute: number format and execution of the transformer.
        guided: whether there is guidance; without it, `options.guidance` is not read and half as
            much is computed.

    Returns:
        Tokens (B, L) int32 and what their codes add up to, f_hat (B, h, w, Z). With
        `options.smooth`, f_hat is made of mixed codes and a token is the likeliest of its mixture.
    """
    pyramid = var.pyramid
    model = VAR(var, compute).bind({"params": params["var"]})
    quantizer = make_quantizer(tokenizer).bind({"params": params["tokenizer"]["quantizer"]})
    if guided:
        # Both streams of guidance as one batch. The second must run at the first scale, too, where
        # guidance is 1: it fills its cache.
        label_B = jnp.concatenate([label_B, jnp.full_like(label_B, var.classes)])
    cond, cache = model.condition(label_B), model.empty_cache(len(label_B))
    tokens, input_BlZ = [], None
    f_hat_BhwZ = quantizer.initial_f_hat(len(key_B))
    for k in range(len(pyramid)):
        logits_BlV, cache = model.predict(input_BlZ, cond, k, cache)
        tokens_Bl, codes_BlZ = choose_tokens(
            quantizer, logits_BlV, k, key_B, options, known, guided
        )
        tokens.append(tokens_Bl)
        f_hat_BhwZ = quantizer.add_scale(f_hat_BhwZ, codes_BlZ, k)
        if k + 1 < len(pyramid):
            input_BlZ = quantizer.next_input(f_hat_BhwZ, k)
            input_BlZ = jnp.concatenate([input_BlZ] * (2 if guided else 1))
    return jnp.concatenate(tokens, axis=1), f_hat_BhwZ


def choose_tokens(
    quantizer: Quantizer,
    logits_BlV: jax.Array,
    k: int,
    key_B: jax.Array,
    options: VAROptions,
    known: KeptTokens | None,
    guided: bool,
) -> tuple[jax.Array, jax.Array]:
    """Draws the tokens of a scale from its logits.

    Args:
        quantizer: quantizer bound to its parameters.
        logits_BlV: logits from `VAR.predict`; with guidance those of both streams, the conditional
            one first.
        k: index of the scale, from 0.
        key_B: one key per image.
        options: options that decide how tokens are chosen.
        known: tokens to keep; None for whole images.
        guided: whether there is guidance.

    Returns:
        Tokens (B, l) int32 and their codes (B, l, Z).
    """
    pyramid = quantizer.pyramid
    if guided:
        logits_BlV = guide(logits_BlV, 1 + (options.guidance - 1) * pyramid.progress(k))
    # An argmax hides NaN: so that the image shows it, the code of such a token is NaN.
    finite_Bl1 = jnp.all(jnp.isfinite(logits_BlV), axis=-1, keepdims=True)
    logits_BlV = filter_top_k_top_p(logits_BlV, options.top_k, options.top_p)
    noise_BlV = gumbel_noise(fold_in_each(key_B, k), logits_BlV)
    if options.smooth:
        weights_BlV = gumbel_softmax_weights(logits_BlV, noise_BlV, pyramid.progress(k))
        tokens_Bl = jnp.argmax(weights_BlV, axis=-1)
        codes_BlZ = quantizer.mix_codes(weights_BlV)
    else:
        tokens_Bl = jnp.argmax(logits_BlV + noise_BlV, axis=-1)
        codes_BlZ = quantizer.look_up(tokens_Bl)
    codes_BlZ = jnp.where(finite_Bl1, codes_BlZ, jnp.nan)
    if known is not None:
        scale = pyramid.slices[k]
        keep_Bl, known_Bl = known.keep_BL[:, scale], known.tokens_BL[:, scale]
        tokens_Bl = jnp.where(keep_Bl, known_Bl, tokens_Bl)
        codes_BlZ = jnp.where(keep_Bl[..., None], quantizer.look_up(known_Bl), codes_BlZ)
    return tokens_Bl.astype(jnp.int32), codes_BlZ


def sample_images(
    tokenizer: VQConfig,
    var: VARConfig,
    params: PyTree,
    label_B: jax.Array,
    key_B: jax.Array,
    options: VAROptions,
    known: KeptTokens | None = None,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
    guided: bool = True,
) -> jax.Array:
    """Samples tokens and decodes them in `compute.dtype`; meant to be jitted as a whole.

    Takes what `sample_tokens` takes; returns images (B, H, W, channels) float32 in [0, 1].
    """
    given = label_B, key_B, options, known, compute, guided
    _, f_hat_BhwZ = sample_tokens(tokenizer, var, params, *given)
    return to_unit_range(decode_images(tokenizer, params["tokenizer"], f_hat_BhwZ, compute))


@jax.named_scope("filters")  # its name in profiles and in `varjax benchmark tpu`
def filter_top_k_top_p(
    logits_BlV: jax.Array, top_k: int | jax.Array, top_p: float | jax.Array
) -> jax.Array:
    """Sets logits outside of the top-k, and then outside of the top-p, to -inf.

    Equal logits stay or go together.

    Args:
        logits_BlV: one row per token.
        top_k: number of codes to keep, plus any that equal the last of them; 0 for all.
        top_p: drops the least likely codes that together hold at most 1-p; the best always stays
            (nucleus sampling, Holtzman et al. 2020); 0 for all.
    """
    V = logits_BlV.shape[-1]
    top_k = jnp.where((top_k == 0) | (top_k > V), V, top_k)
    order_BlV = _ordered(logits_BlV)
    kth_Bl1 = _largest(order_BlV, lambda t_Bl1: _sum(order_BlV >= t_Bl1) >= top_k)
    logits_BlV = jnp.where(order_BlV >= kth_Bl1, logits_BlV, -jnp.inf)

    share_BlV, rest = jax.nn.softmax(logits_BlV), jnp.where(top_p > 0, 1 - top_p, -1.0)
    below = lambda t_Bl1: _sum(jnp.where(order_BlV < t_Bl1, share_BlV, 0))  # noqa: E731
    pth_Bl1 = _largest(order_BlV, lambda t_Bl1: below(t_Bl1) <= rest)
    return jnp.where(order_BlV < pth_Bl1, -jnp.inf, logits_BlV)


def _ordered(x: jax.Array) -> jax.Array:
    """float32 -> uint32 in the same order."""
    bits = jax.lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.uint32)  # -0.0 is 0.0
    sign = jnp.uint32(1 << 31)
    return jnp.where(bits & sign, ~bits, bits | sign)


def _largest(order_BlV: jax.Array, holds: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """The largest t (B, l, 1), at most a row's greatest value, for which `holds`, by two bits each.

    `holds` must, once false, stay so; where it is never true, t is 0. 16 passes over the numbers
    cost a fifth of a sort, and one pass with three sums less than two passes with one.
    """

    def add_bits(i, t_Bl1):
        step = jnp.uint32(1 << 30) >> (2 * i).astype(jnp.uint32)
        held_Bl1 = sum(holds(t_Bl1 + digit * step).astype(jnp.uint32) for digit in (1, 2, 3))
        return t_Bl1 + held_Bl1 * step

    greatest_Bl1 = jnp.max(order_BlV, axis=-1, keepdims=True)
    t_Bl1 = jax.lax.fori_loop(0, 16, add_bits, jnp.zeros_like(greatest_Bl1))
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


def var_sampling_bytes(
    tokenizer: VQConfig, var: VARConfig, batch: int, compute: ComputeConfig, guided: bool
) -> int:
    """Estimates how much memory a device needs, in addition to the weights, to sample a batch.

    It is that of the transformer at the last scale or that of the decoder, whichever is more.

    Args:
        tokenizer: config of the tokenizer.
        var: config of the transformer.
        batch: number of images on the device.
        compute: number format and execution of the transformer.
        guided: whether there is a second stream, for guidance.
    """
    rows, item = batch * (2 if guided else 1), compute.jax_dtype.itemsize
    L, l, C = var.pyramid.length, var.pyramid.lengths[-1], var.width  # noqa: E741
    cache = 2 * (var.depth + 1) * rows * L * C * item  # and what one layer reads of it
    # Residual stream and norm in float32; q, k, v, and twice the MLP's inner width.
    layer = rows * l * C * (2 * 4 + 11 * item)
    if compute.attention_implementation(cached=True) == "xla":  # its matrices and their softmax
        layer += rows * var.heads * l * L * 2 * 4
    # And, of the guided ones, those for the filters, noise, and a mixture of codes.
    logits = (rows + 3 * batch) * l * var.vocab * 4
    return max(
        cache + layer + logits, decoding_bytes(batch, tokenizer.image_shape, tokenizer.width)
    )
