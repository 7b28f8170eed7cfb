"""Random pixels: for benchmarks, and to try a recipe without any data."""

import dataclasses
from typing import Any

import numpy as np

from varjax.core.errors import InputError
from varjax.data import transforms
from varjax.data.loader import Loader
from varjax.data.stream import Split
from varjax.data.workers import Reading


@dataclasses.dataclass(frozen=True)
class Noise:
    """Images whose pixels, and labels, are random; each a function of its split and index alone."""

    size: int | tuple[int, int] = 256  # pixels: of both sides, or (height, width)
    channels: int = 3
    classes: int = 1000
    images: int = 10_000
    held_out_images: int = 16
    reading: Reading = Reading()

    def __post_init__(self):
        transforms.check_view(self.size, self.channels)
        for name in ("classes", "images", "held_out_images"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, but must be at least 1")

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return *transforms.height_width(self.size), self.channels

    def make(self, batch_size: int, seed: int, rows: range | None = None) -> Loader:
        """Batches, of which this process gets `rows` (None: all)."""
        return Loader(self, batch_size, seed, rows)

    def describe(self) -> dict[str, Any]:
        """Class names, and what tells whether the images are still the same ones."""
        train, held_out = {"images": self.images}, {"images": self.held_out_images}
        names = [str(label) for label in range(self.classes)]
        return {"class_names": names, "train": train, "held_out": held_out}

    def source(self, split: Split) -> "RandomImages":
        """The images of one split."""
        count = self.images if split == "train" else self.held_out_images
        return RandomImages(self, split, count)

    def augment(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The training view of an image: itself."""
        return image_HWC

    def prepare(self, image_HWC: np.ndarray) -> np.ndarray:
        """The evaluation view of an image: itself."""
        return image_HWC


@dataclasses.dataclass(frozen=True)
class RandomImages:
    """Draws an image and its label when asked for one."""

    data: Noise
    split: Split
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        rng = np.random.default_rng((index, self.split == "train"))
        image = rng.integers(0, 256, self.data.image_shape, np.uint8)
        return {"image": image, "label": int(rng.integers(self.data.classes))}
