"""Reads image files in folders, as they are."""

import dataclasses
import functools
import os
from typing import Any

import numpy as np

from varjax.data import decoding, transforms
from varjax.data.loader import make_loader
from varjax.data.sources.folder_layout import FolderLayout, ImageListing
from varjax.data.stream import Split
from varjax.data.workers import ReadOptions
from varjax.errors import check_setting
from varjax.runtime.reproducibility import pixels_digest


@dataclasses.dataclass(frozen=True)
class Folder:
    """Images in a folder, with a subfolder for each class or without.

    `root` holds train/<class>/… and val/<class>/…, like the official ImageNet; or <class>/…
    without splits; or just images, which are of one class then. Deeper folders belong to their
    class. Classes are numbered in the order of their names; what is hidden is skipped.

    Everything raises InputError for folders that make no sense.

        data = Folder("images", size=256)
        batch = data.make(batch_size=64, seed=0).train_batch(0)  # {"image_BHWC", "label_B"}

    Attributes:
        root: folder of the images.
        size: pixels of both sides, or (height, width).
        channels: number of channels: 1 (gray), 3 (RGB) or 4 (with alpha).
        crop: kind of crop: "random" resizes and crops as VAR does, at a random position in
            training; "center" resizes and crops the middle, as ADM and MAR do.
        flip: whether to mirror half of the training images: random crops at random, center crops in
            every second epoch.
        held_out: folder next to train/, or the fraction of images to hold out, chosen by a hash of
            each path, so that a new file never moves another one to the other split. None for "val"
            if it exists, else 0.05.
        unconditional: whether all images are of one class, whatever their subfolders.
        reading: numbers of threads and worker processes that read.
    """

    root: str
    size: int | tuple[int, int] = 256
    channels: int = 3
    crop: transforms.Crop = "random"
    flip: bool = False
    held_out: str | float | None = None
    unconditional: bool = False
    reading: ReadOptions = ReadOptions()

    make = make_loader

    def __post_init__(self):
        transforms.check_image_size(self.size, self.channels)
        transforms.check_crop(self.crop)
        if not isinstance(self.held_out, str | None):
            fits = 0 < self.held_out < 1
            check_setting("held_out", self.held_out, fits, "a folder, or a share between 0 and 1")

    @functools.cached_property
    def layout(self) -> FolderLayout:
        """The folders and files of each split's images."""
        return FolderLayout.detect(self.root, self.held_out, self.unconditional)

    @functools.cached_property
    def listings(self) -> dict[str, ImageListing]:
        """The images of both splits, as they were when first asked for."""
        return self.layout.listings()

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.layout.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return *transforms.height_width(self.size), self.channels

    def source(self, split: Split) -> "FolderSource":
        """Opens a split, in the order of the paths."""
        return FolderSource(self.listings[split], self.channels)

    @property
    def alternating_views(self) -> int:
        return transforms.alternating_views(self.crop, self.flip)

    def augment(self, image_HWC: np.ndarray, view: int, rng: np.random.Generator) -> np.ndarray:
        """Resizes and crops an image by the recipe `crop`."""
        size = self.image_shape[:2]
        return transforms.training_crop(image_HWC, view, rng, size, self.crop, self.flip)

    def preprocess(self, image_HWC: np.ndarray) -> np.ndarray:
        """Cuts the middle out, by the same recipe."""
        return transforms.evaluation_crop(image_HWC, self.image_shape[:2], self.crop)

    def describe(self) -> dict[str, Any]:
        """Returns class names, and data that reveal whether the images have changed."""
        listings = {split: listing.describe() for split, listing in self.listings.items()}
        return {"class_names": list(self.class_names), "pixels": pixels_digest()} | listings


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Decodes a file when asked for one; raises BrokenImage or StorageError as `decode_file`."""

    listing: ImageListing
    channels: int

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __getitem__(self, index: int) -> dict:
        path = os.path.join(self.listing.root, self.listing.paths[index])
        label = int(self.listing.labels_N[index])
        return {"image": decoding.decode_file(path, self.channels), "label": label}
