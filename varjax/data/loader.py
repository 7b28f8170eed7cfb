"""From a dataset to batches: shuffled, augmented, shared out to processes, resumed anywhere."""

import collections
import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, cast

import numpy as np
from tqdm import tqdm

from varjax.core.errors import InputError
from varjax.data.stream import (
    Dataset,
    Examples,
    ImageDataset,
    ImageViews,
    Part,
    Source,
    Views,
)
from varjax.data.workers import Readers

Batch = dict[str, np.ndarray]
AHEAD = 2  # batches in the making while another one is used
BROKEN_SHARE = 0.01
FEW_BROKEN = 10  # do not stop a run, however early they come


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of a dataset, of which this process gets `rows` (None: all).

    The training stream runs on over the ends of epochs, shuffled anew for each. Its batch i is a
    function of (seed, i) alone: not of where a run was resumed, nor of how its rows are shared out
    to processes. Examples are read in threads or worker processes (`data.reading`), no more than
    three batches of them at a time.

    Broken images are named once; ValueError as soon as they are more than 1 % of a split.
    """

    data: Dataset
    batch_size: int  # of all processes together
    seed: int = 0
    rows: range | None = None
    views: Views | None = None  # None: the data's images
    tokenized_by: Mapping[str, Any] | None = None  # what made the tokens that there are instead

    def __post_init__(self):
        rows = self.rows
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}, but must be at least 1")
        if rows is not None and (
            not rows or rows.step != 1 or rows.start < 0 or rows.stop > self.batch_size
        ):
            raise InputError(f"rows is {rows}; give some of range(0, {self.batch_size})")

    @property
    def train_source(self) -> Source:
        return self.examples.train_source

    @property
    def held_out_source(self) -> Source:
        return self.examples.held_out_source

    def train(self, position: int = 0) -> Iterator[Batch]:
        """Endless {"image_BHWC" or "tokens_BL", "label_B"} from batch `position` on, at once."""
        return self._train(itertools.count(position))

    def train_batch(self, number: int) -> Batch:
        """This process's rows of the training batch `number`."""
        return next(self._train([number]))

    def held_out(self) -> Iterator[Batch]:
        """All held-out examples once; rows without one, pads or broken, have "valid_B" False."""
        return self._held_out(range(-(-len(self.held_out_source) // self.batch_size)))

    def held_out_batch(self, number: int) -> Batch:
        """This process's rows of the held-out batch `number`."""
        return next(self._held_out([number]))

    @functools.cached_property
    def examples(self) -> Examples:
        """The rows that batches are made of, by position."""
        return Examples(
            self.data, self.views or ImageViews(cast(ImageDataset, self.data)), self.seed
        )

    @functools.cached_property
    def readers(self) -> Readers:
        """What reads for all streams of this loader."""
        if self.data.reading.workers:  # so that not each of them lists the files
            _ = self.train_source, self.held_out_source
        return Readers(self.examples, self.data.reading)

    @functools.cached_property
    def _train_tally(self) -> "Tally":
        return Tally(len(self.train_source))

    @functools.cached_property
    def _held_out_tally(self) -> "Tally":
        return Tally(len(self.held_out_source))

    def _train(self, numbers: Iterable[int]) -> Iterator[Batch]:
        batches = (self._positions(number) for number in numbers)
        return stream(self.readers, self._train_tally, batches, Examples.train)

    def _held_out(self, numbers: Iterable[int]) -> Iterator[Batch]:
        batches = (self._positions(number) for number in numbers)
        return stream(self.readers, self._held_out_tally, batches, Examples.held_out)

    def _positions(self, number: int) -> range:
        rows, start = self.rows or range(self.batch_size), number * self.batch_size
        return range(start + rows.start, start + rows.stop)


class Tally:
    """Counts the images of a split that were read and those that are broken, and names these."""

    def __init__(self, size: int):
        self._size, self._read = size, 0
        self._names: dict[str, None] = {}  # in the order in which they came

    def add(self, part: Part) -> None:
        """ValueError where more than 1 % are broken, of those read so far but for the first few."""
        self._read += part.read
        for error in part.broken:
            if error.name not in self._names:
                self._names[error.name] = None
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        read, broken = min(self._read, self._size), len(self._names)
        few = min(FEW_BROKEN, BROKEN_SHARE * self._size)
        if broken > max(BROKEN_SHARE * read, few):
            some = "\n  ".join(itertools.islice(self._names, FEW_BROKEN))
            raise InputError(
                f"{broken} of the {read} images read so far are broken, more than "
                f"{BROKEN_SHARE:.0%}; repair or remove them, the first ones are\n  {some}"
            )


def stream(
    readers: Readers,
    tally: Tally,
    batches: Iterable[range],
    function: Callable[..., Part],
    *arguments: Any,
) -> Iterator[Batch]:
    """The rows at the positions of each batch, two batches ahead of what is consumed."""
    pending = collections.deque()
    try:
        for positions in batches:
            pending.append(readers.submit(_join, function, positions, *arguments))
            if len(pending) > AHEAD:
                yield _counted(pending.popleft().result(), tally)
        while pending:
            yield _counted(pending.popleft().result(), tally)
    finally:
        for batch in pending:
            batch.cancel()


def _counted(part: Part, tally: Tally) -> Batch:
    tally.add(part)
    return part.rows


def _join(parts: list[Part]) -> Part:
    rows = {name: np.concatenate([part.rows[name] for part in parts]) for name in parts[0].rows}
    broken = [error for part in parts for error in part.broken]
    return Part(rows, sum(part.read for part in parts), broken)
