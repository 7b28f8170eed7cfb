"""Reads images in the form of MNIST's files: for each split, a file of images and one of labels."""

import dataclasses
import functools
import hashlib
import os
import pathlib
import re
import string
from typing import Any, NamedTuple

import numpy as np

from varjax.data import transforms
from varjax.data.loader import make_loader
from varjax.data.stream import ArraySource, Split
from varjax.data.workers import ReadOptions
from varjax.errors import InputError
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.storage.idx_files import AXES, Kind, read_header, read_idx
from varjax.storage.read_errors import retry_read

FILE_NAME = re.compile(
    r"(?:(?P<collection>.+)-)?(?P<split>train|t10k|test)-(?P<kind>images|labels)"
    r"[-.]idx[13]-ubyte(?:\.gz)?"
)
EXAMPLE_NAME = "train-images-idx3-ubyte.gz"
SPLITS: dict[str, Split] = {"train": "train", "t10k": "held_out", "test": "held_out"}
PARTS: tuple[tuple[Split, Kind], ...] = (
    ("train", "images"),
    ("train", "labels"),
    ("held_out", "images"),
    ("held_out", "labels"),
)
DIGITS, UPPER, LOWER = string.digits, string.ascii_uppercase, string.ascii_lowercase
# EMNIST (arXiv 1702.05373) stores transposed images. Some lower-case letters look like upper-case
# ones, and these have one class together in its parts "balanced" and "bymerge".
TRANSPOSED = "emnist-"
COLLECTION_CLASSES: dict[str, str] = {
    "emnist-balanced": DIGITS + UPPER + "abdefghnqrt",
    "emnist-byclass": DIGITS + UPPER + LOWER,
    "emnist-bymerge": DIGITS + UPPER + "abdefghnqrt",
    "emnist-letters": UPPER,
}
FIRST_LABEL = {"emnist-letters": 1}
# By the sha256 of the training labels, without the header, or of the packed file.
KNOWN_CLASSES = {
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7": (  # Fashion-MNIST
        *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
        *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
    ),
    "e38f9ebcd0f3ebcdec7fc8eabdcdaef93bb0df8ea12bee65224341c8183d8e17": (  # KMNIST, packed
        *("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo"),
    ),
}


@dataclasses.dataclass(frozen=True)
class Idx:
    """Gray images in the form of MNIST's files: MNIST, Fashion-MNIST, KMNIST, EMNIST.

    `root` holds train-images-idx3-ubyte, train-labels-idx1-ubyte and the same for t10k (EMNIST:
    test), packed with gzip or not. The t10k images are held out; they come class by class, as those
    of a folder do. EMNIST's images are turned upright. Classes have their names where the data set
    is known, otherwise numbers.

    Every method raises InputError if a file is missing, damaged or in another's place.

        data = Idx("/usr/share/datasets/fashion-mnist")
        batch = data.make(batch_size=64, seed=0).train_batch(0)  # {"image_BHWC", "label_B"}

    Attributes:
        root: folder of the files; where several collections share a folder, as EMNIST's parts do,
            the folder and the beginning of the names, "emnist/emnist-letters".
        shift: largest shift of a training image, in pixels.
        rotate: largest rotation of a training image, in degrees.
        zoom: largest change of a training image's scale, which is 1 ± `zoom`.
        reading: numbers of threads and worker processes that read.
    """

    root: str
    shift: float = 0.0
    rotate: float = 0.0
    zoom: float = 0.0
    reading: ReadOptions = ReadOptions()

    make = make_loader
    augment = transforms.augment_by_affine
    preprocess = transforms.unchanged
    alternating_views = 1

    @functools.cached_property
    def collection(self) -> "IdxCollection":
        """The files of both splits."""
        return find_collection(self.root)

    @functools.cached_property
    def labels(self) -> dict[Split, np.ndarray]:
        """The labels of both splits, int32 and numbered from 0, in the order of the files."""
        return self.collection.read_labels()

    @functools.cached_property
    def class_names(self) -> tuple[str, ...]:
        count = 1 + int(self.labels["train"].max())
        return self.collection.known_class_names() or tuple(map(str, range(count)))

    @property
    def classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, 1) of the images, upright."""
        height, width = self._stored_size
        return (width, height, 1) if self.collection.transposed else (height, width, 1)

    @functools.cached_property
    def _stored_size(self) -> tuple[int, ...]:
        return read_header(self.collection.paths["train", "images"], "images")[1:]

    def source(self, split: Split) -> ArraySource:
        """Opens a split: training images in the file's order, held-out images class by class."""
        label_N = self.labels[split]
        image_NHW = read_idx(self.collection.paths[split, "images"], "images")
        if self.collection.transposed:
            image_NHW = image_NHW.swapaxes(1, 2)
        if image_NHW.shape[1:] != self.image_shape[:2]:
            raise InputError(
                f"{self.collection.paths[split, 'images']} has images of other sizes, "
                f"{image_NHW.shape[1:]}, than the training images, {self.image_shape[:2]}; give "
                "files of one data set"
            )
        if split == "held_out":
            order_N = np.argsort(label_N, kind="stable")
            image_NHW, label_N = image_NHW[order_N], label_N[order_N]
        return ArraySource(image_NHW[..., None], label_N)

    def describe(self) -> dict[str, Any]:
        """Returns class names, and data that reveal whether the images have changed."""
        return {"class_names": list(self.class_names)} | self._digests

    @functools.cached_property
    def _digests(self) -> dict[str, Any]:
        sources = {split: self.source(split) for split in self.labels}
        return {
            split: {
                "images": len(source),
                "sha256": hashlib.sha256(
                    source.images_NHWC.tobytes() + source.labels_N.tobytes()
                ).hexdigest(),
            }
            for split, source in sources.items()
        }


