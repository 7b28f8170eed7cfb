"""Turns a dataset into batches: shuffled, augmented, divided among processes, resumable."""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from varjax.data.stream import (
    Dataset,
    ExampleSource,
    ExampleStream,
    ExampleTransform,
    ImageDataset,
    ImageTransform,
    StreamRows,
    spread_indices,
)
from varjax.data.workers import ReaderPool
from varjax.errors import InputError
from varjax.storage.image_files import BrokenImageCounter

BatchArrays = dict[str, np.ndarray]
BATCHES_AHEAD = 2  # batches prepared while another one is used
RANGE_IMAGES = 64  # number of images whose range of values is checked
SMALL_RANGE = 26  # a tenth of 0 … 255
MAX_ROWS = 2**20  # in a batch, whose positions and arrays are held in memory


@dataclasses.dataclass(frozen=True)
class Loader:
    """Makes this process's rows of each batch of a dataset.

    The training stream has no end, and each epoch is shuffled differently. Its batch i depends only
    on (seed, i), not on where a run was resumed, nor on how processes divide the rows. Threads or
    worker processes (`data.reading`) read at most three batches at a time. Each broken image is
    reported once; InputError when more than 1 % of a split are broken, or most of the images
    read first.

        loader = make_loader(Digits(), batch_size=64, seed=0)
        for batch in loader.train(position=100):  # {"image_BHWC": uint8, "label_B": int32}
            ...

    Attributes:
        data: stream of examples, read from `data.source` as `data.reading` says.
        transform: function that makes rows from the examples of `data.source`.
        batch_size: rows of a batch, over all processes.
        seed: random seed of shuffling and augmentation.
        rows: indices of this process's rows in each batch, ascending; None for all.
        tokenizer_identity: `Task.tokenizer_identity` of the tokenizer that made the latents in the
            batches; None for batches of images.
        held_out_images: largest number of held-out images, spread over the split (and thus over the
            classes of a folder) by `spread_indices`; 0 for all.
    """

    data: Dataset
    transform: ExampleTransform
    batch_size: int
    seed: int = 0
    rows: Sequence[int] | None = None
    tokenizer_identity: Mapping[str, Any] | None = None
    held_out_images: int = 0

    def __post_init__(self):
        if self.batch_size < 1:
            raise InputError(f"batch_size is {self.batch_size}, but must be at least 1")
        if self.batch_size > MAX_ROWS:
            raise InputError(f"batch_size is {self.batch_size}, but must be at most {MAX_ROWS:,}")
        if self.rows is not None:
            rows = np.asarray(self.rows)
            if (
                not rows.size
                or rows[0] < 0
                or rows[-1] >= self.batch_size
                or any(rows[1:] <= rows[:-1])
            ):
                raise InputError(
                    f"rows is {self.rows}; must be ascending, in range(0, {self.batch_size})"
                )

    @property
    def train_source(self) -> ExampleSource:
        return self.stream.train_source

    @property
    def held_out_source(self) -> ExampleSource:
        return self.stream.held_out_source

    def train(self, position: int = 0) -> Iterator[BatchArrays]:
        """Yields training batches without end, starting at batch `position`."""
        return self._train(itertools.count(position))

    def train_batch(self, number: int) -> BatchArrays:
        """Returns this process's rows of the training batch `number`."""
        return next(self._train([number]))

    def held_out(self) -> Iterator[BatchArrays]:
        """Yields the held-out examples once; "valid_B" is False for padding and broken images."""
        return self._held_out(range(-(-len(self.stream.held_out_indices) // self.batch_size)))

    def held_out_batch(self, number: int) -> BatchArrays:
        """Returns this process's rows of the held-out batch `number`."""
        return next(self._held_out([number]))

    def held_out_spread(self, images: int) -> BatchArrays:
        """Returns this process's rows of a batch of a few held-out images, then of padding.

        The images are spread over the split, because many sources hold theirs class by class.

        Args:
            images: number of images.
        """
        size = len(self.stream.held_out_indices)
        spread = spread_indices(size, min(images, self.batch_size))
        positions = [int(spread[row]) if row < len(spread) else size for row in self._positions(0)]
        return next(self._read_held_out([positions]))

    @functools.cached_property
    def stream(self) -> ExampleStream:
        """The rows of all batches, by position."""
        return ExampleStream(self.data, self.transform, self.seed, self.held_out_images)

    @functools.cached_property
    def readers(self) -> ReaderPool:
        """The threads or processes that read for all iterators of this loader."""
        if self.data.reading.workers:  # lists the files once, not in each worker
            _ = self.train_source, self.held_out_source
        return ReaderPool(self.stream, self.data.reading)

    @functools.cached_property
    def range_check(self) -> "RangeCheck":
        """The check of the first training images."""
        return RangeCheck()

    @functools.cached_property
    def _train_counter(self) -> BrokenImageCounter:
        return BrokenImageCounter(len(self.train_source))

    @functools.cached_property
    def _held_out_counter(self) -> BrokenImageCounter:
        return BrokenImageCounter(len(self.stream.held_out_indices))

    def _train(self, numbers: Iterable[int]) -> Iterator[BatchArrays]:
        batches = (self._positions(number) for number in numbers)
        read = read_ahead(self.readers, self._train_counter, batches, ExampleStream.train)
        return self.range_check.watch(read)

    def _held_out(self, numbers: Iterable[int]) -> Iterator[BatchArrays]:
        return self._read_held_out(self._positions(number) for number in numbers)

    def _read_held_out(self, batches: Iterable[list[int]]) -> Iterator[BatchArrays]:
        return read_ahead(self.readers, self._held_out_counter, batches, ExampleStream.held_out)

    def _positions(self, number: int) -> list[int]:
        rows = range(self.batch_size) if self.rows is None else self.rows
        return [number * self.batch_size + int(row) for row in rows]


def make_loader(
    data: ImageDataset, batch_size: int, seed: int = 0, rows: Sequence[int] | None = None
) -> Loader:
    """Makes the loader of a dataset of images; each such dataset has it as its method `make`.

    Args:
        data: dataset, as defined in `varjax.data.sources`.
        batch_size: rows of a batch, over all processes.
        seed: random seed of shuffling and augmentation.
        rows: indices of this process's rows in each batch, ascending; None for all.
    """
    return Loader(data, ImageTransform(data), batch_size, seed, rows)


class RangeCheck:
    """Warns once if the first images of a split use only a small part of the range 0 … 255."""

    def __init__(self):
        self._left = RANGE_IMAGES
        self._low, self._high = 255, 0

    def watch(self, batches: Iterator[BatchArrays]) -> Iterator[BatchArrays]:
        """Yields the batches, and checks the first images in them."""
        for batch in batches:
            if self._left > 0 and "image_BHWC" in batch:
                self._look(batch)
            yield batch

    def _look(self, batch: BatchArrays) -> None:
        valid_B = batch.get("valid_B", np.ones(len(batch["image_BHWC"]), bool))
        image_BHWC = batch["image_BHWC"][valid_B]
        self._left -= len(image_BHWC)
        self._low = min(self._low, int(image_BHWC.min(initial=255)))
        self._high = max(self._high, int(image_BHWC.max(initial=0)))
        if self._left <= 0 and self._high - self._low < SMALL_RANGE:
            tqdm.write(
                f"the first {RANGE_IMAGES - self._left} images only use values from {self._low} to "
                f"{self._high} of 0 … 255. If their files use fewer bits than their format (12 "
                "bits in 16), scale the files to the format's range",
                file=sys.stderr,
            )


def read_ahead(
    readers: ReaderPool,
    counter: BrokenImageCounter,
    batches: Iterable[Sequence[int]],
    function: Callable[..., StreamRows],
    *arguments: Any,
) -> Iterator[BatchArrays]:
    """Yields batches, and prepares the next two meanwhile.

    Calls `function(stream, chunk, *arguments)` in worker threads or processes, for chunks of each
    batch's positions, and joins the chunks' rows.

    Args:
        readers: readers of an `ExampleStream`.
        counter: counter of the images read and broken.
        batches: positions of each batch's rows.
        function: a method of `ExampleStream` that makes rows at positions.
        arguments: further arguments of `function`.
    """
    read = readers.map_ahead(_join, function, batches, *arguments, ahead=BATCHES_AHEAD)
    for rows in read:
        counter.add(rows.read, rows.broken)
        yield rows.arrays


def _join(chunks: list[StreamRows]) -> StreamRows:
    names = chunks[0].arrays
    arrays = {name: np.concatenate([chunk.arrays[name] for chunk in chunks]) for name in names}
    broken = [error for chunk in chunks for error in chunk.broken]
    return StreamRows(arrays, sum(chunk.read for chunk in chunks), broken)
