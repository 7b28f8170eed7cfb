"""Where samples go: one grid, a folder of PNGs, or an .npz as FID evaluators read it."""

import contextlib
import os
import pathlib
from typing import Protocol

import numpy as np

from varjax import files, pictures


class Output(Protocol):
    """Takes uint8 images in order and makes them a file, or files, at `close`."""

    def add(self, images_NHWC: np.ndarray, label_N: np.ndarray) -> None: ...

    def close(self) -> str:
        """Writes what is not yet written; returns a line that says what lies where."""
        ...


def open_output(location: str, columns: int | None) -> Output:
    """The output for "x.png" (a grid with `columns`), "x.npz", or any other name (a folder).

    Raises ValueError if nothing can be written there, before anything else is done.
    """
    path = pathlib.Path(location)
    if not location:
        raise ValueError("out is empty; give FILE.png (a grid), FILE.npz, or a folder")
    if path.suffix in (".png", ".npz"):
        if path.is_dir():
            raise ValueError(
                f"out={location} is a folder; give a file name, or a folder without {path.suffix}"
            )
        _check_writable(path.parent)
        return Grid(path, columns) if path.suffix == ".png" else Npz(path)
    if path.suffix in (".jpg", ".jpeg", ".gif", ".webp", ".npy"):
        raise ValueError(f"out={location}: cannot write {path.suffix}; .png, .npz or a folder")
    _check_writable(path)
    return Folder(path)


class Grid:
    """All images in one PNG."""

    def __init__(self, path: pathlib.Path, columns: int | None):
        self._path, self._columns, self._images = path, columns, []

    def add(self, images_NHWC: np.ndarray, label_N: np.ndarray) -> None:
        self._images.append(images_NHWC)

    def close(self) -> str:
        pictures.write_png(self._path, pictures.grid(np.concatenate(self._images), self._columns))
        return f"{self._path}: {sum(map(len, self._images))} images"


class Folder:
    """One PNG per image, named by its number and label, each written at once."""

    def __init__(self, path: pathlib.Path):
        self._path, self._count = path, 0

    def add(self, images_NHWC: np.ndarray, label_N: np.ndarray) -> None:
        for image_HWC, label in zip(images_NHWC, label_N, strict=True):
            name = f"{self._count:06d}_label{label:04d}.png"
            pictures.write_png(self._path / name, image_HWC)
            self._count += 1

    def close(self) -> str:
        return f"{self._path}/: {self._count} images"


class Npz:
    """`arr_0`, uint8 (N, H, W, 3), and `labels`, int64 (N,); gray images become RGB."""

    def __init__(self, path: pathlib.Path):
        self._path, self._images, self._labels = path, [], []

    def add(self, images_NHWC: np.ndarray, label_N: np.ndarray) -> None:
        if images_NHWC.shape[-1] == 1:
            images_NHWC = images_NHWC.repeat(3, axis=-1)
        self._images.append(images_NHWC)
        self._labels.append(label_N)

    def close(self) -> str:
        images_NHWC, label_N = np.concatenate(self._images), np.concatenate(self._labels)
        with files.atomic_path(self._path) as temporary, open(temporary, "wb") as file:
            np.savez(file, arr_0=images_NHWC, labels=label_N.astype(np.int64))
        return f"{self._path}: arr_0 {images_NHWC.shape}, labels {label_N.shape}"


def _check_writable(folder: pathlib.Path) -> None:
    """Makes the folder and one file in it, which is gone again, or raises ValueError."""
    probe = folder / f".varjax.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
    except OSError as error:
        raise ValueError(
            f"cannot write to {folder} ({error.strerror}); choose another out"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            probe.unlink()
