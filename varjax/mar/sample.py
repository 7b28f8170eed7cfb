"""Sampling: tokens are drawn set by set in a random order, each set from all tokens known so far.

Editing is the same loop with the image's own tokens known from the start.
"""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.config.numbers import (
    FLOAT32_MAX,
    OneOrEach,
    finite_number,
    number_or_list,
    whole_number,
)
from varjax.config.renamed import Renamed
from varjax.errors import InputError
from varjax.mar.causal import OnStep, causal_first, causal_next, sample_causal
from varjax.mar.denoising_schedule import denoising_schedules, denoising_steps
from varjax.mar.heads import DiffusionHead, DrawSettings, Network, Streams
from varjax.mar.masking import StepGroup, UnmaskingSchedule, draw_orders, put_at, take_at
from varjax.mar.model import MAR, MARConfig, bind_mar
from varjax.nn.class_embedding import no_class
from varjax.nn.compute import ComputeConfig
from varjax.nn.diffusion import TRAINING_STEPS, NoiseSchedule
from varjax.nn.rng import ImageStream, stream_keys
from varjax.sampling.guidance import (
    check_guided_range,
    checked_guidance_options,
    guidance_scales,
    guided_interval,
)
from varjax.sampling.sampler import KnownTokens, option_field
from varjax.trees import PyTree

# (positions (B, m), draw number j) -> noise of those tokens; see `sampling_noise` of the heads.
SamplingNoise = Callable[[jax.Array, Any], jax.Array]
# A user's own rule, with the arguments and the result of a head's `draw`.
MARRule = Callable[[Sequence[Network], Streams, Callable[[Any], jax.Array], DrawSettings], Any]


@flax.struct.dataclass
class MAROptions:
    """Sampling options: how many tokens a step draws, and how.

        options = varjax.MAROptions(guidance=1.5, steps=8)

    A new `guidance`, `temperature` or `clip_denoised` needs no new compilation, unless guidance is
    turned on or off at some step, or a list takes the place of a number.

    Attributes:
        guidance: maximum scale s of classifier-free guidance, u + s·(c - u), or a list with one per
            step; 1 turns it off.
        guidance_schedule: how guidance depends on the step: "linear" grows from 1 to s with the
            fraction of known tokens, "constant" is s, and "power_cosine:P" is RAR's; see
            `varjax.sampling.guidance.schedule_fractions`. A list replaces it.
        steps: number of steps that draw the tokens, by a cosine schedule; ignored by a causal
            model, which takes one step per token.
        temperature: factor on the noise of each diffusion step, or of a categorical head's choice;
            one number, or a list with one per step.
        diffusion_steps: denoising steps of a token, or FIRST:LAST or FIRST:LAST:SCHEDULE for a
            number that falls over the steps (DiSA, arXiv 2505.20297); SCHEDULE is "linear" (the
            default), "cosine" or "two_stage".
        clip_denoised: largest |x_0| that a denoising step may predict, in standard deviations of
            the latents; 0 for no limit, as with the official weights (docs/mar.md says when it
            helps).
        guidance_from: first step with guidance, counted from 0.
        guidance_to: end of the half-open range of steps with guidance; 0 for no end.
        guidance_timestep_from: smallest timestep of the diffusion, 0 … 999, with guidance (limited
            interval guidance, arXiv 2404.07724).
        guidance_timestep_to: end of this range of timesteps, excluded.
    """

    guidance: OneOrEach[float] = option_field(
        2.9,
        "maximum guidance scale, or one for each step; 1 turns it off",
        renamed=Renamed("cfg", reason=", for MAR's cfg is now called guidance (1 turns it off)"),
        limits=(1, FLOAT32_MAX),
        slider=(1, 10, 0.1),
    )
    guidance_schedule: str = option_field(
        "linear",
        "linear grows with the fraction of known tokens; constant; power_cosine:P",
        static=True,
        renamed=Renamed("cfg_schedule", reason=", its name now"),
    )
    steps: int = option_field(
        64, "number of steps that draw the tokens", static=True, slider=(1, 256, 1)
    )
    temperature: OneOrEach[float] = option_field(
        1.0, "factor on the noise of each draw", limits=(0, FLOAT32_MAX), slider=(0, 2, 0.05)
    )
    diffusion_steps: str = option_field(
        "100", "denoising steps of a token, or FIRST:LAST[:SCHEDULE] (DiSA)", static=True
    )
    clip_denoised: float = option_field(
        0.0,
        "bound on denoised tokens, in standard deviations; 0: none",
        limits=(0, FLOAT32_MAX),
        slider=(0, 5, 0.1),
    )
    guidance_from: int = option_field(0, "first step with guidance, from 0", static=True)
    guidance_to: int = option_field(
        0, "end of the half-open range of steps with guidance; 0: no end", static=True
    )
    guidance_timestep_from: int = option_field(
        0, "smallest diffusion timestep with guidance", limits=(0, TRAINING_STEPS - 1)
    )
    guidance_timestep_to: int = option_field(
        TRAINING_STEPS,
        "end of the range of diffusion timesteps with guidance, excluded",
        limits=(1, TRAINING_STEPS),
    )

    @property
    def guides_all_timesteps(self) -> bool:
        """Whether guidance is on in the whole diffusion of a token."""
        return (self.guidance_timestep_from, self.guidance_timestep_to) == (0, TRAINING_STEPS)

    def check(self, steps: int | None = None) -> "MAROptions":
        """Returns the options in plain Python types, so that equal options are compiled once.

        Args:
            steps: number of sampling steps if it is not the field `steps`.

        Raises:
            InputError: a value out of range, or a list without one number per step.
        """
        own_steps = whole_number("steps", self.steps, 1, allowed="a whole number, 1 or more")
        first = whole_number("guidance_timestep_from", self.guidance_timestep_from, 0)
        stop = whole_number("guidance_timestep_to", self.guidance_timestep_to, 1, TRAINING_STEPS)
        if first >= stop:
            raise InputError(
                f"guidance_timestep_from={first}: must be below guidance_timestep_to={stop}"
            )
        limit = "a finite number, 0 (off) or more"
        denoising_schedules(str(self.diffusion_steps), 1)
        return dataclasses.replace(
            self,
            **checked_guidance_options(self, steps or own_steps),
            guidance_timestep_from=first,
            guidance_timestep_to=stop,
            steps=own_steps,
            temperature=number_or_list(
                "temperature",
                self.temperature,
                lambda name, value: finite_number(name, value, 0),
                steps or own_steps,
            ),
            diffusion_steps=str(self.diffusion_steps),
            clip_denoised=finite_number("clip_denoised", self.clip_denoised, 0, allowed=limit),
        )


