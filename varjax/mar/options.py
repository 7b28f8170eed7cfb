"""How a MAR model is sampled: its options, and what follows from them before any compilation."""

import dataclasses
from typing import Literal

import flax.struct
import numpy as np

from varjax.config.numbers import finite_number, whole_number
from varjax.config.renamed import Renamed
from varjax.errors import InputError, check_setting
from varjax.mar.model import MARConfig
from varjax.mar.schedule import Bucket, UnmaskingSchedule, denoising_schedules
from varjax.nn.diffusion import NoiseSchedule
from varjax.sampling.guidance import checked_guidance
from varjax.sampling.sampler import option_field

GuidanceSchedule = Literal["linear", "constant"]


@flax.struct.dataclass
class MAROptions:
    """Sampling options: how many tokens a step draws, and how.

    A new `guidance`, `temperature` or `clip_denoised` compiles nothing again, unless guidance is
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
        """Returns the options in plain Python types, so that equal ones share a compilation.

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
class SamplingPlan:
    """Holds the options, and what a program for them is compiled from.

    Attributes:
        options: checked sampling options.
        schedule: number of tokens that each step draws.
        buckets: groups of steps, each computed in one loop.
        guided: whether there is guidance; without it, half as much is computed.
    """

    options: MAROptions
    schedule: UnmaskingSchedule = flax.struct.field(pytree_node=False)
    buckets: tuple[Bucket, ...] = flax.struct.field(pytree_node=False)
    guided: bool = flax.struct.field(pytree_node=False)

    @property
    def noise_schedules(self) -> tuple[NoiseSchedule, ...]:
        """The noise schedule that the tokens of each step are denoised by."""
        return denoising_schedules(self.options.diffusion_steps, self.schedule.steps)


def make_plan(
    config: MARConfig,
    options: MAROptions,
    keep_BL: np.ndarray | None = None,
    buckets_wanted: int | None = None,
) -> SamplingPlan:
    """Plans the sampling of a batch.

    An edit enters the schedule where as many tokens are known as the image keeps; so its cost and
    its quality are those of the last steps of a whole image.

    Args:
        config: config of the transformer.
        options: checked sampling options.
        keep_BL: True where an image of an edit keeps its token; None for whole images.
        buckets_wanted: number of loops; see `UnmaskingSchedule`.

    Raises:
        InputError: `options.steps` is more than there are tokens.
    """
    L = config.length
    steps = L if config.attention == "causal" else options.steps
    schedule = UnmaskingSchedule(L, steps, buckets_wanted)
    kept_B = np.zeros(1, int) if keep_BL is None else np.sum(keep_BL, axis=1)
    buckets = schedule.buckets(int(kept_B.min()), int(kept_B.max()))
    return SamplingPlan(options, schedule, buckets, options.guidance != 1)


def check_sampling(config: MARConfig, options: MAROptions) -> MAROptions:
    """Returns checked options; raises InputError where they do not suit this model."""
    options = options.check()
    if config.attention == "bidirectional" and options.steps > config.length:
        raise InputError(
            f"steps={options.steps}: must be at most {config.length}, the number of tokens"
        )
    return options
