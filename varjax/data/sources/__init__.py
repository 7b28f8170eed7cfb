"""All datasets, and their names on the command line."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from varjax.config import config_tree
from varjax.config.arguments import split_argument
from varjax.data.latents import CachedLatents
from varjax.data.sources.digits import Digits
from varjax.data.sources.folder import Folder
from varjax.data.sources.idx import Idx
from varjax.data.sources.noise import Noise
from varjax.data.sources.photos import Photos
from varjax.data.sources.tfds import TFDS
from varjax.data.transforms import Crop, height_width
from varjax.errors import InputError

__all__ = [
    "TFDS",
    "CachedLatents",
    "Digits",
    "Folder",
    "Idx",
    "Noise",
    "Photos",
    "dataset_of_command",
    "parse_dataset",
]
# Fields that a command derives from its model, or has flags for.
SET_BY_COMMANDS = {"size", "channels", "crop"}


def replaced_dataset(
    text: str, experiment: Any
) -> CachedLatents | Digits | Folder | Idx | Noise | Photos | TFDS:
    """Makes the dataset of --config.data=TEXT, with size, crop and flips as before.

    Args:
        text: what `parse_dataset` reads, then fields of the dataset after commas:
            "folder:DIR,held_out=0.1", "tfds:NAME,size=64".
        experiment: settings with the dataset that is replaced.

    Raises:
        InputError: there is no such dataset or field.
    """
    where, fields = _split_fields(text)
    height, width, channels = experiment.data.image_shape
    size = height_width(_size(fields.pop("size")) if "size" in fields else (height, width))
    data: Any = parse_dataset(where, size, channels)
    # The recipe's augmentation stays, where the new dataset has it too.
    names = {field.name for field in dataclasses.fields(data)} & {"crop", "flip"}
    augmentation = {n: getattr(experiment.data, n) for n in names if hasattr(experiment.data, n)}
    return _with_fields(dataclasses.replace(data, **augmentation), fields)


def dataset_of_command(
    text: str, size: int | tuple[int, int] | None, channels: int = 3, crop: Crop = "random"
) -> Digits | Folder | Idx | Noise | Photos | TFDS:
    """Makes the dataset of a command that measures images or learns from them.

    Args:
        text: what `parse_dataset` reads, then fields of the dataset after commas, such as its
            splits: "folder:DIR,held_out=0.1", "tfds:NAME,held_out=test".
        size: pixels of both sides, or (height, width), or None; see `parse_dataset`.
        channels: channels of the images, if the dataset has a choice.
        crop: how photographs of other sizes are cropped.

    Raises:
        InputError: there is no such dataset or field, it has no images but latents, or the command
            sets the field itself.
    """
    where, fields = _split_fields(text)
    data = parse_dataset(where, size, channels, crop)
    if isinstance(data, CachedLatents):
        raise InputError(
            f"data={text} holds latents, but images are needed; give folder:…, idx:… or tfds:…"
        )
    for name in sorted(SET_BY_COMMANDS & fields.keys()):
        raise InputError(
            f"{name}={fields[name]} in {text}: is set by the command, not in the dataset; see its "
            "--help"
        )
    return _with_fields(data, fields)


def _split_fields(text: str) -> tuple[str, dict[str, str]]:
    """Splits "folder:DIR,held_out=0.1" into "folder:DIR" and {"held_out": "0.1"}."""
    first, *changes = split_argument(f"data={text}")
    pairs = (change.partition("=") for change in changes)
    return first.removeprefix("data="), {name: value for name, _, value in pairs}


def _with_fields(data: Any, fields: Mapping[str, str]) -> Any:
    return config_tree.override(data, [f"{name}={value}" for name, value in fields.items()])


def _size(text: str) -> int:
    if not text.isdigit():
        raise InputError(f"size={text!r}: must be the side of the images in pixels, as in size=28")
    return int(text)


def parse_dataset(
    text: str, size: int | tuple[int, int] | None, channels: int = 3, crop: Crop = "random"
) -> CachedLatents | Digits | Folder | Idx | Noise | Photos | TFDS:
    """Makes the dataset that a command line names.

    Args:
        text: "folder:PATH", "tfds:NAME", "tfds:DIRECTORY", "idx:PATH", "latents:PATH",
            "digits", "photos" or "random".
        size: pixels of both sides of the images, or (height, width); None for that of the images,
            if they have only one (digits, idx).
        channels: channels of the images, if the dataset has a choice.
        crop: how photographs of other sizes are cropped, as `Folder` and `TFDS` take it.

    Raises:
        InputError: anything else, or a size that the dataset does not have.
    """
    kind, colon, where = text.partition(":")
    if kind == "latents" and where:
        return CachedLatents(where)
    if kind == "idx" and where:
        data = Idx(where)
        stored = data.image_shape[:2]
        if size is not None and height_width(size) != stored:
            raise InputError(
                f"the images in {where} are {stored[0]} by {stored[1]} pixels, not {size}; choose "
                "other data, or a model for this size (configs/small.py)"
            )
        return data
    if kind == "digits" and not colon:
        if size not in (None, 8, (8, 8)):
            raise InputError(f"digits are 8 by 8 pixels, not {size}; choose other data")
        return Digits()
    if size is not None:
        if kind == "folder" and where:
            return Folder(where, size, channels, crop)
        if kind == "tfds" and where:
            return TFDS(where, size=size, channels=channels, crop=crop)
        if kind == "random" and not colon:
            return Noise(size, channels)
        if kind == "photos" and not colon:
            return Photos(size)
    elif kind in ("folder", "tfds", "random", "photos"):
        raise InputError(f"size is missing: data={text} needs it, in pixels, as in size=32")
    raise InputError(
        f"data is {text!r}; give folder:PATH (images in folders), tfds:NAME or tfds:DIRECTORY "
        "(a prepared dataset), idx:PATH (MNIST's files), latents:PATH (encoded once), digits, "
        "photos (crops of two photographs), or random (noise, to try things out)"
    )
