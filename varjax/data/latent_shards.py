"""Defines the files of cached latents, and writes them.

A folder holds latents.json, and for each split some .safetensors files. Each file has the latents
of N consecutive images, with U augmentations each:

- for each array of the `latent_spec`, an array (N, U, ...) in its storage dtype
- "label_N", and "valid_N", which is False for broken images
- "checksum_NU", one for each augmentation of an image, checked when it is read. A checksum of the
  whole file would require reading all of it first.
"""

import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from varjax.data.loader import Loader, read_ahead
from varjax.data.stream import ExampleStream, Split
from varjax.errors import InputError
from varjax.storage import files, untrusted
from varjax.storage.checksums import row_checksum
from varjax.storage.image_files import BrokenImageCounter

CHECKSUM_NAME = "checksum_NU"
ABOUT_FILE = "latents.json"  # describes the latents in a folder
MAX_IMAGES, MAX_SHARDS = 2**40, 2**20
FLOATS = {"bfloat16", "float8_e4m3fn", "float8_e5m2"}  # NumPy has no letter for their kind

# uint8 images (B, H, W, C) -> latents (B, ...) by name; may return before they are computed.
EncodeBatch = Callable[[np.ndarray], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class ArraySpec:
    """Shape and storage dtype of one array of an image's latents: jax.ShapeDtypeStruct without JAX.

    Attributes:
        shape: shape of one image's array, without the batch axis.
        dtype: dtype of the files; in a batch, integers become int32 and floats float32.
    """

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def batch_dtype(self) -> type:
        return np.int32 if np.issubdtype(self.dtype, np.integer) else np.float32


@dataclasses.dataclass(frozen=True)
class RoundingError:
    """Holds the largest errors of stored floats.

    Attributes:
        absolute: largest absolute error.
        relative: largest error as a fraction of the number.
    """

    absolute: float = 0.0
    relative: float = 0.0

    @classmethod
    def of(cls, array: np.ndarray, stored: np.ndarray) -> "RoundingError":
        """Measures an array against its stored form."""
        errors, sizes = np.abs(stored.astype(array.dtype) - array), np.abs(array)
        # A number of 0 is stored as 0, so its error is 0.
        ratios = errors / np.maximum(sizes, np.finfo(array.dtype).tiny)
        return cls(float(errors.max(initial=0)), float(ratios.max(initial=0)))

    def __or__(self, other: "RoundingError") -> "RoundingError":
        """Returns the larger error of each kind."""
        absolute = max(self.absolute, other.absolute)
        return RoundingError(absolute, max(self.relative, other.relative))


RoundingErrors = dict[str, RoundingError]  # by the names in `latent_spec`


def spec_to_json(spec: Mapping[str, Any], floats: str | None = None) -> dict[str, Any]:
    """Returns a `latent_spec` as JSON data, {name: {"shape", "dtype"}}.

    Args:
        spec: arrays by name, each with a shape and a dtype.
        floats: dtype of stored floats; None for the one in `spec`.
    """
    dtypes = {name: np.dtype(array.dtype) for name, array in spec.items()}
    if floats is not None:
        wanted = np.dtype(floats)
        dtypes = {n: wanted if np.issubdtype(d, np.floating) else d for n, d in dtypes.items()}
    return {
        name: {"shape": list(array.shape), "dtype": dtypes[name].name}
        for name, array in spec.items()
    }


def read_about(path: pathlib.Path) -> dict[str, Any]:
    """Reads latents.json.

    Raises InputError if it is missing, incomplete or contains impossible values.
    """
    about = files.read_json(path)
    try:
        classes, sides = about["classes"], about["image_shape"]
        good = type(classes) is int and classes > 0 and isinstance(about["data"], dict)
        good &= isinstance(about["tokenizer_identity"], dict) and "seed" in about
        good &= len(untrusted.check_shape(sides, 1)) == 3
        for split, images in about["images"].items():
            shards, augmentations = about["shards"][split], about["augmentations"][split]
            good &= {type(images), type(shards), type(augmentations)} == {int}
            good &= 0 <= shards <= MAX_SHARDS and 0 <= images <= MAX_IMAGES and augmentations >= 1
        for spec in read_spec(about).values():
            untrusted.check_shape(spec.shape, spec.dtype.itemsize)
            good &= spec.dtype.kind in "iuf" or spec.dtype.name in FLOATS
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {untrusted.reason(error)}"
        raise InputError(
            f"{path} does not describe latents ({reason}); restore it, or make the latents again"
        ) from error
    if not good:
        raise InputError(f"{path} does not describe latents; restore it, or make the latents again")
    return about


def read_spec(about: Mapping[str, Any]) -> dict[str, ArraySpec]:
    """Returns the `latent_spec` in the content of latents.json."""
    return {
        name: ArraySpec(tuple(array["shape"]), np.dtype(array["dtype"]))
        for name, array in about["latent_spec"].items()
    }


def stored_name(name: str) -> str:
    """Returns the name in files of an array of a batch: "tokens_BL" is stored as "tokens_NUL"."""
    stem, _, letters = name.rpartition("_")
    return f"{stem}_NU{letters.removeprefix('B')}"


def shard_starts(images: int, shards: int) -> list[int]:
    """Returns the first image of each shard, and at the end the number of images."""
    return [i * images // shards for i in range(shards + 1)]


def shard_name(split: str, number: int, count: int) -> str:
    """Returns the file name of a split's shard `number` of `count`."""
    return f"{split}-{number:05d}-of-{count:05d}.safetensors"


@dataclasses.dataclass(frozen=True)
class LatentShard:
    """A file to write, with the latents of consecutive images of a split.

    Attributes:
        out: folder of the shards.
        split: name of the split, "train" or "held_out".
        number: number of the shard, from 0.
        about: content of latents.json.
    """

    out: pathlib.Path
    split: Split
    number: int
    about: Mapping[str, Any]

    @classmethod
    def all(cls, out: pathlib.Path, about: Mapping[str, Any]) -> "list[LatentShard]":
        """Lists the shards of both splits."""
        splits: tuple[Split, ...] = ("train", "held_out")
        return [cls(out, s, i, about) for s in splits for i in range(about["shards"][s])]

    @property
    def path(self) -> pathlib.Path:
        return self.out / shard_name(self.split, self.number, self.about["shards"][self.split])

    @property
    def augmentations(self) -> int:
        """The number of augmentations of each image, U."""
        return self.about["augmentations"][self.split]

    @property
    def rows(self) -> range:
        """Indices of its rows in the whole split, with U rows per image."""
        starts = shard_starts(self.about["images"][self.split], self.about["shards"][self.split])
        start, stop = starts[self.number : self.number + 2]
        return range(start * self.augmentations, stop * self.augmentations)

    def write(self, rows: Mapping[str, np.ndarray]) -> RoundingErrors:
        """Writes the file from the latents, "label_B" and "valid_B" of all its rows.

        Returns the rounding errors; raises InputError for NaN and for numbers too large to store.
        """
        U, valid_B = self.augmentations, rows["valid_B"]
        arrays = {"label_N": rows["label_B"][::U], "valid_N": valid_B[::U]}
        errors = {}
        for name, spec in read_spec(self.about).items():
            self._check_finite(name, rows)
            with np.errstate(over="ignore"):  # reported below
                array = rows[name].astype(spec.dtype)
            if np.issubdtype(spec.dtype, np.floating) and spec.dtype != rows[name].dtype:
                computed, stored = rows[name][valid_B], array[valid_B]
                if not np.isfinite(stored).all():
                    largest = np.abs(computed).max()
                    raise InputError(
                        f"{name}: {largest:g} cannot be stored as {spec.dtype}, whose largest "
                        f"number is {np.finfo(spec.dtype).max:g}; use --dtype=float32 with another "
                        "folder"
                    )
                errors[name] = RoundingError.of(computed, stored)
            array[~valid_B] = 0
            arrays[stored_name(name)] = array.reshape(-1, U, *spec.shape)
        arrays[CHECKSUM_NAME] = self._checksums(arrays)
        files.write_tensors(self.path, arrays, {})
        return errors

    def _check_finite(self, name: str, rows: Mapping[str, np.ndarray]) -> None:
        """Raises InputError if latents of a valid image are not finite."""
        finite_B = np.asarray(np.isfinite(rows[name]).reshape(len(rows[name]), -1).all(axis=1))
        if (bad := np.flatnonzero(rows["valid_B"] & ~finite_B)).size:
            row = self.rows.start + int(bad[0])
            image, augmentation = divmod(row, self.augmentations)
            raise InputError(
                f"{name} of {self.split} image {image} (from 0, label {rows['label_B'][bad[0]]}, "
                f"augmentation {augmentation}) contains NaN or infinity, as do {bad.size} of "
                f"{len(finite_B)} rows; this file is not written. Look at the image and its "
                "reconstruction (varjax evaluate-tokenizer), or use an earlier tokenizer step"
            )

    def _checksums(self, arrays: Mapping[str, np.ndarray]) -> np.ndarray:
        first, U, names = self.rows.start // self.augmentations, self.augmentations, self._stored
        checksum_NU = np.empty((len(arrays["label_N"]), U), np.uint64)
        for n, u in np.ndindex(checksum_NU.shape):
            label, valid = int(arrays["label_N"][n]), bool(arrays["valid_N"][n])
            latents = [arrays[name][n, u] for name in names]
            checksum_NU[n, u] = latents_checksum(self.split, first + n, u, label, valid, latents)
        return checksum_NU

    @property
    def _stored(self) -> list[str]:
        return [stored_name(name) for name in read_spec(self.about)]


def latents_checksum(
    split: Split,
    image: int,
    augmentation: int,
    label: int,
    valid: bool,
    latents: Sequence[np.ndarray],
) -> int:
    """Returns the checksum of an augmentation of an image.

    Args:
        split: name of the image's split.
        image: index of the image in the split.
        augmentation: index of the augmentation.
        label: class of the image.
        valid: False for a broken image.
        latents: the arrays as they are stored, in the order of `latent_spec`.
    """
    about = np.array([split == "train", image, augmentation, label, valid], np.int64)
    return row_checksum((about, *latents))


def write_shards(shards: list[LatentShard], loader: Loader, encode: EncodeBatch) -> RoundingErrors:
    """Encodes the images of `shards` and writes their files, with a progress bar.

    Args:
        shards: shards of either split.
        loader: loader of the images; its batch size is that of `encode`.
        encode: function that encodes a batch, over all devices of this process.

    Returns:
        The largest rounding errors, by name of the array.
    """
    errors: RoundingErrors = {}
    total = sum(len(shard.rows) for shard in shards)
    pause = 0.1 if sys.stderr.isatty() else 10
    with tqdm(total=total, unit="image", smoothing=0.05, mininterval=pause) as bar:
        for split in ("train", "held_out"):
            todo = [shard for shard in shards if shard.split == split]
            batches = itertools.chain(_encoded(todo, loader, encode) if todo else (), [None])
            made: list[Mapping[str, np.ndarray]] = []
            # Results are fetched one batch late, so that the devices always have work.
            for batch, _ in itertools.pairwise(batches):
                assert batch is not None
                shard, rows, last = batch
                count = len(rows["label_B"])
                made.append({name: np.asarray(array)[:count] for name, array in rows.items()})
                bar.update(count)
                if last:
                    whole = {name: np.concatenate([m[name] for m in made]) for name in rows}
                    for name, error in shard.write(whole).items():
                        errors[name] = errors.get(name, RoundingError()) | error
                    made = []
    return errors


def _encoded(
    shards: list[LatentShard], loader: Loader, encode: EncodeBatch
) -> Iterator[tuple[LatentShard, dict[str, Any], bool]]:
    """Yields (shard, some of its rows, whether they are its last), for shards of one split."""
    size = loader.batch_size
    batches = [(s, s.rows[i : i + size]) for s in shards for i in range(0, len(s.rows), size)]
    positions = [rows for _, rows in batches]
    if shards[0].split == "train":
        counter, U = BrokenImageCounter(len(loader.train_source)), shards[0].augmentations
        read = read_ahead(loader.readers, counter, positions, ExampleStream.augmented, U)
        read = loader.range_check.watch(read)
    else:
        counter = BrokenImageCounter(len(loader.held_out_source))
        read = read_ahead(loader.readers, counter, positions, ExampleStream.held_out)
    for (shard, where), rows in zip(batches, read, strict=True):
        image_BHWC = rows.pop("image_BHWC")
        padded_BHWC = np.zeros((size, *image_BHWC.shape[1:]), np.uint8)
        padded_BHWC[: len(image_BHWC)] = image_BHWC
        yield shard, rows | dict(encode(padded_BHWC)), where.stop == shard.rows.stop
