"""Sampling: K scales, each predicted at once, from labels and keys to tokens and images.

Zero-shot editing (VAR, section 5.3) is the same loop with the image's own tokens kept.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.config.numbers import (
    FLOAT32_MAX,
    INT32_MAX,
    OneOrEach,
    finite_number,
    number_or_list,
    true_or_false,
    whole_number,
)
from varjax.config.renamed import Renamed
from varjax.errors import InputError
from varjax.nn.autoencoder import to_unit_range
from varjax.nn.compute import ComputeConfig
from varjax.sampling.filters import filter_top_k_top_p
from varjax.sampling.guidance import (
    check_guided_range,
    checked_guidance_options,
    guidance_scales,
    guided_interval,
)
from varjax.sampling.sampler import KnownTokens, SendImages, option_field, replace_options
from varjax.tokenizers.vq.model import (
    bound_quantizer,
    decode_every_scale,
    decode_features,
)
from varjax.tokenizers.vq.pyramid import Pyramid
from varjax.tokenizers.vq.quantizer import Quantizer
from varjax.trees import PyTree
from varjax.var.kept_scales import keep_at_every_scale
from varjax.var.model import VAR
from varjax.var.network import PredictScale, VARModels, sampling_network

# (logits (B, l, V), scale k) -> (tokens (B, l), codes (B, l, Z))
ChooseTokens = Callable[[jax.Array, int], tuple[jax.Array, jax.Array]]
# (scale k, f_hat (B, h, w, Z) after it) -> f_hat that the next scales are drawn from
OnScale = Callable[[int, jax.Array], jax.Array]
# A user's own rule: (logits (B, l, V), scale k, keys (B,) of the scale) -> tokens (B, l)
VARRule = Callable[[jax.Array, int, jax.Array], jax.Array]


@flax.struct.dataclass
class VAROptions:
    """Sampling options: how tokens are chosen.

        options = varjax.VAROptions(guidance=2.5, top_k=900, top_p=0.96)

    Guidance, top_k, top_p and temperature are one number, or a list with one per scale.

    New numbers do not cause recompilation. These do: `smooth`, a schedule, an interval, a list
    instead of a number, and another scale at which guidance ends.

    Attributes:
        guidance: maximum scale s of classifier-free guidance, u + s·(c - u); 1 turns it off. The
            official `cfg` is s - 1.
        top_k: number of most likely codes to draw from; 0 for all, 1 is greedy.
        top_p: total probability of the most likely codes to draw from; 0 for all.
        smooth: whether to mix codes by a Gumbel softmax instead of drawing one (the reference's
            `more_smooth`). Images look smoother, but do not use it for benchmarks.
        guidance_schedule: how guidance depends on the scale: "linear" grows from 1 at the first
            scale to s at the last, "constant" is s, and "power_cosine:P" is RAR's; see
            `varjax.sampling.guidance.schedule_fractions`. A list replaces it.
        guidance_from: first scale with guidance, counted from 0.
        guidance_to: end of the half-open range of scales with guidance; 0 for no end.
        temperature: factor on the noise of each draw, which divides the logits that are left after
            top_k and top_p (as in CoDe, arXiv 2411.17787); 0 is greedy.
    """

    guidance: OneOrEach[float] = option_field(
        2.5,
        "maximum guidance scale, or one for each scale; 1 turns it off",
        renamed=Renamed("cfg", 1.0, ", for guidance is VAR's cfg + 1 (1 turns it off)"),
        limits=(1, FLOAT32_MAX),
        slider=(1, 10, 0.1),
    )
    top_k: OneOrEach[int] = option_field(
        900,
        "number of most likely codes to draw from; 0: all",
        limits=(0, INT32_MAX),
        slider=(0, 4096, 1),
    )
    top_p: OneOrEach[float] = option_field(
        0.96,
        "total probability of the codes to draw from; 0: all",
        limits=(0, 1),
        slider=(0, 1, 0.01),
    )
    smooth: bool = option_field(False, "mix codes: smoother pictures", static=True)
    guidance_schedule: str = option_field(
        "linear", "linear grows from 1 at the first scale; constant; power_cosine:P", static=True
    )
    guidance_from: int = option_field(0, "first scale with guidance, from 0", static=True)
    guidance_to: int = option_field(
        0, "end of the half-open range of scales with guidance; 0: no end", static=True
    )
    temperature: OneOrEach[float] = option_field(
        1.0,
        "temperature of the codes left by top_k and top_p",
        limits=(0, FLOAT32_MAX),
        slider=(0, 2, 0.05),
    )

    def check(self, scales: int | None = None) -> "VAROptions":
        """Returns the options in plain Python types, so that equal options are compiled once.

        Args:
            scales: number of scales; None if it is not known, and then not checked.

        Raises:
            InputError: a value out of range, a list without one number per scale, or an interval
                without guidance.
        """
        codes = f"a whole number, 0 (off) … {INT32_MAX}"
        fraction = "in [0, 1]; 0 turns it off"
        checks: dict[str, Callable[[str, Any], Any]] = {
            "top_k": lambda name, value: whole_number(name, value, 0, allowed=codes),
            "top_p": lambda name, value: finite_number(name, value, 0, 1, allowed=fraction),
            "temperature": lambda name, value: finite_number(name, value, 0),
        }
        numbers = {
            name: number_or_list(name, getattr(self, name), check, scales)
            for name, check in checks.items()
        }
        checked = dataclasses.replace(
            self,
            **checked_guidance_options(self, scales),
            **numbers,
            smooth=true_or_false("smooth", self.smooth),
        )
        if scales is not None:
            check_guided_range(checked, guidance_ramp(scales))
        return checked

    def draw_settings(self, k: int) -> tuple[Any, Any, Any]:
        """Returns top_k, top_p and temperature of scale k."""
        settings = self.top_k, self.top_p, self.temperature
        top_k, top_p, temperature = (x[k] if isinstance(x, tuple) else x for x in settings)
        return top_k, top_p, temperature


def guidance_ramp(scales: int) -> np.ndarray:
    """Returns VAR's ramp of guidance (K,): linear from 0 at the first scale to 1 at the last."""
    return np.arange(scales) / max(scales - 1, 1)


