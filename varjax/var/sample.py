"""Sampling: K scales, each predicted at once, from labels and keys to tokens and images.

Zero-shot editing (VAR, section 5.3) is the same loop with the image's own tokens kept.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.config.numbers import INT32_MAX, finite_number, true_or_false, whole_number
from varjax.config.renamed import Renamed
from varjax.nn import resize
from varjax.nn.autoencoder import to_unit_range
from varjax.nn.compute import ComputeConfig
from varjax.sampling.filters import filter_top_k_top_p
from varjax.sampling.guidance import checked_guidance, guide
from varjax.sampling.sampler import KnownTokens, option_field
from varjax.tokenizers.vq.model import VQConfig, bound_quantizer, decode_features
from varjax.tokenizers.vq.pyramid import Pyramid
from varjax.tokenizers.vq.quantizer import Quantizer
from varjax.trees import PyTree
from varjax.var.model import VAR, VARConfig

# (input (B, l, Z), scale k, cache) -> (logits (B, l, V), cache); no input and no cache at k = 0
PredictScale = Callable[[jax.Array | None, int, Any], tuple[jax.Array, Any]]
# (logits (B, l, V), scale k) -> (tokens (B, l), codes (B, l, Z))
ChooseTokens = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]


@flax.struct.dataclass
class VAROptions:
    """Sampling options: how tokens are chosen.

    New values need no new compilation, except for `smooth`, or if guidance is turned on or off.

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
    top_p: float = option_field(0.96, "total probability of the codes to draw from; 0: all")
    smooth: bool = option_field(False, "mix codes: smoother pictures", static=True)

    def check(self) -> "VAROptions":
        """Returns the options in plain Python types, so that equal options are compiled once.

        Raises InputError for a value out of range.
        """
        codes = f"a whole number, 0 (off) … {INT32_MAX}"
        fraction = "in [0, 1]; 0 turns it off"
        return dataclasses.replace(
            self,
            guidance=checked_guidance(self.guidance),
            top_k=whole_number("top_k", self.top_k, 0, allowed=codes),
            top_p=finite_number("top_p", self.top_p, 0, 1, allowed=fraction),
            smooth=true_or_false("smooth", self.smooth),
        )


def keep_at_every_scale(pyramid: Pyramid, keep_Bhw: jax.Array | np.ndarray) -> jax.Array:
    """Resizes a mask of what to keep to every scale, as the reference does.

    Bilinear, then True where more than half is kept. A first scale with a single token is always
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
    known: KnownTokens | None = None,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
    guided: bool = True,
) -> tuple[jax.Array, jax.Array]:
    """Samples the tokens of all scales with a VAR transformer.

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
    guidance = options.guidance if guided else None
    predict = bind_network(var, params["var"], label_B, guidance, compute)
    quantizer = bound_quantizer(tokenizer, params["tokenizer"])

    def choose(logits_BlV, k):
        return choose_tokens(quantizer, logits_BlV, k, key_B, options)

    return sample_scales(predict, choose, quantizer, len(key_B), known)


