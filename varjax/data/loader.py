"""From a dataset to batches: shuffled, augmented, shared out to processes, resumed anywhere."""

import dataclasses
import functools
import os
import sys
from collections.abc import Iterator
from typing import Literal, Protocol

import grain
import numpy as np

Split = Literal["train", "held_out"]
Batch = dict[str, np.ndarray]


class Source(Protocol):
    """Examples by index: {"image": uint8 (H, W, C), "label": int}."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


class Dataset(Protocol):
    """A frozen dataclass that says where examples come from and how they are augmented."""

    @property
    def classes(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    def source(self, split: Split) -> Source: ...

    def augment(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The training view of an image, shaped `image_shape`."""
        ...

    def prepare(self, image_HWC: np.ndarray) -> np.ndarray:
        """The evaluation view of an image, shaped `image_shape`."""
        ...


@dataclasses.dataclass(frozen=True)
class Loader:
    """Batches of a dataset, of which this process gets `rows` (None: all).

    The training stream runs on over the ends of epochs, shuffled anew for each. Its batch i is a
    function of (seed, i) alone: not of where a run was resumed, nor of how its rows are shared out
    to processes.
    """

    data: Dataset
    batch_size: int  # of all processes together
    seed: int = 0
    rows: range | None = None

    def __post_init__(self):
        rows = self.rows
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}, but must be at least 1")
        if rows is not None and (
            not rows or rows.step != 1 or rows.start < 0 or rows.stop > self.batch_size
        ):
            raise ValueError(f"rows is {rows}; give some of range(0, {self.batch_size})")

    @functools.cached_property
    def train_source(self) -> Source:
        return self.data.source("train")

    @functools.cached_property
    def held_out_source(self) -> Source:
        return self.data.source("held_out")

    def train(self, position: int = 0) -> Iterator[Batch]:
        """Endless {"image_BHWC", "label_B"} from batch number `position` on, at once."""
        return _threaded(self.train_batch, position, sys.maxsize)

    def held_out(self) -> Iterator[Batch]:
        """All held-out examples once; rows that pad the last batch have "valid_B" False."""
        return _threaded(self.held_out_batch, 0, -(-len(self.held_out_source) // self.batch_size))

    def train_batch(self, number: int) -> Batch:
        """This process's rows of the training batch `number`."""
        return _stack([self._train_example(index) for index in self._rows(number)])

    def held_out_batch(self, number: int) -> Batch:
        """This process's rows of the held-out batch `number`."""
        size, rows = len(self.held_out_source), self._rows(number)
        examples = [self.held_out_source[min(index, size - 1)] for index in rows]
        examples = [(self.data.prepare(e["image"]), e["label"]) for e in examples]
        return _stack(examples) | {"valid_B": np.array([index < size for index in rows])}

    def _rows(self, number: int) -> range:
        rows, start = self.rows or range(self.batch_size), number * self.batch_size
        return range(start + rows.start, start + rows.stop)

    def _train_example(self, index: int) -> tuple[np.ndarray, int]:
        size = len(self.train_source)
        order = _permutation(self.seed, index // size, size)
        example = self.train_source[int(order[index % size])]
        rng = np.random.default_rng((self.seed, 1, index))
        return self.data.augment(example["image"], rng), example["label"]


@functools.lru_cache(maxsize=4)  # batches being made at the same time may lie in two epochs
def _permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    return np.random.default_rng((seed, 0, epoch)).permutation(size)


def _stack(examples: list[tuple[np.ndarray, int]]) -> Batch:
    images, labels = zip(*examples, strict=True)
    return {"image_BHWC": np.stack(images), "label_B": np.array(labels, np.int32)}


def _threaded(make_batch, start: int, stop: int) -> Iterator[Batch]:
    threads = min(os.cpu_count() or 1, 16)
    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 2)
    return iter(grain.MapDataset.range(start, stop).map(make_batch).to_iter_dataset(options))
