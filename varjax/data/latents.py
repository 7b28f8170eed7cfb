"""Tokens computed once, to train on instead of images: python -m varjax.data.cache_latents."""

import bisect
import dataclasses
import functools
import pathlib
from typing import Any

import numpy as np

from varjax.core import files
from varjax.core.errors import InputError
from varjax.data.decoding import BrokenImage
from varjax.data.latent_shards import ABOUT, shard_name, shard_starts
from varjax.data.loader import Loader
from varjax.data.stream import Example, Split
from varjax.data.workers import Reading


@dataclasses.dataclass(frozen=True)
class Tokens:
    """A directory that `python -m varjax.data.cache_latents` filled.

    It holds the tokens of N augmentations of each training image, of which epoch e shows number
    e mod N. With the seed that they were made with, the first N epochs are those of the images.
    ValueError where `root` holds none, or not yet all.
    """

    root: str
    reading: Reading = Reading()

    @functools.cached_property
    def about(self) -> dict[str, Any]:
        """What they are: all that the command was asked for."""
        if not (path := pathlib.Path(self.root) / ABOUT).is_file():
            raise InputError(
                f"{self.root} holds no tokens: {path} is missing; make some by "
                "python -m varjax.data.cache_latents"
            )
        return files.read_json(path)

    @property
    def classes(self) -> int:
        return self.about["classes"]

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of the images that became tokens."""
        H, W, C = self.about["image_shape"]
        return H, W, C

    def make(self, batch_size: int, seed: int, rows: range | None = None) -> Loader:
        """Batches {"tokens_BL", "label_B"}, of which this process gets `rows` (None: all)."""
        views = TokenViews(self.about["length"])
        loader = Loader(self, batch_size, seed, rows, views, self.about["tokenized_by"])
        _ = loader.train_source, loader.held_out_source  # so that what is missing is told now
        return loader

    def source(self, split: Split) -> "StoredTokens":
        """The images of one split, in the order of the data that they were."""
        about = self.about
        shape = about["images"][split], about["augmentations"][split], about["length"]
        stored = StoredTokens(self.root, split, shape, about["shards"][split])
        stored.open()
        return stored

    def describe(self) -> dict[str, Any]:
        """What the images were, and what tells whether the tokens are still the same ones."""
        names = "tokenized_by", "augmentations", "seed"
        return self.about["data"] | {name: self.about[name] for name in names}


@dataclasses.dataclass(frozen=True)
class TokenViews:
    """What of the stored tokens goes into a batch: those of one augmentation."""

    length: int

    def train(self, example: dict, epoch: int, rng: np.random.Generator) -> Example:
        tokens_AL = example["tokens"]
        return _tokens(tokens_AL[epoch % len(tokens_AL)], example["label"])

    def held_out(self, example: dict) -> Example:
        return _tokens(example["tokens"][0], example["label"])

    def blank(self) -> Example:
        return _tokens(np.zeros(self.length), 0)


@dataclasses.dataclass(frozen=True)
class StoredTokens:
    """{"tokens": (augmentations, L), "label"} of each image, read from mapped files.

    `shape` is (images, augmentations, L).
    """

    root: str
    split: Split
    shape: tuple[int, int, int]
    shards: int

    @functools.cached_property
    def starts(self) -> list[int]:
        """The first image of each shard, and the number of images."""
        return shard_starts(self.shape[0], self.shards)

    def open(self) -> None:
        """Maps the files; ValueError where some are missing or of another shape."""
        _ = self.arrays

    @functools.cached_property
    def arrays(self) -> list[dict[str, np.ndarray]]:
        """Those of each shard."""
        root = pathlib.Path(self.root)
        paths = [root / shard_name(self.split, i, self.shards) for i in range(self.shards)]
        if missing := sum(not path.is_file() for path in paths):
            raise InputError(
                f"{self.root} lacks {missing} of {self.shards} {self.split} files of tokens; run "
                "python -m varjax.data.cache_latents to its end"
            )
        arrays = [files.read_tensors(path)[0] for path in paths]
        for i, (path, found) in enumerate(zip(paths, arrays, strict=True)):
            shape = self.starts[i + 1] - self.starts[i], *self.shape[1:]
            if found["tokens_NAL"].shape != shape:
                raise InputError(
                    f"{path} holds {found['tokens_NAL'].shape} tokens, but {shape} belong there; "
                    "delete it and make it again"
                )
        return arrays

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: int) -> dict:
        shard = bisect.bisect(self.starts, index) - 1
        row, arrays = index - self.starts[shard], self.arrays[shard]
        if not arrays["valid_N"][row]:
            raise BrokenImage(f"{self.root} {self.split}[{index}]", "it has no tokens")
        return {"tokens": arrays["tokens_NAL"][row], "label": int(arrays["label_N"][row])}

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def _tokens(tokens_L, label):
    return {"tokens_BL": tokens_L.astype(np.int32), "label_B": np.int32(label)}
