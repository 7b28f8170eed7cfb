"""Chooses the example at each position of a stream, by dataset, seed and position alone."""

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
# Fields of a dataset that do not determine its images.
LOCATION_FIELDS = ("root", "name", "data_dir", "reading")
GOLDEN_RATIO = (1 + 5**0.5) / 2
MAX_AUGMENTATIONS = 64  # in a cache; the order of all images in each of them is in memory
MAX_BROKEN_IN_A_ROW = 100  # in a shuffled order, more mean that nearly all images are broken


class ExampleSource(Protocol):
    """Stored examples by index.

    An example is {"image": uint8 (H, W, C), "label": int}, or the input of the dataset's own
    `ExampleTransform`. Reading one may raise BrokenImage, which skips it, or StorageError, which
    ends the run because the machine failed.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict: ...


class Dataset(Protocol):
    """A source of examples, with its settings: a frozen dataclass.

    Implemented by everything in `varjax.data.sources`, and by `varjax.data.latents.CachedLatents`.
    """

    @property
    def classes(self) -> int:
        """The number of classes; labels are below it."""
        ...

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of the images in a batch."""
        ...

    @property
    def reading(self) -> ReadOptions: ...

    def source(self, split: Split) -> ExampleSource:
        """Opens a split; its order is the same in all processes and runs."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns JSON data: "class_names", and the identities of "train" and "held_out".

        Also "pixels", from `pixels_digest`, if Pillow decodes the images.
        """
        ...


class ImageDataset(Dataset, Protocol):
    """A dataset of images that are augmented differently in each epoch."""

    @property
    def alternating_views(self) -> int:
        """The number of views that `augment` alternates between: 2 if flips alternate, else 1."""
        ...

    def augment(self, image_HWC: np.ndarray, view: int, rng: np.random.Generator) -> np.ndarray:
        """Makes a training image of `image_shape`, and always draws the same number of values.

        Args:
            image_HWC: image from the source.
            view: index of the image plus the epoch, for augmentations that alternate between
                epochs. Both alternatives thus occur in each epoch.
            rng: random generator of this image in this epoch.
        """
        ...

    def preprocess(self, image_HWC: np.ndarray) -> np.ndarray:
        """Makes an evaluation image of `image_shape`."""
        ...


class ExampleTransform(Protocol):
    """Makes rows of a batch from stored examples."""

    def train(self, example: dict, index: int, epoch: int, rng: np.random.Generator) -> Example:
        """Makes a training row.

        Args:
            example: example from the source.
            index: index of the example in the source.
            epoch: number of the epoch that shows the example.
            rng: random generator of this example in this epoch.
        """
        ...

    def held_out(self, example: dict) -> Example:
        """Makes an evaluation row."""
        ...

    def blank(self) -> Example:
        """Makes the row that replaces a missing or broken example."""
        ...


@dataclasses.dataclass(frozen=True)
class ImageTransform:
    """Makes {"image_BHWC", "label_B"} with the augmentation and preprocessing of a dataset."""

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
    """Consecutive rows of a batch, with the broken images found while reading them.

    Attributes:
        arrays: arrays by name, with the rows along the leading axis.
        read: number of images that were read, broken ones included.
        broken: images that could not be decoded.
    """

    arrays: dict[str, np.ndarray]
    read: int
    broken: list[BrokenImage]


