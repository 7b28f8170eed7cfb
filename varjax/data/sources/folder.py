"""Image files in folders, as they lie."""

import dataclasses
import functools
import os
from typing import Any

import numpy as np

from varjax.core.errors import InputError
from varjax.data import decoding, transforms
from varjax.data.loader import Loader
from varjax.data.sources.folder_layout import Listing, Tree
from varjax.data.stream import Split
from varjax.data.workers import Reading


@dataclasses.dataclass(frozen=True)
class Folder:
    """Images in a folder, with a subfolder for each class or without.

    `root` holds train/<class>/… and val/<class>/…, like the official ImageNet; or <class>/…
    without splits; or just images, which are of one class then. Deeper folders belong to their
    class. Classes are numbered in the order of their names; what is hidden is skipped.

    `held_out` names the folder beside train/, or is the share of images to hold out, chosen by a
    hash of each path, so that a new file moves no other one to the other side. None means "val"
    where there is one, else 0.05. Everything raises InputError for folders that make no sense.
    """

    root: str
    size: int | tuple[int, int] = 256  # pixels: of both sides, or (height, width)
    channels: int = 3
    flip: bool = False  # mirror every second training image
    held_out: str | float | None = None
    unconditional: bool = False  # one class, whatever the subfolders
    reading: Reading = Reading()

    def __post_init__(self):
        transforms.check_view(self.size, self.channels)
        if not isinstance(self.held_out, str | None) and not 0 < self.held_out < 1:
            raise InputError(f"held_out is {self.held_out}, but a share lies between 0 and 1")

    @functools.cached_property
    def tree(self) -> Tree:
        """Where the images of each split lie."""
        return Tree.find(self.root, self.held_out, self.unconditional)

    @functools.cached_property
    def listings(self) -> dict[str, Listing]:
        """The images of both splits, as they were when first asked for."""
        return self.tree.listings()

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.tree.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return *transforms.height_width(self.size), self.channels

    def make(self, batch_size: int, seed: int, rows: range | None = None) -> Loader:
        """Batches, of which this process gets `rows` (None: all)."""
        return Loader(self, batch_size, seed, rows)

    def source(self, split: Split) -> "ImageFiles":
        """The images of one split, in the order of their paths."""
        return ImageFiles(self.listings[split], self.channels)

    def augment(self, image_HWC: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """The training view of an image."""
        return transforms.random_crop(image_HWC, rng, self.image_shape[:2], self.flip)

    def prepare(self, image_HWC: np.ndarray) -> np.ndarray:
        """The evaluation view of an image."""
        return transforms.center_crop(image_HWC, self.image_shape[:2])

    def describe(self) -> dict[str, Any]:
        """Class names, and what tells whether the images are still the same ones."""
        listings = {split: listing.describe() for split, listing in self.listings.items()}
        return {"class_names": list(self.class_names)} | listings


@dataclasses.dataclass(frozen=True)
class ImageFiles:
    """Decodes files when asked for one; BrokenImage when that fails."""

    listing: Listing
    channels: int

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __getitem__(self, index: int) -> dict:
        path = os.path.join(self.listing.root, self.listing.paths[index])
        label = int(self.listing.labels_N[index])
        return {"image": decoding.decode(path, self.channels), "label": label}
