"""The number of denoising steps in each sampling step: the same in all, or falling (DiSA)."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from varjax.errors import InputError
from varjax.nn.diffusion import TRAINING_STEPS, Coefficients, NoiseSchedule

# DiSA's noisiest timestep. Beyond it almost no signal is left, so a step from 999 divides by nearly
# 0.
DISA_LAST_TIMESTEP = 950
# DiSA's schedules: the fraction of FIRST - LAST that step k of 0 … end has in addition to LAST.
ANNEALING: dict[str, Callable[[int, int], float]] = {
    "linear": lambda k, end: (end - k) / end,
    "cosine": lambda k, end: (math.cos(math.pi * k / end) + 1) / 2,
    "two_stage": lambda k, end: float(k < end / 2),
}


class DenoisingSteps(NamedTuple):
    """Holds how the tokens of one sampling step are denoised.

    Attributes:
        count: number of denoising steps.
        coefficients: tables of the noise schedule, with at least `count` timesteps.
    """

    count: int | jax.Array
    coefficients: Coefficients


def denoising_schedules(text: str, steps: int) -> tuple[NoiseSchedule, ...]:
    """Reads how many denoising steps each sampling step takes.

    "100" is MAR's default: evenly spaced timesteps from 0 to 999. "50:5" is DiSA (Zhao et al. 2025,
    arXiv 2505.20297): later tokens depend more on known ones, so fewer steps suffice. Its timesteps
    end at 950. "50:5:cosine" and "50:5:two_stage" are the paper's other schedules.

    Args:
        text: one number, or FIRST:LAST, or FIRST:LAST:SCHEDULE.
        steps: number of sampling steps.

    Returns:
        The noise schedule of each sampling step.

    Raises:
        InputError: `text` is none of these, or a number is below 2 or above 1,000.
    """
    first, *rest = text.split(":")
    last, kind = (*rest, "linear")[:2] if rest else (first, "linear")
    valid = all(
        n.isdecimal() and len(n) < 5 and 2 <= int(n) <= TRAINING_STEPS for n in (first, last)
    )
    if not valid or len(rest) > 2 or kind not in ANNEALING:
        raise InputError(
            f"diffusion_steps={text}: give one number, 2 … {TRAINING_STEPS}, or FIRST:LAST like "
            f"50:5, or FIRST:LAST:SCHEDULE, where SCHEDULE is {', '.join(ANNEALING)}"
        )
    if not rest:
        return (NoiseSchedule(int(first)),) * steps
    most, least, end = int(first), int(last), max(steps - 1, 1)
    counts = [least + math.floor(ANNEALING[kind](k, end) * (most - least)) for k in range(steps)]
    return tuple(NoiseSchedule(count, last=DISA_LAST_TIMESTEP) for count in counts)


def denoising_steps(schedules: Sequence[NoiseSchedule], number: jax.Array | int) -> DenoisingSteps:
    """Returns the denoising of sampling step `number`, which may be traced."""
    if len(set(schedules)) == 1:
        return DenoisingSteps(len(schedules[0].timestep_J), schedules[0].coefficients())
    counts = [len(schedule.timestep_J) for schedule in schedules]
    tables = jax.tree.map(
        lambda *rows: np.stack([np.pad(row, (0, max(counts) - len(row))) for row in rows]),
        *(schedule.coefficients() for schedule in schedules),
    )
    return DenoisingSteps(jnp.asarray(counts)[number], tables.at(number))