@dataclasses.dataclass(frozen=True)
class ExampleStream:
    """Makes rows of the training and held-out streams of a dataset by position; can be pickled.

    Attributes:
        data: dataset whose sources are read.
        transform: function that makes rows from the examples.
        seed: random seed of shuffling and augmentation.
        held_out_images: largest number of held-out images, see `spread_indices`; 0 for all.
    """

    data: Dataset
    transform: ExampleTransform
    seed: int
    held_out_images: int = 0

    @functools.cached_property
    def train_source(self) -> ExampleSource:
        return self.data.source("train")

    @functools.cached_property
    def held_out_source(self) -> ExampleSource:
        return self.data.source("held_out")

    @functools.cached_property
    def held_out_indices(self) -> np.ndarray:
        """The indices in the source of the held-out images, in the order of the stream."""
        return spread_indices(len(self.held_out_source), self.held_out_images)

    def train(self, positions: Iterable[int]) -> StreamRows:
        """Makes rows of the endless training stream; each epoch has its own order.

        A broken image is replaced by the next one in the epoch's order. Raises InputError if too
        many in a row are broken.
        """
        broken: list[BrokenImage] = []
        rows = [self._train_row(position, broken) for position in positions]
        return _stack(rows, len(rows) + len(broken), broken)

    def held_out(self, positions: Iterable[int]) -> StreamRows:
        """Makes rows of `held_out_indices`; "valid_B" is False for broken images and padding."""
        rows, broken, read = [], [], 0
        for position in positions:
            row = self.transform.blank() | {"valid_B": np.bool_(False)}
            if position < len(self.held_out_indices):
                read += 1
                try:
                    example = self.held_out_source[int(self.held_out_indices[position])]
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
        for image, image_positions in by_image:
            read += 1
            try:
                example = self.train_source[image]
            except BrokenImage as error:
                broken.append(error)
                rows += [
                    self.transform.blank() | {"valid_B": np.bool_(False)} for _ in image_positions
                ]
                continue
            for position in image_positions:
                epoch = position % augmentations
                rank = int(_ranks(self.seed, epoch, len(self.train_source))[image])
                row = self._transformed(example, image, epoch, rank)
                rows.append(row | {"valid_B": np.bool_(True)})
        return _stack(rows, read, broken)

    def _train_row(self, position: int, broken: list[BrokenImage]) -> Example:
        size = len(self.train_source)
        epoch, first = divmod(position, size)
        order_N = _order(self.seed, epoch, size)
        for step in range(min(size, MAX_BROKEN_IN_A_ROW)):
            rank = (first + step) % size
            index = int(order_N[rank])
            try:
                return self._transformed(self.train_source[index], index, epoch, rank)
            except BrokenImage as error:
                broken.append(error)
        raise InputError(f"{step + 1} images in a row are broken; the last one: {broken[-1]}")

    def _transformed(self, example: dict, index: int, epoch: int, rank: int) -> Example:
        rng = np.random.default_rng((self.seed, 1, epoch * len(self.train_source) + rank))
        return self.transform.train(example, index, epoch, rng)


def spread_indices(size: int, limit: int) -> np.ndarray:
    """Chooses indices that are spread evenly over a source, always the same ones.

    Sources of folders and idx files hold their images class by class, so that each class gets its
    share. The first few indices are spread as well, because previews show them: the order is that
    of multiples of the golden ratio modulo 1.

    Args:
        size: number of examples in the source.
        limit: largest number of indices; 0 for no limit. Up to the limit, a source is taken whole
            and in its order.

    Returns:
        (min(size, limit),) int64.
    """
    if not limit or size <= limit:
        return np.arange(size)
    index_N = np.arange(limit) * size // limit
    return index_N[np.argsort(np.argsort(np.arange(limit) * GOLDEN_RATIO % 1))]


@functools.lru_cache(maxsize=4)  # pending batches may be in two epochs
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the indices of the images in the order of an epoch."""
    return np.random.default_rng((seed, 0, epoch)).permutation(size)


@functools.lru_cache(maxsize=MAX_AUGMENTATIONS)
def _ranks(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the rank of each image in the order of an epoch."""
    rank_N = np.empty(size, np.int32)
    rank_N[_order(seed, epoch, size)] = np.arange(size, dtype=np.int32)
    return rank_N


def _image_row(image_HWC: np.ndarray, label: int) -> Example:
    return {"image_BHWC": image_HWC, "label_B": np.int32(label)}


def _stack(rows: list[Example], read: int, broken: list[BrokenImage]) -> StreamRows:
    return StreamRows(
        {name: np.stack([row[name] for row in rows]) for name in rows[0]}, read, broken
    )
