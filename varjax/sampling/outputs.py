"""Where samples go: one grid, a folder of PNGs, or an .npz as FID evaluators read it."""

import contextlib
import os
import pathlib
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from varjax.core import image_io
from varjax.core.errors import InputError
from varjax.sampling.resumable import Folder, Npz


class Output(Protocol):
    """Takes parts, runs of uint8 images by their numbers, in any order.

    With several processes all of them use it, on a file system that they share; one calls `begin`
    with `write` and `finish`.
    """

    def begin(self, write: bool) -> None:
        """Raises InputError if there is anything but a beginning of the same."""
        ...

    def has(self, part: range) -> bool: ...

    def add(self, part: range, images_NHWC: np.ndarray) -> None: ...

    def finish(self) -> str:
        """Gives everything its final form; returns a line that says what lies where."""
        ...


def check_out(location: str) -> None:
    """Raises InputError if `location` is nothing that can be written."""
    path = pathlib.Path(location)
    if not location:
        raise InputError("out is empty; give FILE.png (a grid), FILE.npz, or a folder")
    if path.suffix in (".png", ".npz"):
        if path.is_dir():
            raise InputError(
                f"out={location} is a folder; give a file name, or a folder without {path.suffix}"
            )
        return _check_writable(path.parent)
    if path.suffix in (".jpg", ".jpeg", ".gif", ".webp", ".npy"):
        raise InputError(f"out={location}: cannot write {path.suffix}; .png, .npz or a folder")
    _check_writable(path)


def open_output(
    location: str, label_N: np.ndarray, columns: int | None, seed: int, request: Mapping[str, Any]
) -> Output:
    """The output for "x.png" (a grid with `columns`), "x.npz", or any other name (a folder)."""
    path = pathlib.Path(location)
    if path.suffix == ".png":
        return Grid(path, columns)
    if path.suffix == ".npz":
        return Npz(path, label_N, seed, request)
    return Folder(path, label_N, request)


class Grid:
    """All images in one PNG. They stay in memory, and a kill loses them."""

    def __init__(self, path: pathlib.Path, columns: int | None):
        self._path, self._columns = path, columns
        self._images: dict[int, np.ndarray] = {}

    def begin(self, write: bool) -> None:
        if not write:
            raise InputError("a grid is drawn by one process; give FILE.npz or a folder")

    def has(self, part: range) -> bool:
        return part.start in self._images

    def add(self, part: range, images_NHWC: np.ndarray) -> None:
        self._images[part.start] = images_NHWC

    def finish(self) -> str:
        images_NHWC = np.concatenate([self._images[start] for start in sorted(self._images)])
        image_io.write_png(self._path, image_io.grid(images_NHWC, self._columns))
        return f"{self._path}: {len(images_NHWC)} images"


def _check_writable(folder: pathlib.Path) -> None:
    """Makes the folder and one file in it, which is gone again, or raises InputError."""
    probe = folder / f".varjax.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}); choose another out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