def guided_scales(pyramid: Pyramid, options: VAROptions) -> int:
    """Returns the number of scales, from the first, up to the last one with guidance.

    All of them need the second stream: its cache also holds the scales before guidance starts.
    """
    return guided_interval(options, guidance_ramp(len(pyramid)))[1]


def sample_tokens(
    models: VARModels,
    params: PyTree,
    label_B: jax.Array,
    key_B: jax.Array,
    options: VAROptions,
    known: KnownTokens | None = None,
    *,
    guided: int | None = None,
    choose: VARRule | None = None,
    on_scale: OnScale = lambda k, f_hat_BhwZ: f_hat_BhwZ,
) -> tuple[jax.Array, list[jax.Array]]:
    """Samples the tokens of all scales with a VAR transformer.

        draw = jax.jit(functools.partial(sample_tokens, VARModels(tokenizer, var)))
        token_BL, f_hats = draw(params, label_B, image_keys(0, range(4)), VAROptions())

    Args:
        models: the transformer, those that help it, and the tokenizer, whose quantizer adds up the
            scales.
        params: {"tokenizer": …, "var": …}, and "guide" and "refiner" if there are any.
        label_B: classes; `var.classes` means "no class".
        key_B: one key per image, see `image_keys`.
        options: how tokens are chosen.
        known: tokens to keep; None for whole images.
        guided: number of scales, from the first, that are computed with guidance, from
            `guided_scales`; the others need half as much work. None for all.
        choose: rule that chooses tokens; None for a draw as `options` say.
        on_scale: function that is called after each scale; see `sample_scales`.

    Returns:
        Tokens (B, L) int32, and what their codes add up to after each scale, K f_hats
        (B, h, w, Z). With `options.smooth`, f_hats are made of mixed codes and a token is the
        most likely of its mixture.
    """
    scale_K = guidance_scales(options, guidance_ramp(len(models.var.pyramid)))
    network = sampling_network(models, params, label_B, scale_K, guided)
    quantizer = bound_quantizer(models.tokenizer, params["tokenizer"])

    def choose_at(logits_BlV, k):
        return choose_tokens(quantizer, logits_BlV, k, key_B, options, choose)

    return sample_scales(network, choose_at, quantizer, key_B.shape[0], known, on_scale)


