"""Provides crops of scikit-learn's two photographs: real images without a download."""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np

from varjax.data import transforms
from varjax.data.loader import make_loader
from varjax.data.stream import ArraySource, Split
from varjax.data.workers import ReadOptions
from varjax.errors import InputError, check_setting, needs_extra

PHOTO_NAMES = ("china", "flower")
# Number of held-out columns, of 640: a strip through the middle of each photograph's subject.
HELD_OUT_COLUMNS = slice(240, 368)
HELD_OUT_WIDTH = HELD_OUT_COLUMNS.stop - HELD_OUT_COLUMNS.start


@dataclasses.dataclass(frozen=True)
class Photos:
    """Crops of two photographs, 427 by 640 pixels, a pagoda and a flower; each is a class.

    A strip of 128 columns of each photograph is held out, and cut into crops that overlap by half.
    The two sides that are left give `images` random crops, drawn again in each epoch.

    Raises InputError for a size above 128.

    Attributes:
        size: pixels of both sides, or (height, width).
        images: number of images in an epoch.
        flip: whether to mirror every second training crop.
        reading: numbers of threads and worker processes that read.
    """

    size: int | tuple[int, int] = 64
    images: int = 4096
    flip: bool = False
    reading: ReadOptions = ReadOptions()

    make = make_loader
    alternating_views = 1

    def __post_init__(self):
        transforms.check_image_size(self.size, 3)
        if max(self.image_shape[:2]) > HELD_OUT_WIDTH:
            raise InputError(
                f"size is {self.size}, but crops have at most {HELD_OUT_WIDTH} pixels a side"
            )
        check_setting("images", self.images, self.images >= 1, "at least 1")

    @property
    def classes(self) -> int:
        return len(PHOTO_NAMES)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return *transforms.height_width(self.size), 3

    def describe(self) -> dict[str, Any]:
        """Returns class names, and data that reveal whether the images have changed."""
        train, held_out = ({"images": len(self.source(s))} for s in ("train", "held_out"))
        return {"class_names": list(PHOTO_NAMES), "train": train, "held_out": held_out}

    def source(self, split: Split) -> "ArraySource | PhotoSides":
        """Opens the held-out crops, row by row, or the parts of the photographs to train on."""
        parts = photo_parts(split)
        if split == "train":
            corners = np.array(
                [np.prod(np.subtract(x.shape, self.image_shape) + 1) for x, _ in parts]
            )
            part_N = np.random.default_rng(0).choice(
                len(parts), self.images, p=corners / corners.sum()
            )
            return PhotoSides(tuple(parts), part_N)
        crops, labels = [], []
        h, w, _ = self.image_shape
        for strip_HWC, label in parts:
            H, W, _ = strip_HWC.shape
            corners = itertools.product(
                range(0, H - h + 1, max(h // 2, 1)), range(0, W - w + 1, max(w // 2, 1))
            )
            crops += [strip_HWC[top : top + h, left : left + w] for top, left in corners]
            labels += [label] * (len(crops) - len(labels))
        return ArraySource(np.stack(crops), np.array(labels))

    def augment(self, image_HWC: np.ndarray, view: int, rng: np.random.Generator) -> np.ndarray:
        """Cuts a random part out, at the photograph's own resolution."""
        h, w, _ = self.image_shape
        top = rng.integers(image_HWC.shape[0] - h, endpoint=True)
        left = rng.integers(image_HWC.shape[1] - w, endpoint=True)
        crop_HWC = image_HWC[top : top + h, left : left + w]
        mirror = self.flip and rng.random() < 0.5
        return np.ascontiguousarray(crop_HWC[:, ::-1] if mirror else crop_HWC)

    def preprocess(self, image_HWC: np.ndarray) -> np.ndarray:
        """Crops the center; a held-out crop is returned whole."""
        h, w, _ = self.image_shape
        top, left = (image_HWC.shape[0] - h) // 2, (image_HWC.shape[1] - w) // 2
        return image_HWC[top : top + h, left : left + w]


@dataclasses.dataclass(frozen=True)
class PhotoSides:
    """Holds the parts of the photographs that random crops are cut from.

    Attributes:
        parts: (image, label) of each part.
        part_N: index of the part that each of N examples shows.
    """

    parts: tuple[tuple[np.ndarray, int], ...]
    part_N: np.ndarray

    def __len__(self) -> int:
        return len(self.part_N)

    def __getitem__(self, index: int) -> dict:
        image_HWC, label = self.parts[self.part_N[index]]
        return {"image": image_HWC, "label": label}


def photo_parts(split: Split) -> list[tuple[np.ndarray, int]]:
    """Returns (uint8 (427, W, 3), label) of the parts of the photographs that belong to a split.

    The held-out part of each is a strip of columns. The training parts are to the left and right
    of it, so that no pixel is in both splits.
    """
    strip = HELD_OUT_COLUMNS
    sides = slice(strip.start), slice(strip.stop, None)
    return [
        (photo_HWC[:, columns], label)
        for label, photo_HWC in enumerate(photographs())
        for columns in (sides if split == "train" else (strip,))
    ]


@functools.cache
def photographs() -> tuple[np.ndarray, ...]:
    """Loads both photographs, uint8 (427, 640, 3), in the order of PHOTO_NAMES."""
    with needs_extra("digits", "scikit-learn", "the dataset of photos"):
        from sklearn.datasets import load_sample_images  # a second, and only this dataset needs it

    return tuple(load_sample_images().images)
