"""Sampling: tokens are drawn set by set in a random order, each set from all tokens known so far.

Editing is the same loop with the image's own tokens known from the start.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.config.numbers import finite_number, whole_number
from varjax.config.renamed import Renamed
from varjax.errors import InputError, check_setting
from varjax.mar.causal import causal_first, causal_next, sample_causal
from varjax.mar.denoising_schedule import denoising_schedules, denoising_steps
from varjax.mar.heads import DrawSettings
from varjax.mar.masking import StepGroup, UnmaskingSchedule, draw_orders, put_at, take_at
from varjax.mar.model import MAR, MARConfig, bind_mar
from varjax.nn.compute import ComputeConfig
from varjax.nn.diffusion import NoiseSchedule
from varjax.nn.rng import ImageStream, stream_keys
from varjax.sampling.guidance import checked_guidance
from varjax.sampling.sampler import KnownTokens, option_field
from varjax.trees import PyTree

# (positions (B, m), draw number j) -> noise of those tokens; see `sampling_noise` of the heads.
SamplingNoise = Callable[[jax.Array, Any], jax.Array]
GuidanceSchedule = Literal["linear", "constant"]


@flax.struct.dataclass
class MAROptions:
    """Sampling options: how many tokens a step draws, and how.

    A new `guidance`, `temperature` or `clip_denoised` needs no new compilation, unless guidance is
    turned on or off.

    Attributes:
        guidance: scale s of classifier-free guidance, u + s·(c - u); 1 turns it off.
        guidance_schedule: how guidance depends on the step: "linear" grows from 1 to s with the
            fraction of known tokens, "constant" is s.
        steps: number of steps that draw the tokens, by a cosine schedule; ignored by a causal
            model, which takes one step per token.
        temperature: factor on the noise of each diffusion step, or of a categorical head's choice.
        diffusion_steps: denoising steps of a token, or FIRST:LAST or FIRST:LAST:SCHEDULE for a
            number that falls over the steps (DiSA, arXiv 2505.20297); SCHEDULE is "linear" (the
            default), "cosine" or "two_stage".
        clip_denoised: largest |x_0| that a denoising step may aim at, in standard deviations of the
            latents; 0 for no limit, as with the official weights (docs/mar.md says when it helps).
    """

    guidance: float = option_field(
        2.9,
        "guidance scale; 1 turns it off",
        renamed=Renamed("cfg", reason=", for MAR's cfg is now called guidance (1 turns it off)"),
    )
    guidance_schedule: GuidanceSchedule = option_field(
        "linear",
        "linear grows with the fraction of known tokens; or constant",
        static=True,
        renamed=Renamed("cfg_schedule", reason=", its name now"),
    )
    steps: int = option_field(64, "number of steps that draw the tokens", static=True)
    temperature: float = option_field(1.0, "factor on the noise of each draw")
    diffusion_steps: str = option_field(
        "100", "denoising steps of a token, or FIRST:LAST[:SCHEDULE] (DiSA)", static=True
    )
    clip_denoised: float = option_field(
        0.0, "bound on denoised tokens, in standard deviations; 0: none"
    )

    def check(self) -> "MAROptions":
        """Returns the options in plain Python types, so that equal options are compiled once.

        Raises InputError for a value out of range.
        """
        allowed = GuidanceSchedule.__args__
        known = self.guidance_schedule in allowed
        check_setting("guidance_schedule", self.guidance_schedule, known, " or ".join(allowed))
        limit = "a finite number, 0 (off) or more"
        denoising_schedules(str(self.diffusion_steps), 1)
        return dataclasses.replace(
            self,
            guidance=checked_guidance(self.guidance),
            steps=whole_number("steps", self.steps, 1, allowed="a whole number, 1 or more"),
            temperature=finite_number("temperature", self.temperature, 0),
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
        guided: whether there is guidance; without it, half as much is computed.
    """

    options: MAROptions
    schedule: UnmaskingSchedule = flax.struct.field(pytree_node=False)
    groups: tuple[StepGroup, ...] = flax.struct.field(pytree_node=False)
    guided: bool = flax.struct.field(pytree_node=False)

    @property
    def noise_schedules(self) -> tuple[NoiseSchedule, ...]:
        """The noise schedule by which the tokens of each step are denoised."""
        return denoising_schedules(self.options.diffusion_steps, self.schedule.steps)

    def draw_settings(self, number: jax.Array | int) -> DrawSettings:
        """Returns how the tokens of step `number` are drawn."""
        fraction_S = jnp.asarray(self.schedule.guidance_fraction(self.options.guidance_schedule))
        return DrawSettings(
            guidance=1 + (self.options.guidance - 1) * fraction_S[number],
            temperature=self.options.temperature,
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

    An edit starts in the schedule where as many tokens are known as the image keeps, so its cost
    and quality are those of the last steps of a whole image.

    Args:
        config: config of the transformer.
        options: checked sampling options.
        keep_BL: True where an image of an edit keeps its token; None for whole images.
        group_count: number of loops; see `UnmaskingSchedule`.

    Raises:
        InputError: `options.steps` is more than there are tokens.
    """
    steps = config.length if config.causal else options.steps
    schedule = UnmaskingSchedule(config.length, steps, group_count)
    kept_B = np.zeros(1, int) if keep_BL is None else np.sum(keep_BL, axis=1)
    groups = schedule.groups(int(kept_B.min()), int(kept_B.max()))
    return SamplingSetup(options, schedule, groups, guided=options.guidance != 1)


def check_sampling(config: MARConfig, options: MAROptions) -> MAROptions:
    """Returns checked options; raises InputError where they do not suit this model."""
    options = options.check()
    if not config.causal and options.steps > config.length:
        raise InputError(
            f"steps={options.steps}: must be at most {config.length}, the number of tokens"
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
    order_BL: jax.Array | None = None,
    noise: SamplingNoise | None = None,
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
        compute: number format and execution of the transformer.
        order_BL: positions in the order in which they become known; None to draw it.
        noise: source of the noise; None to draw it from the keys.

    Returns:
        Tokens by position, (B, L, Z) float32 or (B, L) int32.
    """
    B, L, head = len(label_B), config.length, config.head
    if order_BL is None:
        order_BL = draw_orders(config, key_B, None if known is None else known.keep_BL)
    if noise is None:
        noise = functools.partial(head.sampling_noise, stream_keys(key_B, ImageStream.NOISE))
    if known is None:
        token_BL = jnp.zeros((B, L, *head.token_shape), head.token_dtype)
        known = KnownTokens(token_BL, jnp.zeros((B, L), bool))
    network = head.network(params, compute)

    def draw(z, position_Bm, number):
        noise_of_draw = functools.partial(noise, position_Bm)
        return head.draw(network, z, noise_of_draw, setup.draw_settings(number))

    # With guidance the network computes both streams as one batch, the conditional one first.
    streams = 2 if setup.guided else 1
    if setup.guided:
        label_B = jnp.concatenate([label_B, jnp.full_like(label_B, config.classes)])
    apply = bind_mar(config, params, compute)
    class_BC = apply(label_B, method=MAR.class_vectors)

    def repeat(*arrays):
        return (jnp.concatenate([x_B] * streams) for x_B in arrays)

    def hidden(token_Bn, position_Bn, known_Bn):
        inputs = repeat(token_Bn, position_Bn, known_Bn)
        return jnp.split(apply(*inputs, class_BC, method=MAR.hidden), streams)

    def causal_hidden_first(position_B):
        z_BC, cache = apply(*repeat(position_B), class_BC, method=causal_first)
        return jnp.split(z_BC, streams), cache

    def causal_hidden_next(token_B, position_B, next_B, number, cache):
        inputs = repeat(token_B, position_B, next_B)
        z_BC, cache = apply(*inputs, number, cache, method=causal_next)
        return jnp.split(z_BC, streams), cache

    if config.causal:
        return sample_causal(causal_hidden_first, causal_hidden_next, draw, known, order_BL)
    return sample_masked(hidden, draw, known, order_BL, setup.groups)


def sample_masked(
    hidden: Callable[..., Any],
    draw: Callable[..., jax.Array],
    known: KnownTokens,
    order_BL: jax.Array,
    groups: Sequence[StepGroup],
) -> jax.Array:
    """Draws several tokens per step, each set from all tokens known before it.

    Args:
        hidden: (tokens, positions, whether known), (B, n) each -> z, a tree of (B, L, C).
        draw: (z at m positions, a tree of (B, m, C), positions (B, m), step number) -> tokens
            (B, m).
        known: tokens to keep; for a whole image, none.
        order_BL: positions in the order in which they are drawn, those to keep first.
        groups: the steps, in groups of equal padded size.

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
        return put_at(token_BL, jnp.where(new_Bm, position_Bm, L), token_Bm), None

    token_BL = known.token_BL
    for group in groups:
        steps = np.array(group.steps), np.array(group.counts[:-1]), np.array(group.counts[1:])
        token_BL, _ = jax.lax.scan(functools.partial(draw_set, group), token_BL, steps)
    return token_BL
