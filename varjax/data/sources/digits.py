"""scikit-learn's handwritten digits."""

import dataclasses
from typing import Any

import numpy as np
from sklearn.datasets import load_digits

from varjax.data.loader import Loader
from varjax.data.stream import Split
from varjax.data.transforms import random_affine
from varjax.data.workers import Reading


@dataclasses.dataclass(frozen=True)
class Digits:
    """scikit-learn's 1,797 handwritten digits, 8 by 8 gray: no download.

    Every fifth image of each class is held out. For training, images are moved by up to `shift`
    pixels, turned by up to `rotate` degrees and scaled by 1 ± `zoom`.
    """

    shift: float = 0.0
    rotate: float = 0.0
    zoom: float = 0.0
    reading: Reading = Reading()

    @property
    def classes(self) -> int:
        return 10

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 8, 8, 1

    def make(self, batch_size: int, seed: int, rows: range | None = None) -> Loader:
        """Batches, of which this process gets `rows` (None: all)."""
        return Loader(self, batch_size, seed, rows)

    def describe(self) -> dict[str, Any]:
        """Class names, and what tells whether the images are still the same ones."""
        train, held_out = ({"images": len(self.source(s))} for s in ("train", "held_out"))
        names = [str(digit) for digit in range(10)]
        return {"class_names": names, "train": train, "held_out": held_out}

    def source(self, split: Split) -> "InMemory":
        """The images of one split, in the dataset's order."""
        images_NHW, labels_N = load_digits(return_X_y=True)
        images_NHWC = (
            np.rint(images_NHW * (255 / 16)).astype(np.uint8).reshape(-1, *self.image_shape)
        )
        rank_N = np.zeros(len(labels_N), np.int64)
        for label in range(self.classes):
            rank_N[labels_N == label] = np.arange(np.sum(labels_N == label))
        chosen_N = (rank_N % 5 == 4) == (split == "held_out")
        return InMemory(images_NHWC[chosen_N], labels_N[chosen_N])

    def augment(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The training view of an image."""
        return random_affine(image_HWC, rng, self.shift, self.rotate, self.zoom)

    def prepare(self, image_HWC: np.ndarray) -> np.ndarray:
        """The evaluation view of an image: itself."""
        return image_HWC


@dataclasses.dataclass(frozen=True)
class InMemory:
    """Examples held as two arrays."""

    images_NHWC: np.ndarray
    labels_N: np.ndarray

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.images_NHWC[index], "label": int(self.labels_N[index])}
