"""Decides which example stands where: a pure function of dataset, seed and position."""

import dataclasses
import functools
import itertools
from collections.abc import Iterable
from typing import Any, Literal, Protocol

import numpy as np

from varjax.data.workers import ReadOptions
from varjax.errors import InputError
from varjax.storage.image_files import BrokenImage

Split = Literal["train", "held_out"]
Example = dict[str, Any]  # one row of a batch, its arrays named like the batch's
MAX_BROKEN_IN_A_ROW = 100  # more, in a shuffled order, mean that nearly all images are broken


class ExampleSource(Protocol):
    """Examples by index, as they are stored.

    An example is {"image": uint8 (H, W, C), "label": int}, or what the dataset's own
    `ExampleTransform` takes. Reading one may raise BrokenImage, which is skipped, or StorageError,
    which says nothing about the image and ends the run.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


class Dataset(Protocol):
    """Where examples come from, and how they are read: a frozen dataclass.

    Implemented by everything in `varjax.data.sources`, and by `varjax.data.latents.CachedLatents`.
    """

    @property
    def classes(self) -> int:
        """The number of classes; labels are below it."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of every image in a batch."""
        ...

    @property
    def reading(self) -> ReadOptions: ...

    def source(self, split: Split) -> ExampleSource:
        """Opens a split; its order is the same in all processes and runs."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns JSON data: "class_names", and what identifies "train" and "held_out".

        Also "pixels", `pixels_digest`, where Pillow decodes images.
        """
        ...


class ImageDataset(Dataset, Protocol):
    """A dataset of images that are augmented differently in each epoch."""

    @property
    def alternating_views(self) -> int:
        """Number of views by which `augment` alternates: 2 for flips in turn, 1 for none."""
        ...

    def augment(self, image_HWC: np.ndarray, view: int, rng: np.random.Generator) -> np.ndarray:
        """Makes a training image of `image_shape`, always drawing as many numbers.

        Args:
            image_HWC: image as the source stores it.
            view: number of the image's view, one more in each epoch. It is for augmentations that
                alternate between epochs; `rng` knows nothing of other epochs. The first view's
                number is the image's index, so that both alternatives occur in each epoch.
            rng: random generator of this image in this epoch.
        """
        ...

    def preprocess(self, image_HWC: np.ndarray) -> np.ndarray:
        """Makes an evaluation image of `image_shape`."""
        ...


class ExampleTransform(Protocol):
    """Makes rows of a batch out of stored examples."""

    def train(self, example: dict, index: int, epoch: int, rng: np.random.Generator) -> Example:
        """Makes a training row.

        Args:
            example: example as the source returns it.
            index: index of the example in the source.
            epoch: number of the epoch that shows the example.
            rng: random generator of this example in this epoch.
        """
        ...

    def held_out(self, example: dict) -> Example:
        """Makes an evaluation row."""
        ...

    def blank(self) -> Example:
        """Makes the row in place of a missing or broken example."""
        ...


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Makes {"image_BHWC", "label_B"} as a dataset augments or preprocesses its images."""

    data: ImageDataset

    def train(self, example: dict, index: int, epoch: int, rng: np.random.Generator) -> Example:
        image_HWC = self.data.augment(example["image"], index + epoch, rng)
        return _image_row(image_HWC, example["label"])

    def held_out(self, example: dict) -> Example:
        return _image_row(self.data.preprocess(example["image"]), example["label"])

    def blank(self) -> Example:
        return _image_row(np.zeros(self.data.image_shape, np.uint8), 0)


@dataclasses.dataclass(frozen=True)
class ArraySource:
    """Examples held in memory as two arrays."""

    images_NHWC: np.ndarray
    labels_N: np.ndarray

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images_NHWC[index], "label": int(self.labels_N[index])}


@dataclasses.dataclass(frozen=True)
class StreamRows:
    """Consecutive rows of a batch, and what came of reading them.

    Attributes:
        arrays: arrays by name, whose leading axis counts the rows.
        read: number of images read for them.
        broken: images among these that could not be decoded.
    """

    arrays: dict[str, np.ndarray]
    read: int
    broken: list[BrokenImage]


@dataclasses.dataclass(frozen=True)
class ExampleStream:
    """Makes the rows of a dataset's training and held-out streams, by position. Can be pickled."""

    data: Dataset
    transform: ExampleTransform
    seed: int

    @functools.cached_property
    def train_source(self) -> ExampleSource:
        return self.data.source("train")

    @functools.cached_property
    def held_out_source(self) -> ExampleSource:
        return self.data.source("held_out")

    def train(self, positions: Iterable[int]) -> StreamRows:
        """Makes rows of an endless stream: epoch after epoch, each in its own order.

        A broken image is replaced by the next one in the epoch's order. Raises InputError where too
        many of those are broken as well.
        """
        broken: list[BrokenImage] = []
        rows = [self._train_row(position, broken) for position in positions]
        return _stack(rows, len(rows) + len(broken), broken)

    def held_out(self, positions: Iterable[int]) -> StreamRows:
        """Makes rows in the source's order; "valid_B" is False for broken ones and past the end."""
        rows, broken, read = [], [], 0
        for position in positions:
            row = self.transform.blank() | {"valid_B": np.bool_(False)}
            if position < len(self.held_out_source):
                read += 1
                try:
                    example = self.held_out_source[position]
                    row = self.transform.held_out(example) | {"valid_B": np.bool_(True)}
                except BrokenImage as error:
                    broken.append(error)
            rows.append(row)
        return _stack(rows, read, broken)

    def augmented(self, positions: Iterable[int], augmentations: int) -> StreamRows:
        """Makes rows of all training images in the source's order, as the first epochs show them.

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
                rows += [self.transform.blank() | {"valid_B": np.bool_(False)} for _ in same]
                continue
            for position in same:
                epoch = position % augmentations
                place = int(_places(self.seed, epoch, len(self.train_source))[image])
                row = self._transformed(example, image, epoch, place)
                rows.append(row | {"valid_B": np.bool_(True)})
        return _stack(rows, read, broken)

    def _train_row(self, position: int, broken: list[BrokenImage]) -> Example:
        size = len(self.train_source)
        epoch, place = divmod(position, size)
        order_N = _order(self.seed, epoch, size)
        for step in range(min(size, MAX_BROKEN_IN_A_ROW)):
            there = (place + step) % size
            index = int(order_N[there])
            try:
                return self._transformed(self.train_source[index], index, epoch, there)
            except BrokenImage as error:
                broken.append(error)
        raise InputError(f"{step + 1} images in a row are broken; the last one: {broken[-1]}")

    def _transformed(self, example: dict, index: int, epoch: int, place: int) -> Example:
        rng = np.random.default_rng((self.seed, 1, epoch * len(self.train_source) + place))
        return self.transform.train(example, index, epoch, rng)


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


def _image_row(image_HWC: np.ndarray, label: int) -> Example:
    return {"image_BHWC": image_HWC, "label_B": np.int32(label)}


def _stack(rows: list[Example], read: int, broken: list[BrokenImage]) -> StreamRows:
    return StreamRows(
        {name: np.stack([row[name] for row in rows]) for name in rows[0]}, read, broken
    )
