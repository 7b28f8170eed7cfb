"""A VAR transformer with its tokenizer: the family's `Sampler`, for commands and notebooks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.checkpoints.class_names import numbered_classes
from varjax.config.numbers import OneOrEach
from varjax.errors import InputError
from varjax.nn import resize
from varjax.nn.autoencoder import to_unit_range
from varjax.nn.compute import ComputeConfig
from varjax.sampling.pipeline import (
    Array,
    Each,
    HeldWeights,
    Index,
    Labels,
    Location,
    check_rule,
    checked_companion,
    checked_edit,
    checked_labels,
    checked_mask,
    checked_request,
    checked_tokens,
    describe_pipeline,
)
from varjax.sampling.sampler import KnownTokens, StepListener, nan_advice, replace_options
from varjax.tokenizers.contract import checked_images
from varjax.tokenizers.vq.model import VQConfig, bound_quantizer, decode_every_scale
from varjax.trees import PyTree
from varjax.var.kept_scales import keep_at_every_scale, keep_first_scales, scales_of_size
from varjax.var.model import VARConfig
from varjax.var.network import Refiner, VARModels, check_draft_scales, var_sampling_bytes
from varjax.var.sample import (
    VARFunctions,
    VAROptions,
    VARRule,
    guided_scales,
    sample_images,
)

# What is multiplied in `compute.dtype` only, and so may be held in it.
CAST_KERNELS = (
    r"^(var|guide|refiner)/(blocks/.*|token_proj|shared_adaln|head)/kernel$|"
    r"^tokenizer/(decoder/.*|post_quant_conv)/kernel$"
)


class VARPipeline:
    """Samples, edits, encodes and decodes; `varjax.load` makes it from weights.

        model = varjax.load("runs/digits")
        images_BHWC = model.sample([3, 1, 4], seed=0, guidance=3.0)
        tokens_BL = model.encode(images_BHWC)

    Images in are uint8 or float in [0, 1], (B, H, W, channels); images out are float32 in [0, 1].
    Each method compiles once per shape, separately with and without guidance; a new seed, label or
    top-k causes no recompilation. Every device holds all parameters, and the devices share each
    batch.

    Attributes:
        guide: config of the weaker model that guides this one; None if "no class" does.
        tokenizer: config of the tokenizer.
        var: config of the transformer.
        params: {"tokenizer": …, "var": …}, and "guide" and "refiner" if there are any, on the host.
            The devices hold kernels in `compute.dtype`.
        sampling: default options of `sample` and `edit`.
        compute: dtype and execution. Images always become tokens in float32, because other dtypes
            change some.
        devices: devices that share each batch.
        refiner: smaller model that draws the fine scales; None if this one draws all of them.
        weights: the parameters as devices hold them.
        pure: the pure functions of `params` underneath, for jit, vmap and grad; see docs/python.md.
        labels: names of the classes; their numbers until `varjax.load` sets the names.
        loader: function that loads another model by its location; set by `varjax.load`.
    """

    loader: Callable[[Location], Any] | None = None

    def __init__(
        self,
        tokenizer: VQConfig,
        var: VARConfig,
        params: PyTree,
        sampling: VAROptions = VAROptions(),  # noqa: B008  (frozen)
        compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
        devices: Sequence[Any] | None = None,
        guide: VARConfig | None = None,
        refiner: Refiner | None = None,
    ):
        self.tokenizer, self.var, self.sampling, self.compute = tokenizer, var, sampling, compute
        self.guide, self.refiner = guide, refiner
        self._models = models = VARModels(tokenizer, var, compute, guide, refiner)
        self.labels = numbered_classes(var.classes)
        self.weights = weights = HeldWeights(params, CAST_KERNELS, compute, devices)
        self.params, self.devices = weights.params, weights.devices
        self.pure = pure = VARFunctions(models, sampling)

        def decode_scales(params, _, token_BL):
            quantizer = bound_quantizer(tokenizer, params["tokenizer"])
            f_hats = quantizer.accumulated_scales(token_BL)
            images_KBHWC = decode_every_scale(tokenizer, params["tokenizer"], f_hats, compute)
            return jnp.moveaxis(to_unit_range(images_KBHWC), 0, 1)

        def draw(params, options, label_B, key_B, known=None, **how):
            return sample_images(models, params, label_B, key_B, options, known, **how)

        @functools.cache
        def compiled_sampler(guided, choose, every_step):
            how = {"guided": guided, "choose": choose, "every_step": every_step}
            return weights.compile(functools.partial(draw, **how))

        @functools.cache
        def compiled_sender(guided, choose):
            from varjax.sampling.step_listener import sender

            def draw_and_send(params, options_and_call, *batch):
                options, call = options_and_call
                send = sender(call, weights.devices[0].platform)
                return draw(params, options, *batch, guided=guided, choose=choose, send=send)

            return weights.compile(draw_and_send)

        self._encode, self._decode, self._logits = (
            weights.compile(lambda params, _, *batch, function=function: function(params, *batch))
            for function in (pure.encode, pure.decode, pure.logits)
        )
        self._decode_every_scale = weights.compile(decode_scales)
        self._compiled_sampler, self._compiled_sender = compiled_sampler, compiled_sender

    def __repr__(self) -> str:
        return describe_pipeline(self)

    @property
    def config(self) -> dict[str, VQConfig | VARConfig]:
        """Configs of the two models, by "tokenizer" and "var"."""
        return {"tokenizer": self.tokenizer, "var": self.var}

    @property
    def classes(self) -> int:
        """Number of classes; the label of that number means "no class"."""
        return self.var.classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of an image."""
        return self.tokenizer.image_shape

    @property
    def edit_shape(self) -> tuple[int, int]:
        """(h, w) of the finest token map, on which an edit says what to keep."""
        return self.var.pyramid.finest

    def identity(self) -> dict[str, Any]:
        """Returns what images depend on, except labels, seed and options, as JSON data."""
        companions = {"guide": self.guide, "refiner": self.refiner}
        identity = self.weights.identity(self.config | companions)
        if self.refiner is not None:
            identity["draft_scales"] = self.refiner.draft_scales
        return identity

    def with_guide(self, guide: "VARPipeline | Location") -> "VARPipeline":
        """Returns this model guided by a weaker one in place of "no class" (autoguidance).

            model = varjax.load("var_d30").with_guide("var_d16")

        Both predict the same tokens, each with its own cache (Karras et al. 2024, arXiv
        2406.02507). `guidance` is then the weight of this model: 1 turns the guide off.

        Raises InputError for a guide with other classes, scales or tokenizer weights.
        """
        weak: VARPipeline = checked_companion("guide", self, guide, _scales)
        return self._with({"guide": weak.params["var"]}, guide=weak.var)

    def with_refiner(self, refiner: "VARPipeline | Location", draft_scales: int) -> "VARPipeline":
        """Returns this model with a smaller one that draws the fine scales (CoDe).

            model = varjax.load("var_d30").with_refiner("var_d16", draft_scales=8)

        The fine scales have most of the tokens, so sampling is faster and needs less memory (Chen
        et al. 2024, arXiv 2411.17787). `logits` and `encode` still use this model.

        Args:
            refiner: model with the same scales, classes and tokenizer, or where to load it.
            draft_scales: number of scales that this model draws, 1 … K-1.

        Raises:
            InputError: the refiner does not fit this model, or `draft_scales` is out of range.
        """
        check_draft_scales(self.var, draft_scales)  # before anything is loaded
        small: VARPipeline = checked_companion("refiner", self, refiner, _scales)
        return self._with(
            {"refiner": small.params["var"]},
            refiner=Refiner(small.var, int(draft_scales)),
        )

    def options(self, **options: Any) -> VAROptions:
        """Returns the model's `sampling`, with all options that are not None replaced.

        Raises InputError for an unknown name and for a value out of range.
        """
        return replace_options(self.sampling, options).check(len(self.var.pyramid))

    def sampling_bytes(self, batch_size: int, options: VAROptions) -> int:
        """Estimates how much memory a device needs to sample a number of images at a time."""
        guided = guided_scales(self.var.pyramid, options)
        return self.weights.nbytes + var_sampling_bytes(self._models, batch_size, guided)

    def steps(self, options: VAROptions) -> int:
        """Returns the number of scales."""
        return len(self.var.pyramid)

    def advise_on_nan(self, options: VAROptions) -> str:
        """Suggests what to try if a sampled image contains NaN or infinite numbers."""
        return nan_advice(self.params, self.compute.jax_dtype)

    def encode(self, images_BHWC: Array) -> jax.Array:
        """Encodes images into tokens (B, L) int32, the scales concatenated."""
        return self._encode(None, checked_images(images_BHWC, self.image_shape))

    def decode(self, tokens_BL: Array, every_scale: bool = False) -> jax.Array:
        """Decodes tokens into images, in `compute.dtype`.

        Args:
            tokens_BL: integers below the vocabulary.
            every_scale: whether to decode the image after each scale, not only after the last.

        Returns:
            (B, H, W, channels), or with `every_scale` (K, B, H, W, channels).
        """
        tokens_BL = self._checked_tokens(tokens_BL)
        if every_scale:
            return jnp.moveaxis(self._decode_every_scale(None, tokens_BL), 1, 0)
        return self._decode(None, tokens_BL)

    def logits(self, tokens_BL: Array, labels: Labels) -> jax.Array:
        """Predicts every token from all coarser scales (teacher forcing): (B, L, V) float32."""
        tokens_BL = self._checked_tokens(tokens_BL)
        return self._logits(
            None,
            tokens_BL,
            checked_labels(self.labels.numbers(labels), self.classes, len(tokens_BL)),
        )

    def sample(
        self,
        labels: Labels,
        seed: int = 0,
        *,
        guidance: OneOrEach[float] | Each | None = None,
        top_k: OneOrEach[int] | Each | None = None,
        top_p: OneOrEach[float] | Each | None = None,
        smooth: bool | None = None,
        guidance_schedule: str | None = None,
        guidance_from: int | None = None,
        guidance_to: int | None = None,
        temperature: OneOrEach[float] | Each | None = None,
        choose: VARRule | None = None,
        index: Index | None = None,
        every_step: bool | StepListener = False,
        **unknown: Any,
    ) -> jax.Array:
        """Samples one image for each label.

            images_BHWC = model.sample([3, 1, 4], seed=0, guidance=3.0)

        Image i depends only on seed, index[i], labels[i] and the options, never on the batch.
        Options that are None have the values of `sampling`. Guidance, top_k, top_p and temperature
        are a number, or one for each scale: a list, or a function of the scale's index, which is
        called immediately.

        Args:
            labels: (B,) classes, by number or name; `classes` means "no class".
            seed: random seed; each seed gives different images.
            guidance: maximum guidance scale; 1 turns guidance off.
            top_k: number of most likely codes to draw from; 0 for all.
            top_p: total probability of the most likely codes to draw from; 0 for all.
            smooth: whether to mix codes: smoother pictures, not for benchmarks.
            guidance_schedule: "linear" from 1 at the first scale, "constant", or "power_cosine:P".
            guidance_from: first scale with guidance, counted from 0.
            guidance_to: end of the half-open range of scales with guidance; 0 for no end.
            temperature: temperature of the codes left by top_k and top_p; 0 is greedy.
            choose: rule that chooses tokens instead: (logits (B, l, V), scale k, keys (B,) of the
                scale) -> tokens (B, l); pure. None for a draw. A new function object causes
                recompilation, so define it once.
            index: (B,) numbers of the images; None for 0 … B-1.
            every_step: whether to return the images after each scale, as in an animation; or a
                function of a scale's index and images, which gets those of each scale while the
                later ones are drawn.
            unknown: options of other models, which are refused.

        Returns:
            (B, H, W, channels) float32 in [0, 1], or with `every_step=True` (K, B, H, W, channels).

        Raises:
            InputError: labels or options out of range, or an option that is unknown.
        """
        options = self._drawing_options(
            choose,
            guidance=guidance,
            top_k=top_k,
            top_p=top_p,
            smooth=smooth,
            guidance_schedule=guidance_schedule,
            guidance_from=guidance_from,
            guidance_to=guidance_to,
            temperature=temperature,
            **unknown,
        )
        label_B, key_B = checked_request(self.labels.numbers(labels), seed, index, self.classes)
        return self._draw(options, choose, every_step, label_B, key_B)

    def edit(
        self,
        images_BHWC: Array,
        keep: np.ndarray,
        labels: Labels | None = None,
        seed: int = 0,
        *,
        guidance: OneOrEach[float] | Each | None = None,
        top_k: OneOrEach[int] | Each | None = None,
        top_p: OneOrEach[float] | Each | None = None,
        smooth: bool | None = None,
        guidance_schedule: str | None = None,
        guidance_from: int | None = None,
        guidance_to: int | None = None,
        temperature: OneOrEach[float] | Each | None = None,
        choose: VARRule | None = None,
        index: Index | None = None,
        every_step: bool | StepListener = False,
        **unknown: Any,
    ) -> jax.Array:
        """Redraws everything outside of `keep`, without further training.

        Args:
            images_BHWC: one image for each of `index`, or one for all of them.
            keep: (h, w) or (B, h, w) bool on the map of `edit_shape`; True keeps the tokens there.
            labels: (B,) classes; None for no class.
            seed: random seed; each seed gives different images.
            guidance: maximum guidance scale; see `sample` for all options.
            top_k: number of most likely codes to draw from.
            top_p: total probability of the codes to draw from.
            smooth: whether to mix codes; not for benchmarks.
            guidance_schedule: schedule of the guidance.
            guidance_from: first scale with guidance.
            guidance_to: end of the range of scales with guidance.
            temperature: temperature of the codes left by top_k and top_p.
            choose: rule that chooses tokens instead.
            index: (B,) numbers of the results; None for one result per image.
            every_step: whether to return the results after each scale, or a function that gets
                them; see `sample`.
            unknown: options of other models, which are refused.

        Returns:
            (B, H, W, channels) float32 in [0, 1], or with `every_step=True` (K, B, H, W, channels).

        Raises:
            InputError: a wrong shape, labels or options out of range, or an unknown option.
        """
        options = self._drawing_options(
            choose,
            guidance=guidance,
            top_k=top_k,
            top_p=top_p,
            smooth=smooth,
            guidance_schedule=guidance_schedule,
            guidance_from=guidance_from,
            guidance_to=guidance_to,
            temperature=temperature,
            **unknown,
        )
        images_BHWC = checked_images(images_BHWC, self.image_shape)
        label_B, key_B = checked_edit(
            len(images_BHWC), self.labels.numbers(labels), seed, index, self.classes
        )
        keep_Bhw = checked_mask(keep, len(key_B), self.edit_shape)
        keep_BL = keep_at_every_scale(self.var.pyramid, keep_Bhw)
        known = self._known_tokens(images_BHWC, keep_BL)
        return self._draw(options, choose, every_step, label_B, key_B, known)

    def vary(
        self,
        images_BHWC: Array,
        keep_scales: int,
        labels: Labels | None = None,
        seed: int = 0,
        *,
        choose: VARRule | None = None,
        index: Index | None = None,
        every_step: bool | StepListener = False,
        **options: Any,
    ) -> jax.Array:
        """Keeps the first scales of images and draws the finer ones: variations of an image.

            images_BHWC = model.vary(photo_HWC[None], keep_scales=5, index=range(4))

        Args:
            images_BHWC: one image for each of `index`, or one for all of them.
            keep_scales: number of scales to keep, 1 … K-1; more give closer results.
            labels: (B,) classes; None for no class.
            seed: random seed; each seed gives different images.
            choose: rule that chooses tokens; see `sample`.
            index: (B,) numbers of the results; None for one result per image.
            every_step: whether to return the results after each scale, or a function that gets
                them; see `sample`.
            options: sampling options; see `sample`.

        Returns:
            (B, H, W, channels) float32 in [0, 1], or with `every_step=True` (K, B, H, W, channels).

        Raises:
            InputError: a wrong shape, number of scales, labels or options.
        """
        checked = self._drawing_options(choose, **options)
        keep_L = keep_first_scales(self.var.pyramid, keep_scales)
        images_BHWC = checked_images(images_BHWC, self.image_shape)
        label_B, key_B = checked_edit(
            len(images_BHWC), self.labels.numbers(labels), seed, index, self.classes
        )
        keep_BL = np.tile(keep_L, (len(key_B), 1))
        known = self._known_tokens(images_BHWC, keep_BL)
        return self._draw(checked, choose, every_step, label_B, key_B, known)

    def upscale(
        self,
        images_BhwC: Array,
        keep_scales: int | None = None,
        labels: Labels | None = None,
        seed: int = 0,
        *,
        choose: VARRule | None = None,
        index: Index | None = None,
        every_step: bool | StepListener = False,
        **options: Any,
    ) -> jax.Array:
        """Draws the details of small images: super-resolution to the model's size.

            images_BHWC = model.upscale(small_images_BhwC)  # from 64 to 256 pixels, for example

        The images are enlarged (bicubic). Their coarse scales are kept, and the finer ones drawn.

        Args:
            images_BhwC: images of any smaller size with the same aspect ratio; one for each of
                `index`, or one for all of them.
            keep_scales: number of scales to keep; None for `scales_of_size`.
            labels: (B,) classes; None for no class.
            seed: random seed; each seed gives different images.
            choose: rule that chooses tokens; see `sample`.
            index: (B,) numbers of the results; None for one result per image.
            every_step: whether to return the results after each scale, or a function that gets
                them; see `sample`.
            options: sampling options; see `sample`.

        Returns:
            (B, H, W, channels) float32 in [0, 1], or with `every_step=True` (K, B, H, W, channels).

        Raises:
            InputError: images that are too small or not smaller than the model's, a wrong number of
                scales, labels or options.
        """
        shape = np.shape(images_BhwC)
        if len(shape) != 4:
            raise InputError(
                f"images have shape {shape}; upscaling takes (B, h, w, {self.image_shape[2]})"
            )
        h, w = size = shape[1:3]
        usual_scales = scales_of_size(size, self.image_shape, self.var.pyramid)
        images_BhwC = checked_images(images_BhwC, (h, w, self.image_shape[2]))
        if images_BhwC.dtype == jnp.uint8:
            images_BhwC = images_BhwC.astype(jnp.float32) / 255
        large_BHWC = resize.bicubic(images_BhwC, self.image_shape[:2])
        return self.vary(
            jnp.clip(large_BHWC, 0, 1),
            usual_scales if keep_scales is None else keep_scales,
            labels,
            seed,
            choose=choose,
            index=index,
            every_step=every_step,
            **options,
        )

    def _drawing_options(self, choose: VARRule | None, **given: Any) -> VAROptions:
        """Returns checked options; InputError for those that a rule given with them ignores."""
        options = self.options(**given)
        ignored = {name: given.get(name) is not None for name in ("top_k", "top_p", "temperature")}
        check_rule(choose, **ignored, smooth=options.smooth)
        return options

    def _known_tokens(self, images_BHWC, keep_BL) -> KnownTokens:
        """Encodes images that `checked_images` returned, for results of which `keep_BL` is kept."""
        token_BL = self._encode(None, images_BHWC)
        return KnownTokens(jnp.broadcast_to(token_BL, keep_BL.shape), jnp.asarray(keep_BL))

    def _draw(self, options, choose, every_step, *batch) -> jax.Array:
        """Runs the program that samples images, compiled once for each kind of options.

        batch: labels (B,), keys (B,), and for an edit the known tokens.
        """
        guided = guided_scales(self.var.pyramid, options)
        if callable(every_step):
            from varjax.sampling.step_listener import sample_with_listener

            program = self._compiled_sender(guided, choose)
            return sample_with_listener(
                lambda call: program((options, call), *batch),
                every_step,
                (len(batch[0]), *self.image_shape),
                self.devices,
            )
        images = self._compiled_sampler(guided, choose, every_step)(options, *batch)
        return jnp.moveaxis(images, 1, 0) if every_step else images

    def _with(self, params: PyTree, **companions: Any) -> "VARPipeline":
        """Returns this model with further parameters and their configs, by argument."""
        model = VARPipeline(
            self.tokenizer,
            self.var,
            self.params | params,
            self.sampling,
            self.compute,
            self.devices,
            **{"guide": self.guide, "refiner": self.refiner, **companions},
        )
        model.labels, model.loader = self.labels, self.loader
        return model

    def _checked_tokens(self, tokens_BL):
        return checked_tokens(tokens_BL, (self.var.pyramid.length,), self.var.vocab)


def _scales(model: VARPipeline) -> dict[str, Any]:
    """Returns what models must have in common to draw an image together, by name."""
    return {"scales": model.var.scales}
