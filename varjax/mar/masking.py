"""Order of the tokens, and how many of them each step draws."""

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np

from varjax.errors import InputError
from varjax.mar.model import MARConfig
from varjax.nn.rng import ImageStream, stream_keys

Array = np.ndarray | jax.Array

MAX_GROUPS = 8  # loops in a sampling program
MIN_GROUP_STEPS = 3  # for fewer steps, compiling costs more time than padding
# Work for a new token, in units of a known token's in the encoder: 40 for MAR-B with 100 diffusion
# steps, 2 with 5.
NEW_TOKEN_WORK = 8


def draw_orders(config: MARConfig, key_B: jax.Array, keep_BL: jax.Array | None = None) -> jax.Array:
    """Draws the order in which positions become known, (B, L) int32.

    Args:
        config: config of the transformer, whose `order` decides.
        key_B: one key per image.
        keep_BL: True at positions that come first; ignored by a causal model in raster order.
    """
    order_BL = jnp.broadcast_to(
        jnp.arange(config.length, dtype=jnp.int32), (key_B.shape[0], config.length)
    )
    if config.order == "random":
        order_key_B = stream_keys(key_B, ImageStream.ORDER)
        order_BL = jax.vmap(jax.random.permutation)(order_key_B, order_BL)
    elif config.causal:
        return order_BL
    if keep_BL is None:
        return order_BL
    return take_at(order_BL, jnp.argsort(~take_at(keep_BL, order_BL), axis=1, stable=True))


def take_at(x_BL: Array, position_Bn: Array) -> jax.Array:
    """Takes the entries (B, n, …) of (B, L, …) at each image's positions."""
    return jax.vmap(lambda x_L, position_n: x_L[position_n])(x_BL, position_Bn)


def put_at(x_BL: jax.Array, position_Bn: jax.Array, new_Bn: jax.Array) -> jax.Array:
    """Replaces the entries of (B, L, …) at each image's positions; position L is ignored."""

    def put(x_L, position_n, new_n):
        return x_L.at[position_n].set(new_n, mode="drop")

    return jax.vmap(put)(x_BL, position_Bn, new_Bn)


def known_after_steps(
    order_BL: jax.Array,
    schedule: "UnmaskingSchedule",
    keep_BL: jax.Array | None = None,
    first: int = 0,
) -> jax.Array:
    """Returns which positions are known after each step, (S, B, L) bool.

    Args:
        order_BL: positions in the order in which they become known.
        schedule: number of tokens that each step draws.
        keep_BL: True at positions that are known from the start; None for whole images.
        first: first step to return.
    """
    rank_BL = jnp.argsort(order_BL, axis=1)
    known_SBL = rank_BL[None] < np.array(schedule.known[first + 1 :])[:, None, None]
    return known_SBL if keep_BL is None else known_SBL | keep_BL[None]


@dataclasses.dataclass(frozen=True)
class StepGroup:
    """Groups consecutive steps that are computed in arrays of the same size.

    Attributes:
        steps: numbers of the steps.
        counts: number of known tokens before each of the steps, and after the last one.
        known: largest number of tokens that the encoder reads.
        new: largest number of tokens that a step draws.
    """

    steps: range
    counts: tuple[int, ...]
    known: int
    new: int


@dataclasses.dataclass(frozen=True)
class UnmaskingSchedule:
    """Draws more tokens per step as more are known, along a cosine, as MaskGIT and MAR do.

        schedule = UnmaskingSchedule(length=256, steps=64)
        schedule.known  # (0, 1, 2, …, 256)

    Raises InputError for a number of steps that is not 1 … length.

    Attributes:
        length: number of tokens L.
        steps: number of sampling steps, 1 … L.
        group_count: number of loops that compute the steps; 0 for one per step, None to choose
            automatically.
    """

    length: int
    steps: int
    group_count: int | None = None

    def __post_init__(self):
        if not 1 <= self.steps <= self.length or self.steps != int(self.steps):
            raise InputError(
                f"steps={self.steps}: must be a whole number, 1 … {self.length} (the number of "
                "tokens)"
            )

    @functools.cached_property
    def masked_after(self) -> tuple[int, ...]:
        """Number of masked tokens after each step by the cosine, at least 1."""
        masked, counts = self.length, []
        for i in range(self.steps):
            cosine = math.floor(self.length * np.cos(np.pi / 2 * (i + 1) / self.steps))
            masked = max(1, min(masked - 1, cosine))
            counts.append(masked)
        return tuple(counts)

    @functools.cached_property
    def known(self) -> tuple[int, ...]:
        """Number of known tokens before each step, and L at the end."""
        return 0, *(self.length - masked for masked in self.masked_after[:-1]), self.length

    @functools.cached_property
    def guidance_ramp(self) -> np.ndarray:
        """MAR's ramp of guidance (steps,): the fraction of tokens known after each step.

        It counts by `masked_after`, so the last one is (L - 1) / L, as in the reference.
        """
        return 1 - np.array(self.masked_after, np.float32) / self.length

    def groups(
        self, min_kept: int = 0, max_kept: int = 0, guided: tuple[int, int] = (0, 0)
    ) -> tuple[StepGroup, ...]:
        """Groups the steps into loops, so that padding adds the least work.

        Args:
            min_kept: smallest number of tokens known at the start, over the images of a batch;
                groups that draw no further tokens are left out.
            max_kept: largest number of tokens known at the start, over the images of a batch.
            guided: first step with guidance, and the first one after those with it, where a group
                ends.
        """
        count = self.group_count
        if count is None:
            count = min(MAX_GROUPS, math.ceil(self.steps / MIN_GROUP_STEPS))
        count = min(count or self.steps, self.steps)
        edges = sorted({*self._least_padded(count), *guided})
        # Rounded up to eighths of all tokens, so that masks need few compiled sizes.
        unit = math.ceil(self.length / MAX_GROUPS)
        kept = min(math.ceil(max_kept / unit) * unit, self.length)
        groups = []
        for start, stop in itertools.pairwise(edges):
            counts = self.known[start : stop + 1]
            if counts[-1] > min_kept:
                new = max(after - before for before, after in itertools.pairwise(counts))
                groups.append(StepGroup(range(start, stop), counts, max(counts[-2], kept), new))
        return tuple(groups)

    def _least_padded(self, count: int) -> list[int]:
        """Returns the first steps of `count` groups with the least padded work, and the end.

        The best last group is found for each number of groups and each end, in turn.
        """
        S, known_S, new_S = self.steps, np.array(self.known[:-1]), np.diff(self.known)
        work_SS = np.full((S + 1, S + 1), np.inf)  # of one group, by its first step and its end
        for start in range(S):
            step_work = NEW_TOKEN_WORK * np.maximum.accumulate(new_S[start:]) + known_S[start:]
            work_SS[start, start + 1 :] = step_work * np.arange(1, S - start + 1)
        least_S, starts = work_SS[0], []
        for _ in range(count - 1):
            total_SS = least_S[:, None] + work_SS
            starts.append(np.argmin(total_SS, axis=0))
            least_S = np.min(total_SS, axis=0)
        edges = [S]
        for start_S in reversed(starts):
            edges.append(int(start_S[edges[-1]]))
        return [0, *reversed(edges)]
