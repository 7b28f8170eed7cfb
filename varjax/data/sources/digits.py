"""Provides scikit-learn's handwritten digits: real images without a download."""

import dataclasses
from typing import Any

import numpy as np

from varjax.data import transforms
from varjax.data.loader import make_loader
from varjax.data.stream import ArraySource, Split
from varjax.data.workers import ReadOptions
from varjax.errors import needs_extra


@dataclasses.dataclass(frozen=True)
class Digits:
    """1,797 handwritten digits, 8 by 8 gray, of which every fifth of each class is held out.

    Attributes:
        shift: largest shift of a training image, in pixels.
        rotate: largest rotation of a training image, in degrees.
        zoom: largest change of a training image's scale, which is 1 ± `zoom`.
        reading: numbers of threads and worker processes that read.
    """

    shift: float = 0.0
    rotate: float = 0.0
    zoom: float = 0.0
    reading: ReadOptions = ReadOptions()

    make = make_loader
    augment = transforms.augment_by_affine
    preprocess = transforms.unchanged
    alternating_views = 1

    @property
    def classes(self) -> int:
        return 10

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return 8, 8, 1

    def describe(self) -> dict[str, Any]:
        """Returns class names, and data that reveal whether the images have changed."""
        train, held_out = ({"images": len(self.source(s))} for s in ("train", "held_out"))
        names = [str(digit) for digit in range(10)]
        return {"class_names": names, "train": train, "held_out": held_out}

    def source(self, split: Split) -> ArraySource:
        """Opens a split, in the dataset's order."""
        with needs_extra("digits", "scikit-learn", "the dataset of digits"):
            from sklearn.datasets import load_digits  # a second, and only this dataset needs it

        images_NHW, labels_N = map(np.asarray, load_digits(return_X_y=True))
        images_NHWC = (
            np.rint(images_NHW * (255 / 16)).astype(np.uint8).reshape(-1, *self.image_shape)
        )
        rank_N = np.zeros(len(labels_N), np.int64)
        for label in range(self.classes):
            rank_N[labels_N == label] = np.arange(np.sum(labels_N == label))
        chosen_N = (rank_N % 5 == 4) == (split == "held_out")
        return ArraySource(images_NHWC[chosen_N], labels_N[chosen_N])