@flax.struct.dataclass
class SamplingSetup:
    """Holds the options, and what a program is compiled for.

    Attributes:
        options: checked sampling options.
        schedule: number of tokens that each step draws.
        groups: groups of steps, each computed in one loop.
        guided: first step with guidance and the first one after those with it. Other steps need
            half as much work, except those before it with causal attention, whose cache later
            steps read.
        guides_all_timesteps: whether guidance is on in the whole diffusion of a token.
    """

    options: MAROptions
    schedule: UnmaskingSchedule = flax.struct.field(pytree_node=False)
    groups: tuple[StepGroup, ...] = flax.struct.field(pytree_node=False)
    guided: tuple[int, int] = flax.struct.field(pytree_node=False)
    guides_all_timesteps: bool = flax.struct.field(pytree_node=False)

    @property
    def noise_schedules(self) -> tuple[NoiseSchedule, ...]:
        """The noise schedule by which the tokens of each step are denoised."""
        return denoising_schedules(self.options.diffusion_steps, self.schedule.steps)

    def first_step(self, config: MARConfig) -> int:
        """Returns the first step to show: an edit skips loops of steps that draw no tokens.

        The first steps of the first loop may draw none either.
        """
        if config.causal:  # whose steps are positions
            return 0
        return self.groups[0].steps.start if self.groups else self.schedule.steps - 1

    def draw_settings(self, number: jax.Array | int) -> DrawSettings:
        """Returns how the tokens of step `number` are drawn."""
        scale_S = jnp.asarray(guidance_scales(self.options, self.schedule.guidance_ramp))
        timesteps = self.options.guidance_timestep_from, self.options.guidance_timestep_to
        temperature = self.options.temperature
        if isinstance(temperature, tuple):
            temperature = jnp.asarray(temperature, jnp.float32)[number]
        return DrawSettings(
            step=number,
            guidance=scale_S[number],
            guided_timesteps=None if self.guides_all_timesteps else timesteps,
            temperature=temperature,
            denoising=denoising_steps(self.noise_schedules, number),
            clip_denoised=self.options.clip_denoised,
        )


