"""Reads image files in folders as they are, listed by class and split in a fixed order."""

import dataclasses
import functools
import hashlib
import math
import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from varjax.data import transforms
from varjax.data.loader import make_loader
from varjax.data.stream import Split
from varjax.data.workers import ReadOptions
from varjax.errors import InputError, check_setting
from varjax.runtime.reproducibility import pixels_digest
from varjax.storage import buckets
from varjax.storage.buckets import as_path, in_bucket, real_path
from varjax.storage.folders import MAX_VISITS
from varjax.storage.image_files import IMAGE_FORMATS, decode_file
from varjax.storage.read_errors import retry_read

IMAGE_SUFFIXES = tuple(IMAGE_FORMATS)
ONE_CLASS_NAMES = ("image",)  # of images without classes
DEFAULT_HELD_OUT_FRACTION = 0.05


@dataclasses.dataclass(frozen=True)
class Folder:
    """Images in a folder, with a subfolder for each class or without.

    `root` holds train/<class>/… and val/<class>/…, like the official ImageNet; or <class>/…
    without splits; or just images, which then are one class. Deeper folders belong to their
    class. Classes are numbered in the order of their names. Hidden files are skipped.

    Every method raises InputError if the folders do not fit.

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
            each path, so that a new file never moves other files between the splits. None for "val"
            if it exists, else 0.05.
        unconditional: whether all images are one class and subfolders are ignored.
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
    augment = transforms.augment_photograph
    preprocess = transforms.crop_photograph

    def __post_init__(self):
        transforms.check_photographs(self)
        if not isinstance(self.held_out, str | None):
            fits = 0 < self.held_out < 1
            check_setting(
                "held_out", self.held_out, fits, "a folder, or a fraction between 0 and 1"
            )

    @functools.cached_property
    def layout(self) -> "FolderLayout":
        """The folders and files of each split's images."""
        return FolderLayout.detect(self.root, self.held_out, self.unconditional)

    @functools.cached_property
    def listings(self) -> "dict[str, ImageListing]":
        """The images of both splits, listed at the first access."""
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

    @property
    def alternating_views(self) -> int:
        return transforms.photograph_views(self)

    def check_outside(self, name: str, path: str | os.PathLike) -> None:
        """Checks that a new folder would not be taken for images or a class of this dataset.

        Args:
            name: name of the setting or flag that names the folder.
            path: the new folder.

        Raises:
            InputError: it would.
        """
        layout, new = self.layout, os.path.join(real_path(path), "")
        splits = [layout.train, layout.held_out] if isinstance(layout.held_out, str) else [""]
        for folder in (_below(layout.root, split) for split in splits):
            above = os.path.join(real_path(folder), "")
            parts = new.removeprefix(above).split(os.sep)
            if new.startswith(above) and not any(part.startswith(".") for part in parts):
                raise InputError(
                    f"{name}={path}: is inside {folder}, where it would be taken for images or a "
                    "class; choose a folder outside"
                )

    def source(self, split: Split) -> "FolderSource":
        """Opens a split, in the order of the paths."""
        return FolderSource(self.listings[split], self.channels)

    def describe(self) -> dict[str, Any]:
        """Returns class names, and data that reveal whether the images have changed."""
        listings = {split: listing.describe() for split, listing in self.listings.items()}
        return {"class_names": list(self.class_names), "pixels": pixels_digest()} | listings


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """Decodes a file on access; raises the errors of `decode_file`."""

    listing: "ImageListing"
    channels: int

    def __len__(self) -> int:
        return len(self.listing.paths)

    def __getitem__(self, index: int) -> dict:
        path = os.path.join(self.listing.root, self.listing.paths[index])
        label = int(self.listing.labels_N[index])
        return {"image": decode_file(path, self.channels), "label": label}


