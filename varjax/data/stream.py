"""Which example stands where: a pure function of dataset, seed and position."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import numpy as np

from varjax.core.errors import InputError
from varjax.data.decoding import BrokenImage
from varjax.data.workers import Reading

Split = Literal["train", "held_out"]
Example = dict[str, Any]  # one row of a batch, its arrays named like the batch's
MOST_IN_A_ROW = 100  # broken images; more of them in a shuffled order means that nearly all are


class Source(Protocol):
    """Examples by index: {"image": uint8 (H, W, C), "label": int}; BrokenImage for some."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


class Dataset(Protocol):
    """A frozen dataclass that says where examples come from, and how they are read."""

    @property
    def classes(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def reading(self) -> Reading: ...

    def source(self, split: Split) -> Source: ...


class ImageDataset(Dataset, Protocol):
    """One whose images are augmented anew in each epoch."""

    def augment(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The training view of an image, shaped `image_shape`."""
        ...

    def prepare(self, image_HWC: np.ndarray) -> np.ndarray:
        """The evaluation view of an image, shaped `image_shape`."""
        ...


class Views(Protocol):
    """What of a source's example goes into a batch."""

    def train(self, example: dict, epoch: int, rng: np.random.Generator) -> Example: ...

    def held_out(self, example: dict) -> Example: ...

    def blank(self) -> Example:
        """In place of one that there is not."""
        ...


@dataclasses.dataclass(frozen=True)
class ImageViews:
    """Images as their dataset augments or prepares them."""

    data: ImageDataset

    def train(self, example: dict, epoch: int, rng: np.random.Generator) -> Example:
        return _image(self.data.augment(example["image"], rng), example["label"])

    def held_out(self, example: dict) -> Example:
        return _image(self.data.prepare(example["image"]), example["label"])

    def blank(self) -> Example:
        return _image(np.zeros(self.data.image_shape, np.uint8), 0)


@dataclasses.dataclass(frozen=True)
class Part:
    """Some rows of a batch, how many images were read for them, and which of these are broken."""

    rows: dict[str, np.ndarray]
    read: int
    broken: list[BrokenImage]


@dataclasses.dataclass(frozen=True)
class Examples:
    """The rows of a dataset's training and held-out streams, by position. Can be pickled."""

    data: Dataset
    views: Views
    seed: int

    @functools.cached_property
    def train_source(self) -> Source:
        return self.data.source("train")

    @functools.cached_property
    def held_out_source(self) -> Source:
        return self.data.source("held_out")

    def train(self, positions: Iterable[int]) -> Part:
        """Of an endless stream: epoch after epoch, each in its own order.

        A broken image is replaced by the next one in the epoch's order. ValueError where too many
        of those are broken as well.
        """
        broken: list[BrokenImage] = []
        rows = [self._train_row(position, broken) for position in positions]
        return _part(rows, len(rows) + len(broken), broken)

    def held_out(self, positions: Iterable[int]) -> Part:
        """In the source's order; "valid_B" is False for broken images and beyond the end."""
        rows, broken, read = [], [], 0
        for position in positions:
            row = self.views.blank() | {"valid_B": np.bool_(False)}
            if position < len(self.held_out_source):
                read += 1
                try:
                    example = self.held_out_source[position]
                    row = self.views.held_out(example) | {"valid_B": np.bool_(True)}
                except BrokenImage as error:
                    broken.append(error)
            rows.append(row)
        return _part(rows, read, broken)

    def augmented(self, positions: Iterable[int], augmentations: int) -> Part:
        """Of all training images in the source's order, each as the first epochs show it.

        Position i·augmentations + e is image i in epoch e; "valid_B" is False for broken images.
        """
        rows, broken, read = [], [], 0
        by_image = itertools.groupby(positions, lambda position: position // augmentations)
        for image, same in by_image:
            read += 1
            try:
                example = self.train_source[image]
            except BrokenImage as error:
                broken.append(error)
                rows += [self.views.blank() | {"valid_B": np.bool_(False)} for _ in same]
                continue
            for position in same:
                epoch = position % augmentations
                place = int(_places(self.seed, epoch, len(self.train_source))[image])
                rows.append(self._view(example, epoch, place) | {"valid_B": np.bool_(True)})
        return _part(rows, read, broken)

    def _train_row(self, position: int, broken: list[BrokenImage]) -> Example:
        size = len(self.train_source)
        epoch, place = divmod(position, size)
        order_N = _order(self.seed, epoch, size)
        for step in range(min(size, MOST_IN_A_ROW)):
            there = (place + step) % size
            try:
                return self._view(self.train_source[int(order_N[there])], epoch, there)
            except BrokenImage as error:
                broken.append(error)
        raise InputError(f"{step + 1} images in a row are broken; the last one: {broken[-1]}")

    def _view(self, example: dict, epoch: int, place: int) -> Example:
        rng = np.random.default_rng((self.seed, 1, epoch * len(self.train_source) + place))
        return self.views.train(example, epoch, rng)


@functools.lru_cache(maxsize=4)  # batches being made at the same time may lie in two epochs
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    """The image at each place of an epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(size)


@functools.lru_cache(maxsize=64)
def _places(seed: int, epoch: int, size: int) -> np.ndarray:
    """The place of each image in an epoch."""
    places_N = np.empty(size, np.int32)
    places_N[_order(seed, epoch, size)] = np.arange(size, dtype=np.int32)
    return places_N


def _image(image_HWC: np.ndarray, label: int) -> Example:
    return {"image_BHWC": image_HWC, "label_B": np.int32(label)}


def _part(rows: list[Example], read: int, broken: list[BrokenImage]) -> Part:
    return Part({name: np.stack([row[name] for row in rows]) for name in rows[0]}, read, broken)
