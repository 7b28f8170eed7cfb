"""Shows and saves arrays of images, for scripts and notebooks."""

import base64
import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image

from varjax.config.numbers import whole_number
from varjax.errors import InputError
from varjax.sampling.films import film_bytes, write_film
from varjax.sampling.outputs import (
    FILM_SUFFIXES,
    check_out,
    check_out_holds,
    file_suffix,
    image_file_name,
)
from varjax.sampling.pipeline import Labels
from varjax.storage import files, image_io
from varjax.storage.buckets import as_path
from varjax.storage.image_files import check_pixels, to_uint8


@dataclasses.dataclass(frozen=True)
class ShownFilm:
    """Holds an animation that a notebook displays.

    Attributes:
        webp: content of a WebP file.
    """

    webp: bytes

    def _repr_html_(self) -> str:
        return (
            f'<img alt="steps" src="data:image/webp;base64,{base64.b64encode(self.webp).decode()}">'
        )


def show(images: Any, columns: int | None = None) -> Image.Image | ShownFilm:
    """Arranges images in a grid, as a picture or animation that a notebook displays.

        varjax.show(model.sample([3, 1, 4]))
        varjax.show(model.sample([3, 1, 4], every_step=True))  # an animation

    In a script, `varjax.show(images).show()` opens a window; `save` writes animations.

    Args:
        images: (N, H, W, 1, 3 or 4) or one image (H, W, …), uint8 or floats in [0, 1]; for an
            animation (steps, N, H, W, 1 or 3).
        columns: images in a row; None for a grid that is as square as possible.

    Raises:
        InputError: no images, another shape, type or range, NaN, or columns below 1.
    """
    columns = _checked_columns(columns)
    if np.ndim(images) == 5:
        images_SNHWC = checked_pictures(images, film=True)
        return ShownFilm(film_bytes("webp", np.moveaxis(images_SNHWC, 0, 1), columns))
    grid_HWC = image_io.image_grid(checked_pictures(images), columns)
    return Image.fromarray(grid_HWC[..., 0] if grid_HWC.shape[-1] == 1 else grid_HWC)


def save(
    images: Any,
    path: str | os.PathLike,
    labels: Labels | None = None,
    columns: int | None = None,
) -> None:
    """Saves images as a grid, an animation, an .npz or a folder; an existing file is replaced.

        varjax.save(model.sample([3, 1, 4]), "samples.png")
        varjax.save(steps_SNHWC, "steps.gif")  # model.sample([3, 1, 4], every_step=True)

    Args:
        images: (N, H, W, 1, 3 or 4), uint8 or floats in [0, 1]; (steps, N, H, W, 1 or 3)
            for an animation.
        path: FILE.png (a grid), FILE.gif or FILE.webp (an animation), FILE.npz ("arr_0", for
            evaluators, in the order given), or a new folder (a PNG for each image).
        labels: (N,) classes as for `sample`, stored in an .npz or in a folder's file names; None
            for none. With a class name or a mix of classes, an .npz has text "mixes" in place of
            "labels".
        columns: images in a row; None for a grid that is as square as possible.

    Raises:
        InputError: images of another shape, type or range, NaN, labels that are no classes, columns
            below 1, or a path that cannot be written.
    """
    location, columns = as_path(path), _checked_columns(columns)
    suffix = file_suffix(location)
    film = suffix in FILM_SUFFIXES
    images = checked_pictures(images, film)
    steps, (N, *shape) = (len(images), images.shape[1:]) if film else (None, images.shape)
    check_out_holds(str(location), N, shape, steps, columns)
    label_N = None if labels is None else _label_array(labels, N)
    check_out(os.fspath(path))  # which makes the folder
    if film:
        write_film(location, np.moveaxis(images, 0, 1), columns)
    elif suffix == ".png":
        image_io.write_png(location, image_io.image_grid(images, columns))
    elif suffix == ".npz":
        arrays: dict[str, Any] = {"arr_0": np.broadcast_to(images, (*images.shape[:3], 3))}
        if label_N is not None:
            arrays["mixes" if label_N.dtype.kind == "U" else "labels"] = label_N
        with files.atomic_path(location) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    else:
        _save_folder(images, location, label_N)


def checked_pictures(images: Any, film: bool = False) -> np.ndarray:
    """Returns images as uint8 (N, H, W, C), or with `film` (steps, N, H, W, C).

    Raises InputError for no images, another shape, type or range, or NaN.
    """
    array = np.asarray(images)
    if array.ndim == 3 and not film:
        array = array[None]
    needed, most = ("(steps, N, H, W, 1 or 3)", 3) if film else ("(N, H, W, 1, 3 or 4)", 4)
    if array.ndim != 4 + film or array.shape[-1] not in (1, 3, most):
        raise InputError(f"images have shape {array.shape}; needed is {needed}")
    if not array.size:
        raise InputError(f"images have shape {array.shape}; give one image or more")
    check_pixels(array)
    return array if array.dtype == np.uint8 else to_uint8(array.astype(np.float32))


def _checked_columns(columns: Any) -> int | None:
    return None if columns is None else whole_number("columns", columns, 1)


def _label_array(labels: Any, images: int) -> np.ndarray:
    """Returns labels as (N,) int64, or as text if any is a class name or a mix of classes."""
    try:
        label_N = np.asarray(labels)
    except ValueError as error:  # rows of unequal lengths
        raise InputError(f"labels do not have shape ({images},): {error}") from error
    if label_N.shape != (images,):
        raise InputError(f"labels have shape {label_N.shape}; expected ({images},), one per image")
    if label_N.dtype.kind == "f" and (label_N % 1 == 0).all():
        label_N = label_N.astype(np.int64)
    if label_N.dtype.kind == "O":
        label_N = np.array([_label_text(label) for label in label_N])
    if label_N.dtype.kind not in "iuU":
        raise InputError(
            f"labels {label_N[:5].tolist()}: allowed are class numbers, names, and mixes of classes"
        )
    return label_N if label_N.dtype.kind == "U" else label_N.astype(np.int64)


def _label_text(label: Any) -> str:
    """Returns a class, or a mix of classes such as {3: 0.5, 8: 0.5}, as text: "3:0.5+8:0.5"."""
    if isinstance(label, Mapping):
        return "+".join(f"{name}:{weight}" for name, weight in label.items())
    if isinstance(label, str | int | np.integer) and not isinstance(label, bool):
        return str(label)
    raise InputError(
        f"label {label!r}: allowed are class numbers, names, and mixes such as {{3: 0.5, 8: 0.5}}"
    )


def _save_folder(images_NHWC: np.ndarray, folder: pathlib.Path, label_N: np.ndarray | None) -> None:
    if folder.exists() and any(folder.iterdir()):
        raise InputError(f"{folder} holds other files; give a new folder")
    for i, image_HWC in enumerate(images_NHWC):
        name = f"{i:06d}.png" if label_N is None else image_file_name(i, label_N[i])
        image_io.write_png(folder / name, image_HWC)
