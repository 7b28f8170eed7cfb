"""How tokens lie in files, and how the files are written: each whole or not at all."""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from tqdm import tqdm

from varjax.core import files
from varjax.core.errors import InputError
from varjax.data.loader import Loader, Tally, stream
from varjax.data.stream import Examples, Split

ABOUT = "tokens.json"  # what all of a directory's tokens are
Encode = Callable[[np.ndarray], Any]  # images (B, H, W, C) -> tokens (B, L), in the background


def shard_starts(images: int, shards: int) -> list[int]:
    """The first image of each shard, and the number of images."""
    return [i * images // shards for i in range(shards + 1)]


def shard_name(split: str, number: int, count: int) -> str:
    """A shard's file."""
    return f"{split}-{number:05d}-of-{count:05d}.safetensors"


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to be, of the tokens of some consecutive images of a split.

    about: the content of ABOUT.
    """

    out: pathlib.Path
    split: Split
    number: int
    about: Mapping[str, Any]

    @classmethod
    def all(cls, out: pathlib.Path, about: Mapping[str, Any]) -> "list[Shard]":
        splits: tuple[Split, ...] = ("train", "held_out")
        return [cls(out, s, i, about) for s in splits for i in range(about["shards"][s])]

    @property
    def path(self) -> pathlib.Path:
        return self.out / shard_name(self.split, self.number, self.about["shards"][self.split])

    @property
    def augmentations(self) -> int:
        """Of each image."""
        return self.about["augmentations"][self.split]

    @property
    def rows(self) -> range:
        """Those of its images, numbered through the whole split."""
        starts = shard_starts(self.about["images"][self.split], self.about["shards"][self.split])
        start, stop = starts[self.number : self.number + 2]
        return range(start * self.augmentations, stop * self.augmentations)

    def write(self, rows: Mapping[str, np.ndarray]) -> None:
        """From the "tokens_BL", "label_B" and "valid_B" of all rows."""
        A, valid_B = self.augmentations, rows["valid_B"]
        tokens_BL = np.where(valid_B[:, None], rows["tokens_BL"], 0)
        tokens_BL = tokens_BL.astype(np.uint16 if self.about["vocab"] <= 2**16 else np.int32)
        arrays = {
            "tokens_NAL": tokens_BL.reshape(-1, A, tokens_BL.shape[1]),
            "label_N": rows["label_B"][::A],
            "valid_N": valid_B[::A],
        }
        for left_by_a_kill in self.out.glob(f".{self.path.name}.*.tmp"):
            left_by_a_kill.unlink()
        files.write_tensors(self.path, arrays, {})


def begin(path: pathlib.Path, about: dict[str, Any]) -> None:
    """Writes what the tokens will be, or makes sure that those there are the same."""
    if not (path / ABOUT).exists():
        if path.is_dir() and any(not file.name.startswith(".") for file in path.iterdir()):
            raise InputError(f"{path} holds files and no {ABOUT}; empty it or choose another out")
        files.write_json(path / ABOUT, about)
        return
    there = files.read_json(path / ABOUT)
    names = [name for name in about if there.get(name) != about[name]]
    if lines := [f"{name}: {there.get(name)} there, {about[name]} asked for" for name in names]:
        raise InputError(
            f"{path} holds other tokens:\n  "
            + "\n  ".join(line if len(line) < 300 else line[:300] + " …" for line in lines)
            + "\nask for the same to go on, delete it, or choose another out"
        )


def fill(shards: list[Shard], loader: Loader, encode: Encode) -> None:
    """Writes the files of `shards`, with batches of the loader's size and a progress bar."""
    total = sum(len(shard.rows) for shard in shards)
    pause = 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=total, unit="image", smoothing=0.05, mininterval=pause) as bar:
        for split in ("train", "held_out"):
            todo = [shard for shard in shards if shard.split == split]
            batches = itertools.chain(_encoded(todo, loader, encode) if todo else (), [None])
            made: list[Mapping[str, np.ndarray]] = []
            # One late, so that the devices are never without work.
            for batch, _ in itertools.pairwise(batches):
                assert batch is not None
                shard, rows, last = batch
                count = len(rows["label_B"])
                made.append(rows | {"tokens_BL": np.asarray(rows["tokens_BL"])[:count]})
                bar.update(count)
                if last:
                    shard.write({name: np.concatenate([m[name] for m in made]) for name in rows})
                    made = []


def _encoded(
    shards: list[Shard], loader: Loader, encode: Encode
) -> Iterator[tuple[Shard, dict[str, Any], bool]]:
    """(shard, some of its rows, whether they are the last ones); the tokens are still being made.

    All shards are of one split.
    """
    size = loader.batch_size
    batches = [(s, s.rows[i : i + size]) for s in shards for i in range(0, len(s.rows), size)]
    positions = [rows for _, rows in batches]
    if shards[0].split == "train":
        tally, A = Tally(len(loader.train_source)), shards[0].augmentations
        read = stream(loader.readers, tally, positions, Examples.augmented, A)
    else:
        tally = Tally(len(loader.held_out_source))
        read = stream(loader.readers, tally, positions, Examples.held_out)
    for (shard, where), rows in zip(batches, read, strict=True):
        image_BHWC = rows.pop("image_BHWC")
        whole_BHWC = np.zeros((size, *image_BHWC.shape[1:]), np.uint8)
        whole_BHWC[: len(image_BHWC)] = image_BHWC
        yield shard, rows | {"tokens_BL": encode(whole_BHWC)}, where.stop == shard.rows.stop