class IdxCollection(NamedTuple):
    """Names the four files of a data set.

    Attributes:
        name: beginning of the files' names, such as "emnist-letters"; "" if they have none.
        paths: paths by split ("train", "held_out") and kind ("images", "labels").
    """

    name: str
    paths: dict[tuple[Split, Kind], pathlib.Path]

    @property
    def transposed(self) -> bool:
        """Returns whether the files hold transposed images."""
        return self.name.startswith(TRANSPOSED)

    def known_class_names(self) -> tuple[str, ...]:
        """Returns the names of the classes of a known data set; () for any other."""
        if self.name in COLLECTION_CLASSES:
            return tuple(COLLECTION_CLASSES[self.name])
        path = files.local_copy(self.paths["train", "labels"])
        packed, label_N = retry_read(path.read_bytes, path), read_idx(path, "labels")
        digests = (hashlib.sha256(content).hexdigest() for content in (packed, label_N.tobytes()))
        return next((KNOWN_CLASSES[digest] for digest in digests if digest in KNOWN_CLASSES), ())

    def read_labels(self) -> dict[Split, np.ndarray]:
        """Reads the labels of both splits as numbers from 0, and compares them with the images."""
        labels: dict[Split, np.ndarray] = {}
        for split in ("train", "held_out"):
            path, images_path = self.paths[split, "labels"], self.paths[split, "images"]
            stored_N, (images, *_) = read_idx(path, "labels"), read_header(images_path, "images")
            if len(stored_N) != images:
                raise InputError(
                    f"{path} has {len(stored_N):,} labels for the {images:,} images in "
                    f"{images_path.name}; give files of one split"
                )
            if not images:
                raise InputError(f"{images_path} holds no images")
            labels[split] = stored_N.astype(np.int32) - FIRST_LABEL.get(self.name, 0)
        train, held_out = (self.paths[split, "images"].name for split in labels)
        if len(labels["train"]) < len(labels["held_out"]):
            raise InputError(
                f"{train} has {len(labels['train']):,} images, fewer than {held_out} with "
                f"{len(labels['held_out']):,}; were they swapped? Rename the files of both splits"
            )
        expected = len(COLLECTION_CLASSES.get(self.name, ())) or int(labels["train"].max()) + 1
        for split, label_N in labels.items():
            if label_N.min() < 0 or label_N.max() >= expected:
                first = FIRST_LABEL.get(self.name, 0)
                raise InputError(
                    f"{self.paths[split, 'labels']} has labels from {label_N.min() + first} to "
                    f"{label_N.max() + first}, outside of {first} to {expected - 1 + first}; give "
                    "files of one data set"
                )
        if missing := sorted(set(range(expected)) - set(np.unique(labels["train"]).tolist())):
            raise InputError(
                f"{self.paths['train', 'labels']} has no training images of {len(missing)} of "
                f"{expected} classes, first of class {missing[0]}; give complete files"
            )
        return labels


def find_collection(root: str) -> IdxCollection:
    """Finds the files of a data set.

    Args:
        root: folder of the files, or the folder and the beginning of their names.

    Raises:
        InputError: files are missing, or the folder holds several data sets.
    """
    if not root:
        raise InputError("root is empty; name the folder of the idx files")
    folder, name = as_path(root), ""
    if not _is_folder(folder):
        folder, name = folder.parent, folder.name
    collections = _collections(folder) if _is_folder(folder) else {}
    names = sorted(collections)
    if not name and "" not in collections:
        if len(names) > 1:
            raise InputError(
                f"{root} holds {len(names)} data sets: {', '.join(names)}; name one of them, as in "
                f"{os.path.join(root, names[0])}"
            )
        name = "".join(names)
    if name not in collections:
        hint = f"; {folder} has those of {', '.join(filter(None, names))}" if any(names) else ""
        raise InputError(
            f"{root} holds no idx files such as {EXAMPLE_NAME}{hint}. Images in folders are read "
            "by data=folder:DIR"
        )
    paths = collections[name]
    missing: list[tuple[Split, Kind]] = [part for part in PARTS if part not in paths]
    if missing:
        split, kind = missing[0]
        file_split = {"train": "train", "held_out": "t10k"}[split]
        raise InputError(
            f"{root} lacks {len(missing)} of 4 files, among them "
            f"{file_split}-{kind}-idx{AXES[kind]}-ubyte.gz; download it again"
        )
    return IdxCollection(name, paths)


def _is_folder(path: pathlib.Path) -> bool:
    return retry_read(path.is_dir, path)


def _collections(folder: pathlib.Path) -> dict[str, dict[tuple[Split, Kind], pathlib.Path]]:
    """Returns the idx files in a folder, by the beginning of their names, split and kind."""
    collections: dict[str, dict[tuple[Split, Kind], pathlib.Path]] = {}
    # Sorted in reverse, so that an unpacked file takes the place of the packed one.
    paths = retry_read(lambda: sorted(folder.iterdir(), reverse=True), folder)
    for path in paths:
        if match := FILE_NAME.fullmatch(path.name):
            kind: Kind = "images" if match["kind"] == "images" else "labels"
            key = SPLITS[match["split"]], kind
            collections.setdefault(match["collection"] or "", {})[key] = path
    return collections
