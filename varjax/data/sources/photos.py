"""Crops of scikit-learn's two photographs: real images without a download."""

import dataclasses
import functools
import itertools
from typing import Any

import numpy as np
from sklearn.datasets import load_sample_images

from varjax.core.errors import InputError
from varjax.data import transforms
from varjax.data.loader import Loader
from varjax.data.sources.digits import InMemory
from varjax.data.stream import Split
from varjax.data.workers import Reading

NAMES = ("china", "flower")
HELD_OUT = slice(240, 368)  # columns, of 640: through the middle of what the photographs show


@dataclasses.dataclass(frozen=True)
class Photos:
    """Crops of two photographs, 427 by 640 pixels, a pagoda and a flower; each is a class.

    A strip of 128 columns is cut out of each first. From it come the held-out crops, which overlap
    by half; from the two sides that are left, `images` random ones, anew in each epoch.

    Raises InputError for a size above 128.
    """

    size: int | tuple[int, int] = 64  # pixels: of both sides, or (height, width)
    images: int = 4096  # that make an epoch
    flip: bool = False  # mirror every second training crop
    reading: Reading = Reading()

    def __post_init__(self):
        transforms.check_view(self.size, 3)
        widest = HELD_OUT.stop - HELD_OUT.start
        if max(self.image_shape[:2]) > widest:
            raise InputError(f"size is {self.size}, but crops have at most {widest} pixels a side")
        if self.images < 1:
            raise InputError(f"images is {self.images}, but must be at least 1")

    @property
    def classes(self) -> int:
        return len(NAMES)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return *transforms.height_width(self.size), 3

    def make(self, batch_size: int, seed: int, rows: range | None = None) -> Loader:
        """Batches, of which this process gets `rows` (None: all)."""
        return Loader(self, batch_size, seed, rows)

    def describe(self) -> dict[str, Any]:
        """Class names, and what tells whether the images are still the same ones."""
        train, held_out = ({"images": len(self.source(s))} for s in ("train", "held_out"))
        return {"class_names": list(NAMES), "train": train, "held_out": held_out}

    def source(self, split: Split) -> "InMemory | Sides":
        """The held-out crops row by row; or, for training, what to crop from."""
        photos = _photographs()
        if split == "train":
            sides = [
                (photo[:, part], label)
                for label, photo in enumerate(photos)
                for part in (slice(HELD_OUT.start), slice(HELD_OUT.stop, None))
            ]
            places = np.array(
                [np.prod(np.subtract(x.shape, self.image_shape) + 1) for x, _ in sides]
            )
            side_N = np.random.default_rng(0).choice(
                len(sides), self.images, p=places / places.sum()
            )
            return Sides(tuple(sides), side_N)
        crops, labels = [], []
        h, w, _ = self.image_shape
        for label, photo in enumerate(photos):
            strip_HWC = photo[:, HELD_OUT]
            H, W, _ = strip_HWC.shape
            corners = itertools.product(
                range(0, H - h + 1, max(h // 2, 1)), range(0, W - w + 1, max(w // 2, 1))
            )
            crops += [strip_HWC[top : top + h, left : left + w] for top, left in corners]
            labels += [label] * (len(crops) - len(labels))
        return InMemory(np.stack(crops), np.array(labels))

    def augment(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """A random crop, at the photograph's own resolution."""
        h, w, _ = self.image_shape
        top = rng.integers(image_HWC.shape[0] - h, endpoint=True)
        left = rng.integers(image_HWC.shape[1] - w, endpoint=True)
        crop_HWC = image_HWC[top : top + h, left : left + w]
        mirror = self.flip and rng.random() < 0.5
        return np.ascontiguousarray(crop_HWC[:, ::-1] if mirror else crop_HWC)

    def prepare(self, image_HWC: np.ndarray) -> np.ndarray:
        """The evaluation view of a held-out crop: itself."""
        return image_HWC


@dataclasses.dataclass(frozen=True)
class Sides:
    """What is left of the photographs, with their labels; side_N: which of them is number n."""

    sides: tuple[tuple[np.ndarray, int], ...]
    side_N: np.ndarray

    def __len__(self) -> int:
        return len(self.side_N)

    def __getitem__(self, index: int) -> dict:
        image_HWC, label = self.sides[self.side_N[index]]
        return {"image": image_HWC, "label": label}


@functools.cache
def _photographs() -> tuple[np.ndarray, ...]:
    return tuple(load_sample_images().images)
