"""Which tokens become known at which step of sampling, and in which padded sizes that is computed.

All of it is plain numbers, known before anything is compiled.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import numpy as np

from varjax.errors import InputError
from varjax.nn.diffusion import TRAINING_STEPS, NoiseSchedule

BUCKETS = 8  # loops of their own that a sampling program has, at most
STEPS_OF_A_BUCKET = 4  # at least: with fewer, compiling takes longer than the padding costs
# DiSA's last timestep. The signal is almost gone after it, so a step from 999 divides by almost 0.
DISA_LAST_TIMESTEP = 950
# DiSA's schedules: the share of FIRST - LAST that step k of 0 … end has beyond LAST.
ANNEALING: dict[str, Callable[[int, int], float]] = {
    "linear": lambda k, end: (end - k) / end,
    "cosine": lambda k, end: (math.cos(math.pi * k / end) + 1) / 2,
    "two_stage": lambda k, end: float(k < end / 2),
}


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Some consecutive steps, computed in arrays of one size.

    Attributes:
        steps: numbers of the steps.
        known: largest number of tokens that the encoder sees.
        new: largest number of tokens that a step draws.
    """

    steps: range
    known: int
    new: int


@dataclasses.dataclass(frozen=True)
class UnmaskingSchedule:
    """Draws more tokens a step the more are known, along a cosine (MAR, section 3.3).

    Raises InputError for a number of steps that there cannot be.

        schedule = UnmaskingSchedule(length=256, steps=64)
        schedule.known  # (0, 1, 2, …, 256)

    Attributes:
        length: number of tokens L.
        steps: number of sampling steps, 1 … L.
        buckets_wanted: number of loops that compute the steps; 0 for one per step, None for a
            number that suits them.
    """

    length: int
    steps: int
    buckets_wanted: int | None = None

    def __post_init__(self):
        if not 1 <= self.steps <= self.length or self.steps != int(self.steps):
            raise InputError(
                f"steps={self.steps}: must be a whole number, 1 … {self.length} (the number of "
                "tokens)"
            )

    @functools.cached_property
    def masked_after(self) -> tuple[int, ...]:
        """Tokens left to draw after each step by the cosine, 1 at least: guidance follows them."""
        left, counts = self.length, []
        for i in range(self.steps):
            cosine = math.floor(self.length * np.cos(np.pi / 2 * (i + 1) / self.steps))
            left = max(1, min(left - 1, cosine))
            counts.append(left)
        return tuple(counts)

    @functools.cached_property
    def known(self) -> tuple[int, ...]:
        """Known tokens before each step, and L at the end."""
        return 0, *(self.length - left for left in self.masked_after[:-1]), self.length

    def guidance_share(self, kind: str) -> np.ndarray:
        """Returns which share of the guidance each step has, (steps,): "linear" or "constant"."""
        if kind == "constant":
            return np.ones(self.steps, np.float32)
        return 1 - np.array(self.masked_after, np.float32) / self.length

    def buckets(self, least_kept: int = 0, most_kept: int = 0) -> tuple[Bucket, ...]:
        """Groups the steps into loops.

        Args:
            least_kept: smallest number of tokens known at the start, over the images of a batch;
                groups that draw no token after these are left out.
            most_kept: largest number of tokens known at the start, over the images of a batch.
        """
        wanted = self.buckets_wanted
        if wanted is None:
            wanted = min(BUCKETS, math.ceil(self.steps / STEPS_OF_A_BUCKET))
        count = min(wanted or self.steps, self.steps)
        edges = [i * self.steps // count for i in range(count + 1)]
        found = []
        for start, stop in itertools.pairwise(edges):
            known = self.known[start : stop + 1]
            if known[-1] > least_kept:
                new = max(b - a for a, b in itertools.pairwise(known))
                seen = max(known[-2], self._rounded_up(most_kept))
                found.append(Bucket(range(start, stop), seen, new))
        return tuple(found)

    def _rounded_up(self, tokens: int) -> int:
        """Rounds to eighths of all tokens, so that few sizes of a mask are compiled for."""
        part = math.ceil(self.length / BUCKETS)
        return min(math.ceil(tokens / part) * part, self.length)


def denoising_schedules(text: str, steps: int) -> tuple[NoiseSchedule, ...]:
    """Reads how many denoising steps each sampling step takes.

    "100" is MAR's own: evenly spaced timesteps from 0 to 999. "50:5" is DiSA (Zhao et al. 2025,
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
    numbers = all(
        n.isdecimal() and len(n) < 5 and 2 <= int(n) <= TRAINING_STEPS for n in (first, last)
    )
    if not numbers or len(rest) > 2 or kind not in ANNEALING:
        raise InputError(
            f"diffusion_steps={text}: give one number, 2 … {TRAINING_STEPS}, or FIRST:LAST like "
            f"50:5, or with a schedule, FIRST:LAST:SCHEDULE; schedules are {', '.join(ANNEALING)}"
        )
    if not rest:
        return (NoiseSchedule(int(first)),) * steps
    most, least, end = int(first), int(last), max(steps - 1, 1)
    counts = [least + math.floor(ANNEALING[kind](k, end) * (most - least)) for k in range(steps)]
    return tuple(NoiseSchedule(count, last=DISA_LAST_TIMESTEP) for count in counts)