@dataclasses.dataclass(frozen=True)
class ImageListing:
    """The images of a split.

    Attributes:
        root: folder of the images.
        paths: paths of the images below `root`.
        labels_N: int32, the class of each image.
    """

    root: str
    paths: list[str]
    labels_N: np.ndarray

    def describe(self) -> dict[str, Any]:
        """Returns the number of images, and a hash of their paths in order."""
        names = b"\0".join(os.fsencode(path) for path in self.paths)
        return {"images": len(self.paths), "sha256": hashlib.sha256(names).hexdigest()}


@dataclasses.dataclass(frozen=True)
class FolderLayout:
    """How a folder of images is laid out: the subfolders of the splits, and the classes.

    Attributes:
        root: folder of the images.
        train: subfolder of the training images; "" if there are no splits.
        held_out: a subfolder, or the fraction of the images in `train` that are held out.
        class_names: names of the classes, in the order of their numbers.
        flat: whether images are not in a folder for each class.
    """

    root: str
    train: str
    held_out: str | float
    class_names: tuple[str, ...]
    flat: bool

    @classmethod
    def detect(cls, root: str, held_out: str | float | None, unconditional: bool) -> "FolderLayout":
        """Detects the layout from the top folders; raises InputError if it is not clear.

        The arguments are those of `Folder`.
        """
        if not root:
            raise InputError("root is empty; name the folder of the images")
        root = str(as_path(root))  # with its ~ expanded
        folders, files = _scan(root)
        train = ""
        if isinstance(held_out, str) and not {"train", held_out} <= set(folders):
            raise InputError(
                f"held_out is {held_out!r}, but {root} has no folders train and {held_out}; its "
                f"folders are {_few(folders)}. held_out can also be a fraction "
                "of the images, say 0.05"
            )
        if "train" in folders:
            train, has_held_out = "train", isinstance(held_out, str) or "val" in folders
            if not has_held_out and len(folders) > 1:
                raise InputError(
                    f"{root} has a folder train, but no folder val: {_few(folders)}. Name the "
                    "held-out folder (held_out=test), or if these are classes, rename train"
                )
            if held_out is None and has_held_out:
                held_out = "val"
            folders, files = _scan(_below(root, train))
        if not unconditional and folders and files:
            raise InputError(
                f"{_below(root, train)} holds images ({_few(files)}) and folders "
                f"({_few(folders)}): sort them into one folder per class, or set "
                "unconditional=True to take all of them as one class"
            )
        flat = unconditional or not folders
        names = ONE_CLASS_NAMES if flat else tuple(folders)
        return cls(
            root, train, DEFAULT_HELD_OUT_FRACTION if held_out is None else held_out, names, flat
        )

    def listings(self) -> dict[str, ImageListing]:
        """Lists the images of "train" and "held_out", class by class, ordered by path.

        Raises InputError where one of them has none, where a class has none to train on, and where
        the held-out folder has other classes.
        """
        train = self.training_folder()
        if isinstance(self.held_out, str):
            held_out = self._folder(self.held_out)
        else:
            out_N = np.array([_number(path) < self.held_out for path in train.paths], bool)
            train, held_out = _choose(train, ~out_N), _choose(train, out_N)
        where = _below(self.root, self.train)
        if not held_out.paths:
            assert isinstance(self.held_out, float)
            smallest = min(map(_number, train.paths))  # a larger fraction holds this one out
            enough = min(0.99, math.floor(smallest * 100 + 1) / 100)
            raise InputError(
                f"{where} has no images to hold out: held_out={self.held_out} chose none of "
                f"{len(train.paths)} by the hash of their paths. Set held_out={enough} "
                "or more, or sort the images into train/ and val/"
            )
        counts = np.bincount(train.labels_N, minlength=len(self.class_names))
        if not counts.all():
            missing = [n for n, count in zip(self.class_names, counts, strict=True) if not count]
            raise InputError(
                f"{where} has no training images of {len(missing)} classes: {_few(missing)}; add "
                f"some or remove the folders (held_out is {self.held_out})"
            )
        return {"train": train, "held_out": held_out}

    def training_folder(self) -> ImageListing:
        """Lists the images of the training folder, held-out ones included."""
        return self._folder(self.train)

    def _folder(self, folder: str) -> ImageListing:
        where = _below(self.root, folder)
        if self.flat:
            below = list(_images(where, ""))
            classes = {self.class_names[0]: below}
        else:
            folders, files = _scan(where)
            if unknown := sorted(set(folders) - set(self.class_names)):
                raise InputError(f"{where} has classes that {self.train} lacks: {_few(unknown)}")
            if not folders and files:
                raise InputError(
                    f"{where} holds images, but no class folders as in {self.train}; sort them "
                    "into folders of the same names"
                )
            classes = {name: list(_images(where, name)) for name in folders}
        paths = [os.path.join(folder, path) for name in classes for path in classes[name]]
        numbers = {name: number for number, name in enumerate(self.class_names)}
        labels = [np.full(len(below), numbers[name]) for name, below in classes.items()]
        if not paths:
            hint = f". It has idx files; read them by data=idx:{where}" * _has_idx_files(where)
            raise InputError(f"{where} has no images; known are {' '.join(IMAGE_SUFFIXES)}{hint}")
        return ImageListing(self.root, paths, np.concatenate(labels).astype(np.int32))