def sample_scales(
    predict: PredictScale,
    choose: ChooseTokens,
    quantizer: Quantizer,
    batch: int,
    known: KnownTokens | None = None,
    on_scale: OnScale = lambda k, f_hat_BhwZ: f_hat_BhwZ,
) -> tuple[jax.Array, list[jax.Array]]:
    """Draws one scale after another, all tokens of a scale at once (VAR, section 3.1).

    Args:
        predict: network: (input (B, l, Z), scale k, cache) -> (logits (B, l, V), cache). At k = 0,
            input and cache are None.
        choose: choice of tokens: (logits (B, l, V), scale k) -> (tokens (B, l), codes (B, l, Z)).
        quantizer: quantizer bound to its parameters; it adds up the scales.
        batch: number of images B.
        known: tokens to keep; None for whole images.
        on_scale: function that is called after each scale, with what the codes add up to so far,
            and returns it.

    Returns:
        Tokens (B, L) int32, and what their codes add up to after each scale, K f_hats
        (B, h, w, Z).
    """
    f_hat_BhwZ = quantizer.initial_f_hat(batch)
    tokens, f_hats, input_BlZ, cache = [], [], None, None
    for k, scale in enumerate(quantizer.pyramid.slices):
        logits_BlV, cache = predict(input_BlZ, k, cache)
        token_Bl, code_BlZ = choose(logits_BlV, k)
        if known is not None:
            keep_Bl, known_Bl = known.keep_BL[:, scale], known.token_BL[:, scale]
            token_Bl = jnp.where(keep_Bl, known_Bl, token_Bl)
            code_BlZ = jnp.where(keep_Bl[..., None], quantizer.look_up(known_Bl), code_BlZ)
        tokens.append(token_Bl.astype(jnp.int32))
        f_hat_BhwZ = on_scale(k, quantizer.add_scale(f_hat_BhwZ, code_BlZ, k))
        f_hats.append(f_hat_BhwZ)
        if k + 1 < len(quantizer.pyramid):
            input_BlZ = quantizer.next_input(f_hat_BhwZ, k)
    return jnp.concatenate(tokens, axis=1), f_hats


