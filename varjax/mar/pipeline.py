"""A MAR transformer with its tokenizer: the family's `Sampler`, for commands and notebooks."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.checkpoints.class_names import numbered_classes
from varjax.config.numbers import OneOrEach
from varjax.errors import InputError
from varjax.mar.functions import MARFunctions
from varjax.mar.heads import CategoricalHead, DiffusionHead
from varjax.mar.latents import (
    TokenizerConfig,
    check_latents_fit,
    decode_known,
)
from varjax.mar.masking import draw_orders, known_after_steps, take_at
from varjax.mar.memory import mar_sampling_bytes
from varjax.mar.model import MARConfig
from varjax.mar.sample import (
    MAROptions,
    MARRule,
    check_sampling,
    make_setup,
    sample_mar_tokens,
    sampling_steps,
)
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
    describe_pipeline,
)
from varjax.sampling.sampler import KnownTokens, StepListener, nan_advice, replace_options
from varjax.tokenizers.contract import checked_images
from varjax.trees import PyTree

# Parameters that are only multiplied in `compute.dtype`, and so are stored in it.
CAST_KERNELS = (
    r"^(mar|guide)/(encoder_blocks|decoder_blocks|decoder_embed)/(.*/)?kernel$|"
    r"^(mar|guide)/head/(?!(input_proj|out)/)(.*/)?kernel$|"
    r"^tokenizer/(decoder/.*|post_quant_conv)/kernel$"
)


class MARPipeline:
    """Samples, edits, encodes and decodes; `varjax.load` makes it from weights.

        model = varjax.load("runs/digits_mar")
        images_BHWC = model.sample([3, 1, 4], seed=0, guidance=1.5)
        latents_BhwZ = model.encode(images_BHWC)

    Images in are uint8 or float in [0, 1], (B, H, W, channels); images out are float32 in [0, 1].
    Latents are in the transformer's units, with a standard deviation of about 1: (B, h, w, Z), or
    codes (B, L) with a categorical head. Each method compiles once per shape and kind of options.
    Every device holds all parameters, and the devices share each batch.

    Attributes:
        tokenizer: config of the tokenizer; None without one, and then methods that take or return
            images are not available.
        mar: config of the transformer.
        guide: config of the weaker model that guides this one; None if "no class" does.
        params: parameters, {"tokenizer": …, "mar": …}, and with a guide {"guide": …}.
        sampling: default options of `sample` and `edit`.
        compute: dtype and execution. Images always become latents in float32.
        devices: devices that share each batch.
        weights: the parameters as devices hold them.
        pure: the pure functions of `params` underneath, for jit, vmap and grad; see docs/python.md.
        labels: names of the classes; their numbers until `varjax.load` sets the names.
        loader: function that loads another model by its location; set by `varjax.load`.
    """

    loader: Callable[[Location], Any] | None = None

    def __init__(
        self,
        tokenizer: TokenizerConfig | None,
        mar: MARConfig,
        params: PyTree,
        sampling: MAROptions = MAROptions(),  # noqa: B008  (frozen)
        compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
        devices: Sequence[Any] | None = None,
        guide: MARConfig | None = None,
    ):
        if tokenizer is not None:
            check_latents_fit(tokenizer, mar)
        self.tokenizer, self.mar, self.sampling, self.compute = tokenizer, mar, sampling, compute
        self.guide = guide
        self.labels = numbered_classes(mar.classes)
        self.weights = weights = HeldWeights(params, CAST_KERNELS, compute, devices)
        self.params, self.devices = weights.params, weights.devices
        self.pure = pure = MARFunctions(tokenizer, mar, compute, sampling, guide)

        @functools.cache
        def token_sampler(choose):
            def sample_tokens(params, setup, label_B, key_B, known=None, **hooks):
                return sample_mar_tokens(
                    mar,
                    params["mar"],
                    label_B,
                    key_B,
                    setup,
                    known,
                    compute,
                    choose=choose,
                    guide=None if guide is None else (guide, params["guide"]),
                    **hooks,
                )

            return sample_tokens

        def image_sampler(choose):
            def sample_images(params, setup, label_B, key_B):
                token_BL = token_sampler(choose)(params, setup, label_B, key_B)
                return pure.decode(params, token_BL)

            return sample_images

        def known_positions(setup, key_B, known):
            keep_BL = None if known is None else known.keep_BL
            order_BL = draw_orders(mar, key_B, keep_BL)
            return known_after_steps(order_BL, setup.schedule, keep_BL, setup.first_step(mar))

        def show(params, token_BL, known_BL):
            tokenizer = pure.tokenizer_for_images()
            return decode_known(tokenizer, mar, params["tokenizer"], token_BL, known_BL, compute)

        def step_sampler(choose):
            def sample_every_step(params, setup, label_B, key_B, known=None):
                token_BL = token_sampler(choose)(params, setup, label_B, key_B, known)
                known_SBL = known_positions(setup, key_B, known)
                images_SBHWC = jax.lax.map(functools.partial(show, params, token_BL), known_SBL)
                return jnp.moveaxis(images_SBHWC, 0, 1)

            return sample_every_step

        def step_sender(choose):
            from varjax.sampling.step_listener import sender

            def sample_and_send(params, setup_and_call, label_B, key_B, known=None):
                setup, call = setup_and_call
                send = sender(call, weights.devices[0].platform)
                known_SBL = known_positions(setup, key_B, known)

                def on_step(number, token_BL):
                    step = number - setup.first_step(mar)
                    return jax.lax.cond(
                        step + 1 < len(known_SBL),
                        lambda token_BL: send(show(params, token_BL, known_SBL[step]), token_BL),
                        lambda token_BL: token_BL,
                        token_BL,
                    )

                batch = label_B, key_B, known
                token_BL = token_sampler(choose)(params, setup, *batch, on_step=on_step)
                return pure.decode(params, token_BL)

            return sample_and_send

        def denoise(params, _, xt_NZ, t_N, z_NC):
            return mar.head.network(params["mar"], compute)(z_NC)(xt_NZ, t_N)

        def logits(params, _, z_BLC):
            return mar.head.network(params["mar"], compute)(z_BLC)

        self._sample_tokens, self._sample_images, self._sample_every_step, self._send_every_step = (
            functools.cache(lambda choose, sampler=sampler: weights.compile(sampler(choose)))
            for sampler in (token_sampler, image_sampler, step_sampler, step_sender)
        )
        self._encode, self._decode, self._hidden = (
            weights.compile(lambda params, _, *batch, function=function: function(params, *batch))
            for function in (pure.encode, pure.decode, pure.hidden)
        )
        self._logits = weights.compile(logits)
        self._denoise = weights.compile(denoise)

    def __repr__(self) -> str:
        return describe_pipeline(self)

    @property
    def config(self) -> dict[str, TokenizerConfig | MARConfig | None]:
        """Configs of the two models, by "tokenizer" and "mar"."""
        return {"tokenizer": self.tokenizer, "mar": self.mar}

    @property
    def classes(self) -> int:
        """Number of classes; the label of that number means "no class"."""
        return self.mar.classes

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of an image."""
        return self.pure.tokenizer_for_images().image_shape

    @property
    def edit_shape(self) -> tuple[int, int]:
        """(h, w) of the token map, on which an edit says what to keep."""
        return self.mar.grid

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """(h, w, Z) of an image's latents, or (L,) of its codes."""
        return self.mar.head.latent_shape(self.mar.latent_map)

    def identity(self) -> dict[str, Any]:
        """Returns what images depend on, except labels, seed and options, as JSON data."""
        return self.weights.identity(self.config | {"guide": self.guide})

    def with_guide(self, guide: "MARPipeline | Location") -> "MARPipeline":
        """Returns this model guided by a weaker one in place of "no class" (autoguidance).

            model = varjax.load("runs/large").with_guide("runs/small")

        Both predict the same tokens (Karras et al. 2024, arXiv 2406.02507). `guidance` is then the
        weight of this model: 1 turns the guide off.

        Raises InputError for a guide with other classes, tokens, order or tokenizer weights.
        """
        weak: MARPipeline = checked_companion("guide", self, guide, _guide_sizes)
        model = MARPipeline(
            self.tokenizer,
            self.mar,
            self.params | {"guide": weak.params["mar"]},
            self.sampling,
            self.compute,
            self.devices,
            weak.mar,
        )
        model.labels, model.loader = self.labels, self.loader
        return model

    def options(self, **options: Any) -> MAROptions:
        """Returns the model's `sampling`, with all options that are not None replaced.

        Raises InputError for an unknown name and for a value out of range.
        """
        return check_sampling(self.mar, replace_options(self.sampling, options))

    def sampling_bytes(self, batch_size: int, options: MAROptions) -> int:
        """Estimates how much memory a device needs to sample a number of images at a time."""
        return self.weights.nbytes + mar_sampling_bytes(
            self.tokenizer,
            self.mar,
            batch_size,
            self.compute,
            make_setup(self.mar, options),
            self.guide,
        )

    def steps(self, options: MAROptions) -> int:
        """Returns the number of steps that draw the tokens."""
        return sampling_steps(self.mar, options)

    def advise_on_nan(self, options: MAROptions) -> str:
        """Suggests what to try if a sampled image contains NaN or infinite numbers."""
        advice = self.mar.head.advise_on_nan(options.clip_denoised)
        return nan_advice(self.params, self.compute.jax_dtype, advice)

    def encode(self, images_BHWC: Array) -> jax.Array:
        """Encodes images into latents: the posterior's mean in the transformer's units, or codes.

        Returns:
            (B, h, w, Z) float32 or (B, L) int32.
        """
        images_BHWC = checked_images(images_BHWC, self.image_shape)
        return self.mar.unpatchify(self._encode(None, images_BHWC))

    def decode(self, latents: Array) -> jax.Array:
        """Decodes latents as `encode` gives them into images (B, H, W, channels)."""
        return self._decode(None, self._checked_tokens(latents))

    def hidden(self, latents: Array, known: Array, labels: Labels | None = None) -> jax.Array:
        """Computes the vectors z of all positions from the tokens that are known.

        Args:
            latents: (B, h, w, Z), or codes (B, L); only the known ones are read.
            known: (h, w) or (B, h, w) bool on the map of `edit_shape`.
            labels: (B,) classes; None for no class.

        Returns:
            (B, L, C) float32, C the decoder's width.

        Raises:
            InputError: a wrong shape, or a model with causal attention, which cannot read an
                arbitrary set of tokens.
        """
        if self.mar.causal:
            raise InputError(
                "hidden: this model's attention is causal, so it cannot read any set of tokens"
            )
        token_BL = self._checked_tokens(latents)
        B = len(token_BL)
        known_BL = checked_mask(known, B, self.edit_shape, "known").reshape(B, self.mar.length)
        labels = np.full(B, self.classes) if labels is None else labels
        label_B = checked_labels(self.labels.numbers(labels), self.classes, B)
        order_BL = np.argsort(~known_BL, axis=1, kind="stable").astype(np.int32)
        token_BL, known_BL = take_at(token_BL, order_BL), take_at(known_BL, order_BL)
        return self._hidden(None, token_BL, order_BL, known_BL, label_B)

    def denoise(self, xt_NZ: Array, t_N: Array, z_NC: Array) -> jax.Array:
        """Predicts the noise in noisy tokens (MAR, eq. 2).

        Args:
            xt_NZ: noisy tokens, in the transformer's units.
            t_N: timesteps of the tokens, integers 0 … 999.
            z_NC: vectors of the tokens, from `hidden`.

        Returns:
            (N, 2 Z): the noise, and a value that interpolates between the smallest and the largest
            log variance of a step.

        Raises:
            InputError: a wrong shape, or a model whose tokens are codes.
        """
        if not isinstance(self.mar.head, DiffusionHead):
            raise InputError("denoise: this model's tokens are codes; it has `logits` instead")
        Z, C = self.mar.head.token_shape[0], self.mar.hidden_width
        shapes = tuple(np.shape(x) for x in (xt_NZ, t_N, z_NC))
        N = shapes[1][0] if len(shapes[1]) == 1 else "N"
        if shapes != ((N, Z), (N,), (N, C)):
            raise InputError(
                f"x_t, t and z have shapes {shapes}; needed are (N, {Z}), (N,), (N, {C})"
            )
        arrays = (
            jnp.asarray(x, d) for x, d in ((xt_NZ, "float32"), (t_N, "int32"), (z_NC, "float32"))
        )
        return self._denoise(None, *arrays)

    def logits(self, z_BLC: Array) -> jax.Array:
        """Computes the logits of all codes (B, L, V) from the vectors of `hidden`.

        Raises InputError for a model whose tokens are continuous.
        """
        if not isinstance(self.mar.head, CategoricalHead):
            raise InputError("logits: this model's tokens are continuous; it has `denoise` instead")
        return self._logits(None, jnp.asarray(z_BLC))

    def sample(
        self,
        labels: Labels,
        seed: int = 0,
        *,
        guidance: OneOrEach[float] | Each | None = None,
        guidance_schedule: str | None = None,
        steps: int | None = None,
        temperature: OneOrEach[float] | Each | None = None,
        diffusion_steps: str | int | None = None,
        clip_denoised: float | None = None,
        guidance_from: int | None = None,
        guidance_to: int | None = None,
        guidance_timestep_from: int | None = None,
        guidance_timestep_to: int | None = None,
        choose: MARRule | None = None,
        index: Index | None = None,
        every_step: bool | StepListener = False,
        **unknown: Any,
    ) -> jax.Array:
        """Samples one image for each label.

            images_BHWC = model.sample([3, 1, 4], seed=0, steps=8, guidance=1.5)

        Image i depends only on seed, index[i], labels[i] and the options, never on the batch.
        Options that are None have the values of `sampling`.

        Args:
            labels: (B,) classes, by number or name; `classes` means "no class".
            seed: random seed; each seed gives different images.
            guidance: maximum guidance scale, or one for each step: a list, or a function of the
                step's index, which is called immediately; 1 turns guidance off.
            guidance_schedule: "linear", growing from 1 with the fraction of known tokens,
                "constant", or "power_cosine:P".
            steps: number of steps that draw the tokens.
            temperature: factor on the noise of each draw, or one for each step.
            diffusion_steps: denoising steps of a token, or FIRST:LAST[:SCHEDULE] (DiSA).
            clip_denoised: bound on denoised tokens, in standard deviations; 0 for none.
            guidance_from: first step with guidance, counted from 0.
            guidance_to: end of the half-open range of steps with guidance; 0 for no end.
            guidance_timestep_from: smallest diffusion timestep with guidance, 0 … 999.
            guidance_timestep_to: end of this range of timesteps, excluded.
            choose: rule that chooses tokens instead, with the arguments of the head's `draw`:
                (networks, z, noise, settings) -> tokens; pure. None for a draw. A new function
                object causes recompilation, so define it once.
            index: (B,) numbers of the images; None for 0 … B-1.
            every_step: whether to return the images after each step, as in an animation; tokens
                that are not drawn yet are gray. Or a function of a step's number and images, which
                gets those of each step while the later ones are drawn.
            unknown: options of other models, which are refused.

        Returns:
            (B, H, W, channels) float32 in [0, 1], or with `every_step=True` (S, B, H, W, channels).

        Raises:
            InputError: labels or options out of range, an option that is unknown, or a model that
                has no tokenizer.
        """
        options = self.options(
            guidance=guidance,
            guidance_schedule=guidance_schedule,
            steps=steps,
            temperature=temperature,
            diffusion_steps=diffusion_steps,
            clip_denoised=clip_denoised,
            guidance_from=guidance_from,
            guidance_to=guidance_to,
            guidance_timestep_from=guidance_timestep_from,
            guidance_timestep_to=guidance_timestep_to,
            **unknown,
        )
        label_B, key_B = checked_request(self.labels.numbers(labels), seed, index, self.classes)
        check_rule(choose)
        setup = make_setup(self.mar, options)
        if every_step:
            return self._draw_steps(every_step, choose, setup, label_B, key_B)
        return self._sample_images(choose)(setup, label_B, key_B)

    def sample_latents(
        self,
        labels: Labels,
        seed: int = 0,
        *,
        choose: MARRule | None = None,
        index: Index | None = None,
        **options: Any,
    ) -> jax.Array:
        """Samples what `sample` decodes: latents (B, h, w, Z) or codes (B, L). Same arguments."""
        check_rule(choose)
        setup = make_setup(self.mar, self.options(**options))
        label_B, key_B = checked_request(self.labels.numbers(labels), seed, index, self.classes)
        return self.mar.unpatchify(self._sample_tokens(choose)(setup, label_B, key_B))

    def edit(
        self,
        images_BHWC: Array,
        keep: np.ndarray,
        labels: Labels | None = None,
        seed: int = 0,
        *,
        guidance: OneOrEach[float] | Each | None = None,
        guidance_schedule: str | None = None,
        steps: int | None = None,
        temperature: OneOrEach[float] | Each | None = None,
        diffusion_steps: str | int | None = None,
        clip_denoised: float | None = None,
        guidance_from: int | None = None,
        guidance_to: int | None = None,
        guidance_timestep_from: int | None = None,
        guidance_timestep_to: int | None = None,
        choose: MARRule | None = None,
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
            guidance_schedule: schedule of the guidance.
            steps: number of steps that draw the tokens.
            temperature: factor on the noise of each draw.
            diffusion_steps: denoising steps of a token; see `sample`.
            clip_denoised: bound on denoised tokens; see `sample`.
            guidance_from: first step with guidance.
            guidance_to: end of the range of steps with guidance.
            guidance_timestep_from: smallest diffusion timestep with guidance.
            guidance_timestep_to: end of this range of timesteps, excluded.
            choose: rule that chooses tokens instead.
            index: (B,) numbers of the results; None for one result per image.
            every_step: whether to return the results after each step, from the first loop of
                steps that draws tokens on, or a function that gets them; see `sample`.
            unknown: options of other models, which are refused.

        Returns:
            (B, H, W, channels) float32 in [0, 1], or with `every_step=True` (S, B, H, W, channels).

        Raises:
            InputError: a wrong shape, labels or options out of range, or an unknown option.
        """
        options = self.options(
            guidance=guidance,
            guidance_schedule=guidance_schedule,
            steps=steps,
            temperature=temperature,
            diffusion_steps=diffusion_steps,
            clip_denoised=clip_denoised,
            guidance_from=guidance_from,
            guidance_to=guidance_to,
            guidance_timestep_from=guidance_timestep_from,
            guidance_timestep_to=guidance_timestep_to,
            **unknown,
        )
        batch = self._edit_batch(self.encode(images_BHWC), keep, labels, seed, index, options)
        check_rule(choose)
        if every_step:
            return self._draw_steps(every_step, choose, *batch)
        return self._decode(None, self._sample_tokens(choose)(*batch))

    def edit_latents(
        self,
        latents: Array,
        keep: np.ndarray,
        labels: Labels | None = None,
        seed: int = 0,
        *,
        choose: MARRule | None = None,
        index: Index | None = None,
        **options: Any,
    ) -> jax.Array:
        """Redraws latents outside of `keep`; those inside stay bit-identical.

        latents: result of `encode`, one for each of `index`, or one for all of them. The other
        arguments are those of `edit`.
        """
        check_rule(choose)
        batch = self._edit_batch(latents, keep, labels, seed, index, self.options(**options))
        return self.mar.unpatchify(self._sample_tokens(choose)(*batch))

    def _draw_steps(self, every_step, choose, setup, *batch) -> jax.Array:
        """Returns the images after every step, or the finished ones if a function gets the others.

        batch: labels (B,), keys (B,), and for an edit the known tokens.
        """
        if callable(every_step):
            from varjax.sampling.step_listener import sample_with_listener

            program = self._send_every_step(choose)
            return sample_with_listener(
                lambda call: program((setup, call), *batch),
                every_step,
                (len(batch[0]), *self.image_shape),
                self.devices,
            )
        return jnp.moveaxis(self._sample_every_step(choose)(setup, *batch), 1, 0)

    def _edit_batch(self, latents, keep, labels, seed, index, options) -> tuple[Any, ...]:
        """Returns what programs take for an edit: setup, labels (B,), keys (B,), known tokens."""
        token_BL = self._checked_tokens(latents)
        label_B, key_B = checked_edit(
            len(token_BL), self.labels.numbers(labels), seed, index, self.classes
        )
        B = len(key_B)
        keep_BL = checked_mask(keep, B, self.edit_shape).reshape(B, self.mar.length)
        setup = make_setup(self.mar, options, keep_BL)
        token_BL = jnp.broadcast_to(token_BL, (B, *token_BL.shape[1:]))
        return setup, label_B, key_B, KnownTokens(token_BL, jnp.asarray(keep_BL))

    def _checked_tokens(self, latents):
        return self.mar.head.checked_tokens(latents, self.mar.latent_map)


def _guide_sizes(model: MARPipeline) -> dict[str, Any]:
    """Returns what a guide and the model that it guides must have in common, by name."""
    mar = model.mar
    tokens = mar.head.patch, mar.head.token_shape, mar.head.latent_sizes
    order = {"causal": mar.causal, "order": mar.order}
    return {"latent_map": mar.latent_map, "tokens": tokens} | order