def make_setup(
    config: MARConfig,
    options: MAROptions,
    keep_BL: np.ndarray | None = None,
    group_count: int | None = None,
) -> SamplingSetup:
    """Prepares the sampling of a batch.

    An edit starts at the step with as many known tokens as it keeps, so its quality is that of a
    whole image, and it costs as much as the loops from this step's on.

    Args:
        config: config of the transformer.
        options: checked sampling options.
        keep_BL: True where an image of an edit keeps its token; None for whole images.
        group_count: number of loops; see `UnmaskingSchedule`.

    Raises:
        InputError: `options.steps` is more than there are tokens.
    """
    schedule = UnmaskingSchedule(config.length, sampling_steps(config, options), group_count)
    kept_B = np.zeros(1, int) if keep_BL is None else np.sum(keep_BL, axis=1)
    guided = guided_interval(options, schedule.guidance_ramp)
    groups = schedule.groups(int(kept_B.min()), int(kept_B.max()), guided)
    return SamplingSetup(options, schedule, groups, guided, options.guides_all_timesteps)


def sampling_steps(config: MARConfig, options: MAROptions) -> int:
    """Returns the number of steps: a causal model takes one step per token."""
    return config.length if config.causal else options.steps


def check_sampling(config: MARConfig, options: MAROptions) -> MAROptions:
    """Returns checked options; raises InputError where they do not suit this model."""
    options = options.check(config.length if config.causal else None)
    if (steps := sampling_steps(config, options)) > config.length:
        raise InputError(f"steps={steps}: must be at most {config.length}, the number of tokens")
    check_guided_range(options, UnmaskingSchedule(config.length, steps).guidance_ramp)
    if not options.guides_all_timesteps and not isinstance(config.head, DiffusionHead):
        raise InputError(
            "guidance_timestep_from and guidance_timestep_to are options of a diffusion head; this "
            "model's tokens are codes"
        )
    return options


def sample_mar_tokens(
    config: MARConfig,
    params: PyTree,
    label_B: jax.Array,
    key_B: jax.Array,
    setup: SamplingSetup,
    known: KnownTokens | None = None,
    compute: ComputeConfig = ComputeConfig(),  # noqa: B008  (frozen)
    *,
    choose: MARRule | None = None,
    guide: tuple[MARConfig, PyTree] | None = None,
    order_BL: jax.Array | None = None,
    noise: SamplingNoise | None = None,
    on_step: OnStep = lambda number, token_BL: token_BL,
) -> jax.Array:
    """Samples all tokens of images; meant to be jitted as a whole.

    Args:
        config: config of the transformer.
        params: parameters of the transformer.
        label_B: classes; `config.classes` means "no class".
        key_B: one key per image, see `image_keys`.
        setup: setup from `make_setup`; for an edit, made for at least as many kept tokens as
            `known` has.
        known: tokens to keep; None for whole images.
        compute: dtype and execution of the transformer.
        choose: rule that chooses tokens in place of the head's `draw`, with the same arguments.
        guide: config and parameters of the weaker model for autoguidance; None to guide by "no
            class".
        order_BL: positions in the order in which they become known; None to draw it.
        noise: source of the noise; None to draw it from the keys.
        on_step: function that is called after each step; see `sample_masked`.

    Returns:
        Tokens by position, (B, L, Z) float32 or (B, L) int32.

    Raises:
        InputError: `choose` returns an array of another shape.
    """
    B, L, head = label_B.shape[0], config.length, config.head
    if order_BL is None:
        order_BL = draw_orders(config, key_B, None if known is None else known.keep_BL)
    if noise is None:
        noise = functools.partial(head.sampling_noise, stream_keys(key_B, ImageStream.NOISE))
    if known is None:
        token_BL = jnp.zeros((B, L, *head.token_shape), head.token_dtype)
        known = KnownTokens(token_BL, jnp.zeros((B, L), bool))
    choose = choose or head.draw
    networks = [head.network(params, compute)]
    if guide is not None:
        networks.append(guide[0].head.network(guide[1], compute))

    def draw(z, position_Bm, number):
        noise_of_draw = functools.partial(noise, position_Bm)
        token_Bm = jnp.asarray(
            choose(networks[: len(z)], z, noise_of_draw, setup.draw_settings(number))
        )
        if token_Bm.shape != (shape := (*position_Bm.shape, *head.token_shape)):
            raise InputError(f"choose returned tokens of shape {token_Bm.shape}; needed is {shape}")
        return token_Bm

    def bind(config, params, label_RB):
        apply = bind_mar(config, params, compute)
        return apply, apply(label_RB, method=MAR.class_vectors)

    # The streams of guidance: of one model as one batch, the conditional one first, or of two.
    first, stop = setup.guided
    if not stop:
        models = [bind(config, params, label_B)]
    elif guide is None:
        label_2B = jnp.concatenate([label_B, no_class(label_B, config.classes)])
        models = [bind(config, params, label_2B)]
    else:
        models = [bind(config, params, label_B), bind(*guide, label_B)]
    apply, class_RC = models[0]
    unguided_models = [(apply, class_RC[:B])]

    def hidden(models, *arrays):
        z = []
        for apply, class_RC in models:
            streams = class_RC.shape[0] // B
            inputs = repeat_streams(streams, *arrays)
            z += jnp.split(apply(*inputs, class_RC, method=MAR.hidden), streams)
        return z

    def causal_hidden_first(position_B):
        z, caches = [], []
        for apply, class_RC in models:
            streams = class_RC.shape[0] // B
            inputs = repeat_streams(streams, position_B)
            z_RC, cache = apply(*inputs, class_RC, method=causal_first)
            z, caches = z + jnp.split(z_RC, streams), [*caches, cache]
        return z, caches

    def causal_hidden_next(token_B, position_B, next_B, number, caches):
        z, new_caches = [], []
        for (apply, _), cache in zip(models, caches, strict=False):  # without guidance, one cache
            streams = cache.encoder.keys_SBLC.shape[1] // B
            inputs = repeat_streams(streams, token_B, position_B, next_B)
            z_RC, cache = apply(*inputs, number, cache, method=causal_next)
            z, new_caches = z + jnp.split(z_RC, streams), [*new_caches, cache]
        return z, new_caches

    def unguided_caches(caches):
        return [jax.tree.map(lambda x_SBLC: x_SBLC[:, :B], caches[0])]

    if config.causal:
        network = causal_hidden_first, causal_hidden_next
        return sample_causal(*network, draw, known, order_BL, stop, unguided_caches, on_step)
    token_BL = known.token_BL
    for guided, groups in itertools.groupby(setup.groups, lambda g: first <= g.steps.start < stop):
        network = functools.partial(hidden, models if guided else unguided_models)
        so_far = KnownTokens(token_BL, known.keep_BL)
        token_BL = sample_masked(network, draw, so_far, order_BL, tuple(groups), on_step)
    return token_BL


