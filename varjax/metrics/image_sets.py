"""Sets of images to measure: an .npz in the evaluators' format, a folder, or a dataset."""

import collections
import hashlib
import itertools
import os
import pathlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from tqdm import tqdm

from varjax.data.stream import ImageDataset, Split, spread_indices
from varjax.data.workers import ReaderPool, ReadOptions
from varjax.errors import InputError
from varjax.storage import files
from varjax.storage.folders import files_below
from varjax.storage.image_files import (
    BrokenImage,
    BrokenImageCounter,
    decode_file,
    read_size_and_alpha,
)
from varjax.storage.npz import NpzArchive
from varjax.storage.read_errors import retry_read

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
LOSSY = {".jpg", ".jpeg"}
IMAGES_PER_PART, PARTS_AHEAD = 500, 1
LABEL_KEYS = "labels", "arr_1"  # written by varjax sample, and by ADM's samplers
T = TypeVar("T")


class ImageSet(Protocol):
    """Reads images part by part, so that they need not fit into memory."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, H, W, channels)."""
        ...

    @property
    def label_N(self) -> np.ndarray | None:
        """Classes of the images; None if unknown."""
        ...

    @property
    def digest(self) -> str:
        """Identifier of the images' content."""
        ...

    def parts(self, parts: Sequence[range]) -> Iterator[tuple[range, np.ndarray]]:
        """Yields each part and its images, uint8, while threads read the next part.

        Broken images of a dataset are left out, so a part may yield fewer images.

        Args:
            parts: parts in order, without overlap.
        """
        ...


def parts_of(count: int) -> list[range]:
    """Divides images into parts."""
    return [range(i, min(i + IMAGES_PER_PART, count)) for i in range(0, count, IMAGES_PER_PART)]


def open_image_set(location: str | os.PathLike) -> ImageSet:
    """Opens an .npz with uint8 images under "arr_0", or a folder of images of one size.

    Raises InputError for anything else.
    """
    path = files.local_copy(location)
    if path.is_dir():
        return FolderImages(path)
    if not path.exists():
        raise InputError(f"{path} does not exist; use an .npz or a folder of images")
    if path.suffix != ".npz":
        raise InputError(f"{path}: use an .npz with images under arr_0, or a folder of images")
    return NpzImages(path)


class NpzImages:
    """Reads "arr_0", uint8 (N, H, W, channels), of an .npz; raises InputError if it has none."""

    def __init__(self, path: pathlib.Path):
        self._path, self._archive = path, NpzArchive(path)
        if "arr_0" not in self._archive.names:
            raise InputError(
                f"{path} has no images: arr_0 is missing; it has "
                f"{', '.join(self._archive.names[:8])}"
            )
        shape, dtype = self._archive.header("arr_0")
        if dtype != np.uint8 or len(shape) != 4 or shape[-1] not in (1, 3):
            raise InputError(
                f"arr_0 of {path} is {dtype} of shape {shape}; images are uint8, "
                "(N, height, width, 1 or 3)"
            )
        next(self._archive.rows("arr_0", []), None)  # refuses Fortran order at once
        self.shape: tuple[int, ...] = shape
        self.label_N: np.ndarray | None = None
        for key in LABEL_KEYS:
            if key in self._archive.names:
                label_shape, label_dtype = self._archive.header(key)
                if label_shape == shape[:1] and np.issubdtype(label_dtype, np.integer):
                    self.label_N = self._archive.read(key)

    @property
    def digest(self) -> str:
        return file_digest(self._path)

    def parts(self, parts: Sequence[range]) -> Iterator[tuple[range, np.ndarray]]:
        rows = self._archive.rows("arr_0", parts)
        # One thread, because they are read in order.
        read = _read_ahead(lambda _: next(rows), ([part] for part in parts), threads=1)
        for part, (images_NHWC,) in zip(parts, read, strict=True):
            yield part, images_NHWC


class FolderImages:
    """Reads all image files below a folder as RGB without alpha, in the order of their paths.

    Hidden files and folders are skipped; hidden folders with images are reported on stderr. Classes
    are taken from the file names that `varjax sample` writes. Those of other files are unknown: the
    names of folders do not say how a model or a classifier numbers its classes. Raises InputError
    for a folder without images or with several image sizes.
    """

    def __init__(self, path: pathlib.Path):
        self._path = path
        self._files = _visible_images(path)
        if not self._files:
            raise InputError(f"{path} contains no images ({', '.join(sorted(SUFFIXES))})")
        sizes: dict[tuple[int, int], pathlib.Path] = {}
        self._transparent = False
        for file in self._files:
            size, transparent = read_size_and_alpha(file)
            sizes.setdefault(size, file)
            self._transparent |= transparent
        if len(sizes) > 1:
            examples = ", ".join(
                f"{w}x{h} ({file.name})" for (w, h), file in list(sizes.items())[:4]
            )
            raise InputError(
                f"the images in {path} have several sizes: {examples}; resize them to one size "
                "(varjax evaluate --reference=folder:PATH crops them)"
            )
        self.lossy = any(file.suffix.lower() in LOSSY for file in self._files)
        W, H = next(iter(sizes))
        self.shape = len(self._files), H, W, 3
        self.label_N = self._labels()

    @property
    def digest(self) -> str:
        # Older versions put transparent images on white.
        sha256 = hashlib.sha256(b"without alpha\n" * self._transparent)
        for file in self._files:
            sha256.update(f"{file.relative_to(self._path)} {file_digest(file)}\n".encode())
        return sha256.hexdigest()

    def parts(self, parts: Sequence[range]) -> Iterator[tuple[range, np.ndarray]]:
        for part, images in zip(parts, _read_ahead(self._read, parts), strict=True):
            yield part, np.stack(images)

    def _read(self, i: int) -> np.ndarray:
        file = self._files[i]
        image_HWC = decode_file(file)  # drops alpha, as datasets do
        height, width = image_HWC.shape[:2]
        _, H, W, _ = self.shape
        if (height, width) != (H, W):
            raise InputError(
                f"{file} is rotated by its EXIF data to {width}x{height}, but the others have "
                f"{W}x{H}; save it without rotation"
            )
        return image_HWC

    def _labels(self) -> np.ndarray | None:
        stems = [file.stem.rpartition("_label")[2] for file in self._files]
        if all("_label" in file.stem for file in self._files) and all(s.isdigit() for s in stems):
            return np.array(stems, np.int64)
        return None


