"""Reads latents that were computed once, to train on instead of images."""

import bisect
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from varjax.data.latent_shards import (
    ABOUT_FILE,
    CHECKSUM_NAME,
    ArraySpec,
    latents_checksum,
    read_about,
    read_spec,
    shard_name,
    shard_starts,
    stored_name,
)
from varjax.data.loader import Loader
from varjax.data.stream import Example, Split
from varjax.data.workers import ReadOptions
from varjax.errors import DamagedFileError, InputError
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.storage.image_files import BrokenImage


@dataclasses.dataclass(frozen=True)
class CachedLatents:
    """A folder that `varjax cache-latents` filled.

    It holds the latents of U augmentations of each training image; epoch e shows augmentation
    e mod U. A run with the seed of the latents has the same first U epochs as on the images. Raises
    InputError if `root` holds no latents, or not all of them.

        data = CachedLatents("/data/tokens")
        batch = data.make(batch_size=64, seed=0).train_batch(0)  # {"tokens_BL", "label_B"}

    Attributes:
        root: folder of the cached latents.
        reading: numbers of threads and worker processes that read.
    """

    root: str
    reading: ReadOptions = ReadOptions()

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """The content of latents.json, which the command wrote."""
        if not (path := as_path(self.root) / ABOUT_FILE).is_file():
            raise InputError(
                f"{self.root} holds no latents: {path} is missing; make them with "
                "varjax cache-latents"
            )
        return read_about(path)

    @property
    def classes(self) -> int:
        return self.about["classes"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of the encoded images."""
        H, W, C = self.about["image_shape"]
        return H, W, C

    @property
    def latent_spec(self) -> dict[str, ArraySpec]:
        """Shape and storage dtype of one image's latents, by their names in a batch."""
        return read_spec(self.about)

    def make(self, batch_size: int, seed: int = 0, rows: Sequence[int] | None = None) -> Loader:
        """Makes batches of the latents and "label_B"; see `make_loader`."""
        transform, identity = LatentTransform(self.latent_spec), self.about["tokenizer_identity"]
        loader = Loader(self, transform, batch_size, seed, rows, identity)
        _ = loader.train_source, loader.held_out_source  # reports missing files now
        return loader

    def source(self, split: Split) -> "LatentSource":
        """Opens a split, in the order of the images."""
        about = self.about
        source = LatentSource(
            self.root,
            split,
            images=about["images"][split],
            augmentations=about["augmentations"][split],
            shards=about["shards"][split],
            spec=self.latent_spec,
        )
        _ = source.arrays  # reports missing and wrong files now
        return source

    def describe(self) -> dict[str, Any]:
        """Returns JSON data that describe the images and reveal whether latents have changed."""
        names = {"tokenizer_identity", "latent_spec", "settings", "augmentations", "seed", "pixels"}
        return self.about["data"] | {name: x for name, x in self.about.items() if name in names}


@dataclasses.dataclass(frozen=True)
class LatentTransform:
    """Makes rows of one augmentation of stored latents: integers as int32, floats as float32."""

    spec: Mapping[str, ArraySpec]

    def train(self, example: dict, index: int, epoch: int, rng: np.random.Generator) -> Example:
        return self._augmentation(example, epoch % example["augmentations"])

    def held_out(self, example: dict) -> Example:
        return self._augmentation(example, 0)

    def blank(self) -> Example:
        zeros = {name: np.zeros(spec.shape, spec.dtype) for name, spec in self.spec.items()}
        return self._row(zeros, {"label": 0})

    def _augmentation(self, example: dict, number: int) -> Example:
        example["check"](number)
        return self._row({name: x[number] for name, x in example["latents"].items()}, example)

    def _row(self, latents, example):
        arrays = {name: x.astype(self.spec[name].batch_dtype) for name, x in latents.items()}
        return arrays | {"label_B": np.int32(example["label"])}


@dataclasses.dataclass(frozen=True)
class LatentSource:
    """Reads {"latents": {name: (U, ...)}, "label", …} of each image from memory-mapped files.

    "augmentations" is U. "check" is a function of an augmentation's index, which raises
    DamagedFileError if its latents have changed since they were written.

    Attributes:
        root: folder of the cached latents.
        split: name of the split, "train" or "held_out".
        images: number of images in the split.
        augmentations: number U of augmentations of each image.
        shards: number of files of the split.
        spec: spec of one image's latents.
    """

    root: str
    split: Split
    images: int
    augmentations: int
    shards: int
    spec: Mapping[str, ArraySpec]

    @functools.cached_property
    def starts(self) -> list[int]:
        """The first image of each shard, and the number of images."""
        return shard_starts(self.images, self.shards)

    @functools.cached_property
    def arrays(self) -> list[dict[str, np.ndarray]]:
        """The stored arrays of each shard; InputError if files are missing or have other shapes."""
        root = as_path(self.root)
        paths = [root / shard_name(self.split, i, self.shards) for i in range(self.shards)]
        if missing := sum(not path.is_file() for path in paths):
            raise InputError(
                f"{self.root} lacks {missing} of {self.shards} {self.split} files of latents; let "
                "varjax cache-latents finish"
            )
        shards = [files.read_tensors(path, check=False)[0] for path in paths]
        for i, (path, shard) in enumerate(zip(paths, shards, strict=True)):
            count, U = self.starts[i + 1] - self.starts[i], self.augmentations
            expected = {
                stored_name(name): ((count, U, *spec.shape), spec.dtype)
                for name, spec in self.spec.items()
            }
            expected |= {"valid_N": ((count,), np.dtype(bool))}
            expected |= {"label_N": ((count,), shard.get("label_N", np.zeros(0, int)).dtype)}
            expected |= {CHECKSUM_NAME: ((count, U), np.dtype(np.uint64))}
            kinds = {name: (array.shape, array.dtype) for name, array in shard.items()}
            for name, (shape, dtype) in expected.items():
                if kinds.get(name) != (shape, dtype):
                    actual = "{} {}".format(*kinds[name]) if name in kinds else "missing"
                    raise InputError(
                        f"{path}: {name} is {actual}, but must be {shape} {dtype}; delete the file "
                        "and make it again"
                    )
        return shards

    def __len__(self) -> int:
        return self.images

    def __getitem__(self, index: int) -> dict:
        shard = bisect.bisect(self.starts, index) - 1
        row, arrays = index - self.starts[shard], self.arrays[shard]
        label, valid = int(arrays["label_N"][row]), bool(arrays["valid_N"][row])
        latents = {name: arrays[stored_name(name)][row] for name in self.spec}

        def check(u: int) -> None:
            stored = [array[u] for array in latents.values()]
            checksum = latents_checksum(self.split, index, u, label, valid, stored)
            if checksum != arrays[CHECKSUM_NAME][row, u]:
                name = shard_name(self.split, shard, self.shards)
                raise DamagedFileError(
                    f"{as_path(self.root) / name} is damaged: the checksum of image {row} in it "
                    "does not match; delete it and run varjax cache-latents again"
                )

        if not valid:
            check(0)
            raise BrokenImage(f"{self.root} {self.split}[{index}]", "it has no latents")
        return {
            "latents": latents,
            "label": label,
            "augmentations": self.augmentations,
            "check": check,
        }

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