def _scan(folder: str) -> tuple[list[str], list[str]]:
    """Returns (subfolders, image files), sorted; follows links."""
    try:
        folders, files = retry_read(lambda: _list_folder(folder), folder)
    except InputError:  # which includes StorageError
        raise
    except OSError as error:
        raise InputError(f"cannot list the images in {folder!r}: {error.strerror}") from error
    images = [name for name in files if name.lower().endswith(IMAGE_SUFFIXES)]
    folders, images = ([n for n in names if not n.startswith(".")] for names in (folders, images))
    return sorted(folders), sorted(images)


def _has_idx_files(folder: str) -> bool:
    _, names = retry_read(lambda: _list_folder(folder), folder)
    return any("-ubyte" in name for name in names)


def _list_folder(folder: str) -> tuple[list[str], list[str]]:
    if in_bucket(folder):
        return buckets.list_folder(as_path(folder))
    folders, files = [], []
    with os.scandir(folder) as entries:
        for entry in entries:
            (folders if entry.is_dir() else files).append(entry.name)
    return folders, files


def _images(
    root: str, folder: str, above: tuple[str, ...] = (), visits: Counter[str] | None = None
) -> Iterator[str]:
    """Yields the paths below `root` of all images in `folder` and deeper."""
    here, visits = _below(root, folder), Counter() if visits is None else visits
    folders, files = _scan(here)
    yield from (os.path.join(folder, name) for name in files)
    if folders:
        above = (*above, real := os.path.realpath(here))
        visits[real] += 1
        if visits[real] > MAX_VISITS:
            raise InputError(
                f"{here} is reached by more than {MAX_VISITS} ways through links; remove some"
            )
    for name in folders:
        if os.path.realpath(os.path.join(here, name)) in above:
            raise InputError(f"{os.path.join(here, name)} is a link to a folder that contains it")
        yield from _images(root, os.path.join(folder, name), above, visits)


def _below(root: str, folder: str) -> str:
    return os.path.join(root, folder) if folder else root


def _choose(listing: ImageListing, chosen_N: np.ndarray) -> ImageListing:
    paths = [path for path, chosen in zip(listing.paths, chosen_N, strict=True) if chosen]
    return ImageListing(listing.root, paths, listing.labels_N[chosen_N])


def _number(path: str) -> float:
    """Returns a number in [0, 1) that depends on the path alone, evenly spread."""
    digest = hashlib.blake2b(os.fsencode(path), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" … ({len(names)})" if len(names) > 5 else "")