def sample_scales(
    predict: PredictScale,
    choose: ChooseTokens,
    quantizer: Quantizer,
    batch: int,
    known: KnownTokens | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Draws one scale after another, all tokens of a scale at once (VAR, section 3.1).

    Args:
        predict: network: (input (B, l, Z), scale k, cache) -> (logits (B, l, V), cache). At k = 0,
            input and cache are None.
        choose: choice of tokens: (logits (B, l, V), scale k) -> (tokens (B, l), codes (B, l, Z)).
        quantizer: quantizer bound to its parameters; it adds up the scales.
        batch: number of images B.
        known: tokens to keep; None for whole images.

    Returns:
        Tokens (B, L) int32 and what their codes add up to, f_hat (B, h, w, Z).
    """
    f_hat_BhwZ = quantizer.initial_f_hat(batch)
    tokens, input_BlZ, cache = [], None, None
    for k, scale in enumerate(quantizer.pyramid.slices):
        logits_BlV, cache = predict(input_BlZ, k, cache)
        token_Bl, code_BlZ = choose(logits_BlV, k)
        if known is not None:
            keep_Bl, known_Bl = known.keep_BL[:, scale], known.token_BL[:, scale]
            token_Bl = jnp.where(keep_Bl, known_Bl, token_Bl)
            code_BlZ = jnp.where(keep_Bl[..., None], quantizer.look_up(known_Bl), code_BlZ)
        tokens.append(token_Bl.astype(jnp.int32))
        f_hat_BhwZ = quantizer.add_scale(f_hat_BhwZ, code_BlZ, k)
        if k + 1 < len(quantizer.pyramid):
            input_BlZ = quantizer.next_input(f_hat_BhwZ, k)
    return jnp.concatenate(tokens, axis=1), f_hat_BhwZ


def bind_network(
    var: VARConfig,
    params: PyTree,
    label_B: jax.Array,
    guidance: float | jax.Array | None,
    compute: ComputeConfig,
) -> PredictScale:
    """Binds a VAR transformer to its classes: the network that `sample_scales` takes.

    Args:
        var: config of the transformer.
        params: parameters of the transformer.
        label_B: classes; `var.classes` means "no class".
        guidance: guidance scale of the last scale; it grows linearly from 1 at the first. None for
            no guidance.
        compute: number format and execution.
    """
    model = VAR(var, compute).bind({"params": params})
    if guidance is not None:
        # Both streams of guidance as one batch. The second must also run at the first scale, where
        # guidance is 1, to fill its cache.
        label_B = jnp.concatenate([label_B, jnp.full_like(label_B, var.classes)])
    cond = model.condition(label_B)

    def predict(input_BlZ, k, cache):
        if cache is None:
            cache = model.empty_cache(len(label_B))
        if guidance is None:
            return model.predict(input_BlZ, cond, k, cache)
        if input_BlZ is not None:
            input_BlZ = jnp.concatenate([input_BlZ, input_BlZ])
        logits_2BlV, cache = model.predict(input_BlZ, cond, k, cache)
        return guide(logits_2BlV, 1 + (guidance - 1) * var.pyramid.progress(k)), cache

    return predict


def choose_tokens(
    quantizer: Quantizer, logits_BlV: jax.Array, k: int, key_B: jax.Array, options: VAROptions
) -> tuple[jax.Array, jax.Array]:
    """Draws the tokens of a scale from its logits.

    Args:
        quantizer: quantizer bound to its parameters.
        logits_BlV: logits of the scale, guided.
        k: index of the scale, from 0.
        key_B: one key per image.
        options: options that decide how tokens are chosen.

    Returns:
        Tokens (B, l) int32 and their codes (B, l, Z).
    """
    # An argmax hides NaN, so the code of such a token becomes NaN, which the image then shows.
    finite_Bl1 = jnp.all(jnp.isfinite(logits_BlV), axis=-1, keepdims=True)
    logits_BlV = filter_top_k_top_p(logits_BlV, options.top_k, options.top_p)
    scale_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, k)
    noise_BlV = gumbel_noise(scale_key_B, logits_BlV)
    if options.smooth:
        weights_BlV = gumbel_softmax_weights(logits_BlV, noise_BlV, quantizer.pyramid.progress(k))
        token_Bl = jnp.argmax(weights_BlV, axis=-1)
        code_BlZ = quantizer.mix_codes(weights_BlV)
    else:
        token_Bl = jnp.argmax(logits_BlV + noise_BlV, axis=-1)
        code_BlZ = quantizer.look_up(token_Bl)
    return token_Bl.astype(jnp.int32), jnp.where(finite_Bl1, code_BlZ, jnp.nan)


def sample_images(
    tokenizer: VQConfig,
    var: VARConfig,
    params: PyTree,
    label_B: jax.Array,
    key_B: jax.Array,
    options: VAROptions,
    known: KnownTokens | None = None,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
    guided: bool = True,
) -> jax.Array:
    """Samples tokens and decodes them in `compute.dtype`; meant to be jitted as a whole.

    Takes what `sample_tokens` takes; returns images (B, H, W, channels) float32 in [0, 1].
    """
    _, f_hat_BhwZ = sample_tokens(
        tokenizer, var, params, label_B, key_B, options, known, compute, guided
    )
    return to_unit_range(decode_features(tokenizer, params["tokenizer"], f_hat_BhwZ, compute))


def gumbel_softmax_weights(
    logits_BlV: jax.Array, gumbel_BlV: jax.Array, progress: float
) -> jax.Array:
    """Returns the mixture over codes of `smooth`, sharper the finer the scale (progress 0 … 1)."""
    temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
    return jax.nn.softmax((logits_BlV * (1 + progress) + gumbel_BlV) / temperature)


def gumbel_noise(key_B: jax.Array, like_BlV: jax.Array) -> jax.Array:
    """Draws Gumbel noise (B, l, V), for each image from its key.

    The argmax of logits and noise is a draw from the softmax of the logits.
    """
    return jax.vmap(lambda key: jax.random.gumbel(key, like_BlV.shape[1:]))(key_B)
