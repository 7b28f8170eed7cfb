"""Shows images while they are drawn, scale by scale or step by step: a film, or a strip."""

import pathlib

import numpy as np
from PIL import Image

from varjax.errors import InputError
from varjax.storage import files, image_io

FILM_MILLISECONDS = 3000  # of all steps together
LAST_MILLISECONDS = 1500  # of the finished images, before the film begins again


class FilmOutput:
    """Collects the steps of all images in memory, and writes one file; a kill loses them.

    FILE.gif and FILE.webp are films of a grid, a frame a step. FILE.png is a strip: a row an image,
    a column a step. Its parts are (N, S, H, W, channels), of N images and S steps.
    """

    def __init__(self, path: pathlib.Path, columns: int | None):
        """Writes to `path`; `columns` is the number of images in a row of a film's grid."""
        self._path, self._columns = path, columns
        self._images: dict[int, np.ndarray] = {}

    def begin(self, write: bool) -> None:
        if not write:
            raise InputError("films and strips are drawn by one process; run it in one process")

    def has(self, part: range) -> bool:
        return part.start in self._images

    def add(self, part: range, images_NHWC: np.ndarray) -> None:
        self._images[part.start] = images_NHWC

    def finish(self) -> str:
        images_NSHWC = np.concatenate([self._images[start] for start in sorted(self._images)])
        N, S = images_NSHWC.shape[:2]
        if self._path.suffix.lower() != ".png":
            write_film(self._path, images_NSHWC, self._columns)
            return f"{self._path}: {N} images in {S} frames"
        rows_NHWC = images_NSHWC.reshape(N * S, *images_NSHWC.shape[2:])
        image_io.write_png(self._path, image_io.image_grid(rows_NHWC, columns=S))
        return f"{self._path}: {N} images, a row each, after each of {S} steps"


def write_film(path: pathlib.Path, images_NSHWC: np.ndarray, columns: int | None = None) -> None:
    """Writes a film that repeats, atomically: one frame for each step, the last one held.

    Args:
        path: FILE.gif (256 colors a frame) or FILE.webp (exact).
        images_NSHWC: uint8 images after each of S steps.
        columns: number of images in a row; None for a grid that is as square as possible.
    """
    S = images_NSHWC.shape[1]
    grids = [image_io.image_grid(images_NSHWC[:, step], columns) for step in range(S)]
    frames = [Image.fromarray(np.broadcast_to(g, (*g.shape[:2], 3))) for g in grids]
    durations = [max(40, FILM_MILLISECONDS // S)] * (S - 1) + [LAST_MILLISECONDS]
    kind = path.suffix.lower()[1:]
    exact = {"lossless": True} if kind == "webp" else {}
    with files.atomic_path(path) as temporary:
        frames[0].save(
            temporary,
            format=kind,
            save_all=True,
            append_images=frames[1:],
            duration=durations,
            loop=0,
            **exact,
        )