class DatasetImages:
    """Reads all images of a split of a dataset, preprocessed as for evaluation.

    Broken images are reported and left out of `parts`. As in training, up to 1 % may be broken.

    Args:
        data: dataset of the images.
        split: name of the split, "train" or "held_out".
        at_most: largest number of images, chosen by `spread_indices`; 0 for all.
    """

    label_N = None  # known only once the images are read; see `labeled_parts`

    def __init__(self, data: ImageDataset, split: Split, at_most: int = 0):
        self._data, self._source = data, data.source(split)
        self._index_N = spread_indices(len(self._source), at_most)
        self.shape = len(self._index_N), *data.image_shape
        self._counter = BrokenImageCounter(len(self._index_N))

    @property
    def digest(self) -> str:
        # Pixels are hashed, because a file may change without its name.
        sha256 = hashlib.sha256(str(self.shape).encode())
        with tqdm(total=self.shape[0], unit=" images", desc="hashing the reference") as bar:
            for examples in self._examples(parts_of(self.shape[0])):
                for example in examples:
                    sha256.update(b"broken" if example is None else example[0].tobytes())
                    bar.update()
        return sha256.hexdigest()

    def parts(self, parts: Sequence[range]) -> Iterator[tuple[range, np.ndarray]]:
        for part, images_NHWC, _ in self.labeled_parts(parts):
            yield part, images_NHWC

    def labeled_parts(
        self, parts: Sequence[range]
    ) -> Iterator[tuple[range, np.ndarray, np.ndarray]]:
        """Yields each part, its images and their classes; otherwise like `parts`."""
        for part, found in zip(parts, self._examples(parts), strict=True):
            examples = [example for example in found if example is not None]
            images = [image_HWC for image_HWC, _ in examples]
            images_NHWC = np.stack(images) if images else np.empty((0, *self.shape[1:]), np.uint8)
            yield part, images_NHWC, np.array([label for _, label in examples], np.int64)

    def _examples(self, parts: Sequence[range]) -> Iterator[list[tuple[np.ndarray, int] | None]]:
        """Yields the images and classes of each part; None for a broken image."""
        for found in _read_ahead(self._read, parts, self._data.reading.threads):
            self._counter.add(len(found), [x for x in found if isinstance(x, BrokenImage)])
            yield [None if isinstance(x, BrokenImage) else x for x in found]

    def _read(self, i: int) -> tuple[np.ndarray, int] | BrokenImage:
        """Reads image `i` and its class; returns the error if it is broken."""
        try:
            example = self._source[int(self._index_N[i])]
            return self._data.preprocess(example["image"]), example["label"]
        except BrokenImage as error:
            return error


def _read_ahead(
    read: Callable[[Any], T], parts: Iterable[Sequence], threads: int = 0
) -> Iterator[list[T]]:
    """Yields `read(i)` for all i of each part, while threads read the next part.

    Args:
        read: function that reads an image.
        parts: its arguments, part by part.
        threads: number of threads; 0 for one per CPU.
    """
    pool = ReaderPool(read, ReadOptions(threads=threads))

    def read_chunk(read: Callable[[Any], T], chunk: Sequence) -> list[T]:
        return [read(i) for i in chunk]

    return pool.map_ahead(
        lambda chunks: list(itertools.chain(*chunks)), read_chunk, parts, ahead=PARTS_AHEAD
    )


def file_digest(path: pathlib.Path) -> str:
    """Returns the SHA-256 of a file; StorageError if the machine cannot read it now."""

    def digest() -> str:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    return retry_read(digest, path)


def _visible_images(folder: pathlib.Path) -> list[pathlib.Path]:
    """Lists image files at any depth, sorted; reports hidden folders that contain images."""
    visible, hidden = [], collections.Counter()
    for file in retry_read(lambda: list(files_below(folder)), folder):
        if file.suffix.lower() not in SUFFIXES or file.name.startswith("."):
            continue
        parts = file.relative_to(folder).parts[:-1]
        if depth := next((i for i, name in enumerate(parts, 1) if name.startswith(".")), 0):
            hidden[folder.joinpath(*parts[:depth])] += 1
        else:
            visible.append(file)
    for hidden_folder, count in sorted(hidden.items()):
        tqdm.write(f"{hidden_folder} is hidden and skipped (images: {count})", file=sys.stderr)
    return sorted(visible)
