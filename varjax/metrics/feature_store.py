"""Features on disk, part by part, so that an interrupted extraction can continue."""

import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from varjax.errors import InputError
from varjax.metrics.features import FeatureExtractor, Features
from varjax.metrics.image_sets import ImageSet
from varjax.storage import files, folders
from varjax.storage.work_folders import remove_work_folder

IMAGES_PER_PART = 500  # images of a part
REQUEST_FILE = "request.json"


class FeatureStore:
    """A folder with the features of some images, each part of them whole or absent.

    Args:
        folder: folder that is absent, or was started for an equal request.
        request: JSON data that determines the features.

    Raises:
        InputError: the folder holds anything else.
    """

    def __init__(self, folder: pathlib.Path, request: Mapping[str, Any], write: bool = True):
        folders.claim_folder(folder, REQUEST_FILE, request, write)
        self._folder = folder

    def has(self, part: range) -> bool:
        """Returns whether a part can be read; a damaged one is reported and removed."""
        return folders.read_or_remove(self._file(part)) is not None

    def add(self, part: range, features: Features) -> None:
        """Writes the features of a part."""
        files.write_tensors(self._file(part), features, {})

    def read(self, part: range, fewer: bool = False) -> Features:
        """Reads the features of a part.

        Args:
            part: numbers of the images.
            fewer: whether broken images may have been left out.

        Raises:
            InputError: the file is damaged.
        """
        path = self._file(part)
        found, _ = files.read_tensors(path)
        lengths = {len(x) for x in found.values()}
        if len(lengths) != 1 or max(lengths) > len(part) or min(lengths) < len(part) and not fewer:
            raise InputError(f"{path} holds other images; delete it and go on")
        return found

    def join(self, parts: list[range]) -> Features:
        """Reads all parts, into one array of each kind."""
        read = [self.read(part) for part in parts]
        return {name: np.concatenate([x[name] for x in read]) for name in read[0]}

    def delete(self) -> None:
        """Removes the folder."""
        remove_work_folder(self._folder)

    def _file(self, part: range) -> pathlib.Path:
        return self._folder / f"{part.start:09d}.safetensors"


def parts_of(count: int) -> list[range]:
    """Shares out images to parts."""
    return [range(i, min(i + IMAGES_PER_PART, count)) for i in range(0, count, IMAGES_PER_PART)]


def extract_features(
    images: ImageSet, extract: FeatureExtractor, store: FeatureStore, description: str
) -> None:
    """Computes the features that `store` lacks, with a progress bar that has this `description`."""
    count = images.shape[0]
    missing = [part for part in parts_of(count) if not store.has(part)]
    left = sum(map(len, missing))
    with tqdm(total=count, initial=count - left, unit=" images", desc=description) as bar:
        for part, images_NHWC in images.parts(missing):
            count = len(images_NHWC)  # 0 where all are broken, which no program is compiled for
            padded_NHWC = images_NHWC if count else np.zeros((1, *images.shape[1:]), np.uint8)
            features = extract(padded_NHWC, bar.update)
            store.add(part, {name: x[:count] for name, x in features.items()})
