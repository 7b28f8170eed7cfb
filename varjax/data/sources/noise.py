"""Provides random pixels, for benchmarks and to try a recipe without data."""

import dataclasses
from typing import Any

import numpy as np

from varjax.data import transforms
from varjax.data.loader import make_loader
from varjax.data.stream import Split
from varjax.data.workers import ReadOptions
from varjax.errors import check_setting


@dataclasses.dataclass(frozen=True)
class Noise:
    """Images of random pixels and labels, each a function of its split and index alone.

    Attributes:
        size: pixels of both sides, or (height, width).
        channels: number of channels: 1, 3 or 4.
        classes: number of classes; labels are below it.
        images: number of images in the training split.
        held_out_images: number of images in the held-out split.
        reading: numbers of threads and worker processes that read.
    """

    size: int | tuple[int, int] = 256
    channels: int = 3
    classes: int = 1000
    images: int = 10_000
    held_out_images: int = 16
    reading: ReadOptions = ReadOptions()

    make = make_loader
    preprocess = transforms.unchanged
    alternating_views = 1

    def __post_init__(self):
        transforms.check_image_size(self.size, self.channels)
        for name in ("classes", "images", "held_out_images"):
            value = getattr(self, name)
            check_setting(name, value, value >= 1, "at least 1")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return *transforms.height_width(self.size), self.channels

    def describe(self) -> dict[str, Any]:
        """Returns class names, and data that reveal whether the images have changed."""
        train, held_out = {"images": self.images}, {"images": self.held_out_images}
        names = [str(label) for label in range(self.classes)]
        return {"class_names": names, "train": train, "held_out": held_out}

    def source(self, split: Split) -> "NoiseSource":
        """Opens a split."""
        count = self.images if split == "train" else self.held_out_images
        return NoiseSource(self, split, count)

    def augment(self, image_HWC: np.ndarray, view: int, rng: np.random.Generator) -> np.ndarray:
        """Returns the image itself."""
        return image_HWC


@dataclasses.dataclass(frozen=True)
class NoiseSource:
    """Draws an image and its label on access."""

    data: Noise
    split: Split
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((index, self.split == "train"))
        image_HWC = rng.integers(0, 256, self.data.image_shape, np.uint8)
        return {"image": image_HWC, "label": int(rng.integers(self.data.classes))}
