"""Provides fake images that encode their index; some are broken or cannot be read."""

import dataclasses

import numpy as np

from varjax.data.loader import make_loader
from varjax.data.workers import ReadOptions
from varjax.errors import StorageError
from varjax.storage.image_files import BrokenImage

reads = []  # (data, index) of every read in this process


@dataclasses.dataclass(frozen=True)
class FakeImages:
    """Provides images whose first two pixels encode their index; augmentation draws the third."""

    size: int = 100
    broken: tuple[int, ...] = ()
    bug_at: int = -1
    fails_at: int = -1
    reading: ReadOptions = ReadOptions(threads=3)
    classes: int = 10
    image_shape: tuple[int, int, int] = (1, 3, 1)

    make = make_loader
    alternating_views = 1

    def describe(self):
        return {"class_names": [], "train": {}, "held_out": {}}

    def source(self, split):
        return FakeSource(self)

    def augment(self, image_HWC, view, rng):
        image_HWC = image_HWC.copy()
        image_HWC[0, 2] = rng.integers(256)
        return image_HWC

    def preprocess(self, image_HWC):
        return image_HWC


def reads_of(data):
    """Returns the indices read from `data`; threads of other tests may still read other data."""
    return [index for other, index in list(reads) if other is data]


@dataclasses.dataclass(frozen=True)
class FakeSource:
    data: FakeImages

    def __len__(self):
        return self.data.size

    def __getitem__(self, index):
        reads.append((self.data, index))
        if index == self.data.bug_at:
            raise ZeroDivisionError(f"image {index}")
        if index == self.data.fails_at:
            raise StorageError(f"image {index} cannot be read now")
        if index in self.data.broken:
            raise BrokenImage(f"image_{index}.jpg", "it is cut off")
        image_HWC = np.zeros(self.data.image_shape, np.uint8)
        image_HWC[0, :2, 0] = index // 256, index % 256
        return {"image": image_HWC, "label": index % 10}


def number_of(image_BHWC):
    """Returns the indices that the images encode."""
    high_B, low_B = image_BHWC[:, 0, :2, 0].astype(int).T
    return 256 * high_B + low_B
