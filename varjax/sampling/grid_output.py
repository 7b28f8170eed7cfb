"""Writes samples as one picture with text: a grid, a strip or an animation."""

import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np

from varjax.errors import InputError
from varjax.sampling.films import write_film
from varjax.storage import image_io
from varjax.storage.captioned_grid import Captions, captioned_grid

MOST_COLUMNS = 20  # of a grid whose classes can be broken into equal rows
FEWEST_COLUMNS = 8  # of such a row


@dataclasses.dataclass(frozen=True)
class PictureWords:
    """Holds the text in and on a picture.

    Attributes:
        title: text above the images, "" for none.
        names: name of each image, such as its class; () draws a grid without words.
        text: text that the file carries, by keyword; see `varjax.storage.picture_text`.
    """

    title: str = ""
    names: Sequence[str] = ()
    text: Mapping[str, str] = dataclasses.field(default_factory=dict)


NO_WORDS = PictureWords()


def grid_columns(classes: int, count: int) -> int | None:
    """Returns the columns of a grid in which each class has whole rows; None for a square grid.

    Args:
        classes: number of classes.
        count: number of images of each class.
    """
    if count == 1 or (classes == 1 and count > FEWEST_COLUMNS):
        return None
    equal_rows = [n for n in range(FEWEST_COLUMNS, MOST_COLUMNS + 1) if count % n == 0]
    return count if count <= MOST_COLUMNS or not equal_rows else equal_rows[-1]


def name_in_title(name: str) -> str:
    """Returns the name of an image as a title says it: a number is called a class."""
    return f"class {name}" if name.isdecimal() else name


def grid_captions(words: PictureWords, images: int, columns: int | None) -> Captions:
    """Names the rows of a grid if each shows one class, and otherwise each image.

    Args:
        words: title, and the name of each image.
        images: number of images.
        columns: number of images in a row; None for a grid that is as square as possible.
    """
    names, columns = list(words.names), columns or math.ceil(math.sqrt(images))
    if len(set(names)) == 1:
        return Captions(" · ".join(filter(None, (words.title, name_in_title(names[0])))))
    rows = [names[start : start + columns] for start in range(0, images, columns)]
    if columns == 1 or any(len(set(row)) > 1 for row in rows):
        return Captions(words.title, tiles=names)
    return Captions(words.title, rows=named_once([row[0] for row in rows]))


def named_once(names: Sequence[str]) -> list[str]:
    """Returns the names with "" in place of a name that repeats the one before it."""
    before = ["", *names]
    return ["" if name == other else name for name, other in zip(names, before, strict=False)]


class MemoryOutput:
    """Collects all images in memory; a kill loses them."""

    # Says what to do instead where several processes sample.
    one_process = "a sweep is drawn by one process; start the command as a single one"

    def __init__(self) -> None:
        self._images: dict[int, np.ndarray] = {}

    def begin(self, write: bool) -> None:
        if not write:
            raise InputError(self.one_process)

    def has(self, part: range) -> bool:
        return part.start in self._images

    def add(self, part: range, images_NHWC: np.ndarray) -> None:
        self._images[part.start] = images_NHWC

    def finish(self) -> str:
        return ""

    def images(self) -> np.ndarray:
        """Returns the images in the order of their numbers."""
        return np.concatenate([self._images[start] for start in sorted(self._images)])


class GridOutput(MemoryOutput):
    """Collects all images in memory and writes one PNG; a kill loses them.

    One image alone has no words on it.
    """

    one_process = "a grid is drawn by one process; give FILE.npz or a folder"

    def __init__(self, path: pathlib.Path, columns: int | None, words: PictureWords = NO_WORDS):
        super().__init__()
        self._path, self._columns, self._words = path, columns, words

    def finish(self) -> str:
        images_NHWC = self.images()
        if self._words.names and len(images_NHWC) > 1:
            captions = grid_captions(self._words, len(images_NHWC), self._columns)
            picture_HWC = captioned_grid(images_NHWC, captions, self._columns)
        else:
            picture_HWC = image_io.image_grid(images_NHWC, self._columns)
        image_io.write_png(self._path, picture_HWC, self._words.text)
        return f"{self._path}: {len(images_NHWC)} images"


class FilmOutput(GridOutput):
    """Collects the steps of all images in memory and writes one file; a kill loses them.

    FILE.gif and FILE.webp are animations of a grid, with a frame per step. FILE.png is a strip with
    a row per image and a column per step. Parts are (N, S, H, W, channels): N images, S steps.
    """

    one_process = "animations and strips need a single process"

    def finish(self) -> str:
        images_NSHWC, words = self.images(), self._words
        N, S = images_NSHWC.shape[:2]
        if self._path.suffix.lower() != ".png":
            captions = grid_captions(words, N, self._columns) if words.names else None
            write_film(self._path, images_NSHWC, self._columns, captions, words.text)
            return f"{self._path}: {N} images in {S} frames"
        rows_NHWC = images_NSHWC.reshape(N * S, *images_NSHWC.shape[2:])
        if words.names:
            steps = [f"step {step + 1}" for step in range(S)]
            captions = Captions(words.title, rows=words.names, columns=steps)
            picture_HWC = captioned_grid(rows_NHWC, captions, columns=S)
        else:
            picture_HWC = image_io.image_grid(rows_NHWC, columns=S)
        image_io.write_png(self._path, picture_HWC, words.text)
        return f"{self._path}: {N} images, a row each, after each of {S} steps"
