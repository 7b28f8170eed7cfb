"""Reads the text after the colon of configs for small images, and opens their data."""

import dataclasses
import itertools
import os
import re
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from varjax.data.sources import TFDS, CachedLatents, Folder, Idx, parse_dataset
from varjax.data.sources.folder import FolderSource
from varjax.errors import InputError
from varjax.storage.image_files import BrokenImage

from ._arguments import COMMA_HINT, split_words

Quality = Literal["quick", "good"]
QUALITIES: tuple[Quality, ...] = ("quick", "good")
SETTINGS = ("data", "size", "held_out", "quality", "tokenizer")
GRAY_CHECK_IMAGES = 64  # number of images read to tell gray from color
SMALLEST, LARGEST = 8, 64  # pixels of a side
MOST_TOKENS = 8  # of a side


@dataclasses.dataclass(frozen=True)
class SmallRun:
    """Holds what the text after the colon asks for.

    Attributes:
        data: dataset of the images, with one channel if they are gray.
        name: name of the runs on these data, such as "fashion_mnist_28" or "fashion_mnist_28_good".
        quality: choice between short and long runs.
        tokenizer: run of the tokenizer; "" for the one with the same text after the colon.
        options: words without "=".
    """

    data: Any
    name: str
    quality: Quality
    tokenizer: str
    options: tuple[str, ...]

    def tokenizer_run(self, suffix: str = "tokenizer") -> str:
        """Returns the directory of the tokenizer's run, which ends in `suffix` by default."""
        return self.tokenizer or f"runs/{self.name}_{suffix}"


def read_small_run(arg: str, options: Sequence[str] = ()) -> SmallRun:
    """Reads "data=WHERE,size=PIXELS" and more, in any order.

    Optional are "held_out=FRACTION" (or the name of a split), "quality=good", "tokenizer=RUN" and
    the words in `options`. Idx files and latents have a size and need no "size".

    Raises:
        InputError: anything else in `arg`, or a dataset that cannot be read.
    """
    words = [word for word in split_words(arg) if word]
    chosen = tuple(word for word in words if word in options)
    pairs = [word.partition("=") for word in words if word not in options]
    settings = {name: value for name, equals, value in pairs if equals and name in SETTINGS}
    if len(settings) < len(pairs) or not settings.get("data"):
        problem = f"cannot read {arg!r}" if arg else "this config needs its data"
        more = f", {', '.join(options)}" if options else ""
        hint = COMMA_HINT if "data" in settings else ""
        raise InputError(
            f"{problem}; give data=folder:DIR,size=28 after the colon, or data=idx:DIR, and "
            f"optionally held_out=0.1, quality=good, tokenizer=RUN{more}{hint}"
        )
    quality = settings.get("quality", "quick")
    if quality not in QUALITIES:
        raise InputError(f"quality is {quality!r}; allowed are {', '.join(QUALITIES)}")
    data = _open_data(settings["data"], settings.get("size", ""))
    if "held_out" in settings:
        data = _with_held_out(data, settings["held_out"])
    if isinstance(data, Folder | TFDS) and _is_gray(_unsplit_source(data)):
        data = dataclasses.replace(data, channels=1)
    location = os.path.normpath(settings["data"].partition(":")[2] or settings["data"])
    name = re.sub(r"\W+", "_", os.path.basename(location)).strip("_").lower() or "images"
    parts = [name, str(data.image_shape[0]), *["good"] * (quality == "good")]
    return SmallRun(data, "_".join(parts), quality, settings.get("tokenizer", ""), chosen)


def downsampling_levels(image_shape: tuple[int, int, int]) -> int:
    """Returns the smallest number of halvings, at least one, that leaves at most 8 tokens a side.

    Raises InputError for images that are not square, or not of 8 to 64 pixels, and for a side that
    cannot be halved so often.
    """
    height, width, _ = image_shape
    if height != width or not SMALLEST <= height <= LARGEST:
        raise InputError(
            f"images of {height} by {width} pixels; these configs are for square ones of "
            f"{SMALLEST} to {LARGEST} pixels"
        )
    levels = next(n for n in itertools.count(1) if height <= MOST_TOKENS * 2**n)
    if height % 2**levels:
        below = height // 2**levels * 2**levels
        raise InputError(
            f"size={height}: must be a multiple of {2**levels}, such as {below} or "
            f"{below + 2**levels}; images are resized to it"
        )
    return levels


def training_images(data: Any) -> int:
    """Counts the training images; of a folder without val/ also those that are held out."""
    return len(data.labels["train"]) if isinstance(data, Idx) else len(_unsplit_source(data))


def _open_data(where: str, size: str) -> Any:
    kind, _, path = where.partition(":")
    if kind in ("idx", "latents") and path:
        data = Idx(path) if kind == "idx" else CachedLatents(path)
        stored = data.image_shape[0]
        if size and size != str(stored):
            raise InputError(f"size={size}: {where} has {stored} pixels a side; leave size out")
        return data
    if not size.isdigit():
        raise InputError(f"size is {size!r}; give the side of the images in pixels, as in size=28")
    downsampling_levels((int(size), int(size), 3))
    return parse_dataset(where, int(size))


def _with_held_out(data: Any, text: str) -> Any:
    if not isinstance(data, Folder | TFDS):
        kind = type(data).__name__
        raise InputError(f"held_out={text}: {kind} always holds out the same images; leave it out")
    if isinstance(data, TFDS):
        return dataclasses.replace(data, held_out=text)
    try:
        return dataclasses.replace(data, held_out=float(text))
    except InputError:
        raise
    except ValueError:
        return dataclasses.replace(data, held_out=text)


def _unsplit_source(data: Any) -> Any:
    """Returns images without splitting them, because flags may still change what is held out."""
    if isinstance(data, Folder):
        return FolderSource(data.layout.training_folder(), data.channels)
    return data.source("train")


def _is_gray(source: Any) -> bool:
    """Returns whether some evenly spaced images contain only shades of gray."""
    any_read = False
    count = min(GRAY_CHECK_IMAGES, len(source))
    for index in np.linspace(0, len(source) - 1, count).astype(int).tolist():
        try:
            image_HWC = source[index]["image"]
        except BrokenImage:
            continue
        if (image_HWC != image_HWC[..., :1]).any():
            return False
        any_read = True
    return any_read