def choose_tokens(
    quantizer: Quantizer,
    logits_BlV: jax.Array,
    k: int,
    key_B: jax.Array,
    options: VAROptions,
    choose: VARRule | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Chooses the tokens of a scale from its logits.

    Args:
        quantizer: quantizer bound to its parameters.
        logits_BlV: logits of the scale, guided.
        k: index of the scale, from 0.
        key_B: one key per image.
        options: options that decide how tokens are chosen.
        choose: rule that chooses tokens; None for a draw as `options` say.

    Returns:
        Tokens (B, l) int32 and their codes (B, l, Z).

    Raises:
        InputError: `choose` returns an array of another shape.
    """
    # An argmax hides NaN, so the code of such a token becomes NaN, which the image then shows.
    finite_Bl1 = jnp.all(jnp.isfinite(logits_BlV), axis=-1, keepdims=True)
    scale_key_B = jax.vmap(jax.random.fold_in, (0, None))(key_B, k)
    if choose is not None:
        token_Bl = jnp.asarray(choose(logits_BlV, k, scale_key_B))
        if token_Bl.shape != logits_BlV.shape[:2]:
            raise InputError(
                f"choose returned tokens of shape {token_Bl.shape} at scale {k}; needed is (B, l) "
                f"= {logits_BlV.shape[:2]}"
            )
        code_BlZ = quantizer.look_up(token_Bl)
        return token_Bl.astype(jnp.int32), jnp.where(finite_Bl1, code_BlZ, jnp.nan)
    top_k, top_p, temperature = options.draw_settings(k)
    logits_BlV = filter_top_k_top_p(logits_BlV, top_k, top_p)
    noise_BlV = temperature * gumbel_noise(scale_key_B, logits_BlV)
    if options.smooth:
        weights_BlV = gumbel_softmax_weights(logits_BlV, noise_BlV, quantizer.pyramid.progress(k))
        token_Bl = jnp.argmax(weights_BlV, axis=-1)
        code_BlZ = quantizer.mix_codes(weights_BlV)
    else:
        token_Bl = jnp.argmax(logits_BlV + noise_BlV, axis=-1)
        code_BlZ = quantizer.look_up(token_Bl)
    return token_Bl.astype(jnp.int32), jnp.where(finite_Bl1, code_BlZ, jnp.nan)


def sample_images(
    models: VARModels,
    params: PyTree,
    label_B: jax.Array,
    key_B: jax.Array,
    options: VAROptions,
    known: KnownTokens | None = None,
    *,
    guided: int | None = None,
    choose: VARRule | None = None,
    every_step: bool = False,
    send: SendImages | None = None,
) -> jax.Array:
    """Samples tokens and decodes them in `compute.dtype`; meant to be jitted as a whole.

    Takes what `sample_tokens` takes. Returns images (B, H, W, channels) float32 in [0, 1], or with
    `every_step` those after each scale, (B, K, H, W, channels). `send` gets the images after each
    scale except the last while the later ones are drawn.
    """
    tokenizer, compute = models.tokenizer, models.compute

    def decode(f_hat_BhwZ):
        return to_unit_range(decode_features(tokenizer, params["tokenizer"], f_hat_BhwZ, compute))

    def on_scale(k, f_hat_BhwZ):
        if send is None or k + 1 == len(models.var.pyramid):
            return f_hat_BhwZ
        return send(decode(f_hat_BhwZ), f_hat_BhwZ)

    _, f_hats = sample_tokens(
        models,
        params,
        label_B,
        key_B,
        options,
        known,
        guided=guided,
        choose=choose,
        on_scale=on_scale,
    )
    if every_step:
        images_KBHWC = decode_every_scale(tokenizer, params["tokenizer"], f_hats, compute)
        return to_unit_range(jnp.moveaxis(images_KBHWC, 0, 1))
    return decode(f_hats[-1])


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


@dataclasses.dataclass(frozen=True)
class VARFunctions:
    """VAR's functions of its parameters, `model.params`; JAX may transform each of them.

        key_B = varjax.image_keys(0, range(2))
        images_BHWC = jax.jit(model.pure.sample)(model.params, jnp.array([3, 1]), key_B)

    Arguments are arrays that are not checked: labels (B,) int32 below `classes`, or `classes` for
    "no class", and tokens (B, L) int32. Results are those of the model's methods of these names.

    Attributes:
        models: configs of the models, and how they are computed.
        sampling: default sampling options.
    """

    models: VARModels
    sampling: VAROptions = VAROptions()

    def encode(self, params: PyTree, image_BHWC: jax.Array) -> jax.Array:
        """Encodes images, uint8 or floats in [0, 1], into tokens (B, L) int32."""
        tokenizer, exact = self.models.tokenizer, self._exact
        return tokenizer.encode(params["tokenizer"], image_BHWC, exact)["tokens_BL"]

    def decode(self, params: PyTree, token_BL: jax.Array) -> jax.Array:
        """Decodes tokens into images (B, H, W, channels) in [0, 1]."""
        tokenizer, exact = self.models.tokenizer, self._exact
        return tokenizer.decode(params["tokenizer"], {"tokens_BL": token_BL}, exact)

    def logits(self, params: PyTree, token_BL: jax.Array, label_B: jax.Array) -> jax.Array:
        """Predicts every token from all coarser scales (teacher forcing): (B, L, V) float32."""
        quantizer = bound_quantizer(self.models.tokenizer, params["tokenizer"])
        input_BlZ = quantizer.teacher_forcing_input(quantizer.accumulated_scales(token_BL))
        transformer: Any = VAR(self.models.var, self.models.compute)
        return transformer.apply({"params": params["var"]}, input_BlZ, label_B)

    def sample(
        self,
        params: PyTree,
        label_B: jax.Array,
        key_B: jax.Array,
        choose: VARRule | None = None,
        **options: Any,
    ) -> jax.Array:
        """Samples images (B, H, W, channels) float32 in [0, 1].

        Args:
            params: parameters of all models, `model.params`.
            label_B: classes, or weights of classes (B, classes + 1) float32.
            key_B: one key per image, from `varjax.image_keys`.
            choose: rule that chooses tokens; see `VARPipeline.sample`.
            options: sampling options to replace, as Python numbers; see `VARPipeline.sample`.
        """
        chosen = replace_options(self.sampling, options).check(len(self.models.var.pyramid))
        return self.sampler(chosen, choose)(params, chosen, label_B, key_B)

    def sampler(
        self, options: VAROptions, choose: VARRule | None = None
    ) -> Callable[..., jax.Array]:
        """Makes a function that samples images with options of one kind.

        Its options may be traced. They may differ from `options` in the numbers that need no new
        compilation; see `VAROptions`.

        Returns:
            (params, options, label_B, key_B, known tokens or None) -> images.
        """
        guided = guided_scales(self.models.var.pyramid, options)

        def sample(params, options, label_B, key_B, known=None):
            batch = label_B, key_B, options, known
            return sample_images(self.models, params, *batch, guided=guided, choose=choose)

        return sample

    def editors(self, options: VAROptions) -> dict[int, Callable[..., jax.Array]]:
        """Makes functions that edit images with options of one kind; see `sampler`.

        Returns:
            {largest number of kept tokens: function}. VAR has one function for any number: (params,
            options, label_B, key_B, token_BL, keep_Bhw) -> images.
        """
        pyramid, sample = self.models.var.pyramid, self.sampler(options)

        def edit(params, options, label_B, key_B, token_BL, keep_Bhw):
            known = KnownTokens(token_BL, keep_at_every_scale(pyramid, keep_Bhw))
            return sample(params, options, label_B, key_B, known)

        return {math.prod(pyramid.finest): edit}

    @property
    def _exact(self) -> ComputeConfig:
        """Images become tokens in float32, because other formats flip some."""
        return dataclasses.replace(self.models.compute, encoder_precision="highest")