def sample_masked(
    hidden: Callable[..., Any],
    draw: Callable[..., jax.Array],
    known: KnownTokens,
    order_BL: jax.Array,
    groups: Sequence[StepGroup],
    on_step: OnStep = lambda number, token_BL: token_BL,
) -> jax.Array:
    """Draws several tokens per step, each set from all tokens known before it.

    Args:
        hidden: (tokens, positions, whether known), (B, n) each -> z, a tree of (B, L, C).
        draw: (z at m positions, a tree of (B, m, C), positions (B, m), step number) -> tokens
            (B, m).
        known: tokens to keep; for a whole image, none.
        order_BL: positions in the order in which they are drawn, those to keep first.
        groups: the steps, in groups of equal padded size.
        on_step: function that is called after each step, with its number and all tokens, and
            returns the tokens.

    Returns:
        Tokens by position, as `known.token_BL`.
    """
    L = order_BL.shape[1]
    kept_B1 = jnp.sum(known.keep_BL, axis=1, keepdims=True)
    # Padded, so that a slice may begin anywhere. Position L does not exist, so writes to it are
    # dropped.
    most_new = max((group.new for group in groups), default=0)
    padded_order_BL = jnp.pad(order_BL, ((0, 0), (0, most_new)), constant_values=L)

    def draw_set(group, token_BL, step):
        number, start, stop = step
        # 1. Known tokens: the start of the order, padded to the group's size.
        position_Bn = order_BL[:, : group.known]
        known_Bn = jnp.arange(group.known)[None] < jnp.maximum(start, kept_B1)
        z = hidden(take_at(token_BL, position_Bn), position_Bn, known_Bn)
        # 2. New tokens: the next part of the order, padded likewise.
        position_Bm = jax.lax.dynamic_slice_in_dim(padded_order_BL, start, group.new, axis=1)
        rank_1m = start + jnp.arange(group.new)[None]
        new_Bm = (rank_1m < stop) & (rank_1m >= kept_B1)
        # 3. Draw and write; padding is dropped.
        z = jax.tree.map(lambda z_BLC: take_at(z_BLC, jnp.minimum(position_Bm, L - 1)), z)
        token_Bm = draw(z, position_Bm, number)
        token_BL = put_at(token_BL, jnp.where(new_Bm, position_Bm, L), token_Bm)
        return on_step(number, token_BL), None

    token_BL = known.token_BL
    for group in groups:
        steps = np.array(group.steps), np.array(group.counts[:-1]), np.array(group.counts[1:])
        token_BL, _ = jax.lax.scan(functools.partial(draw_set, group), token_BL, steps)
    return token_BL


def repeat_streams(count: int, *arrays: jax.Array) -> list[jax.Array]:
    """Stacks copies of each array, one for each stream of guidance."""
    return [jnp.concatenate([x_B] * count) for x_B in arrays]
