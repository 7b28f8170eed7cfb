"""Draws grids of images with words: a title, and names of rows, columns and single images."""

import dataclasses
import math
import unicodedata
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from varjax.storage.image_io import MIN_TILE_SIDE, image_grid

MOST_PIXELS = 178_956_970  # Pillow does not open larger pictures
MIN_GRID_SIDE = 512  # pixels of the longer side; images of smaller grids are enlarged
MIN_WIDTH = 400  # pixels of the whole picture, so that a title has room
GUTTER, MARGIN = 4, 8  # pixels between images, and around everything
FONT_SIZES = 14, 32  # pixels; the larger the images, the larger the letters
LINE = 1.3  # height of a line of text, in font sizes
NAME_WIDTH = 11  # of the names of rows, in font sizes at most
TITLE_LINES, COLUMN_LINES, TILE_LINES = 4, 2, 2  # at most; longer text ends in "…"
WHITE, BLACK = 255, 0
Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclasses.dataclass(frozen=True)
class Captions:
    """Holds the words on a grid of images; "" and () leave words out.

    Attributes:
        title: text above the grid.
        rows: name of each row, to its left.
        columns: name of each column, above it.
        tiles: name of each image, above it.
    """

    title: str = ""
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    tiles: Sequence[str] = ()


@dataclasses.dataclass(frozen=True)
class GridLayout:
    """Places the images of a captioned grid.

    Attributes:
        size: (height, width) of the picture.
        tile: (height, width) of an image in it.
        enlarge: whole number by which images are enlarged.
        columns: number of images in a row.
        origin: (y, x) of the first image.
        pitch: (y, x) from an image to the one below it, and to the one to its right.
        font_size: size of the letters in pixels.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    enlarge: int
    columns: int
    origin: tuple[int, int]
    pitch: tuple[int, int]
    font_size: int

    def corner(self, i: int) -> tuple[int, int]:
        """Returns (y, x) of the upper left corner of an image."""
        row, column = divmod(i, self.columns)
        return self.origin[0] + row * self.pitch[0], self.origin[1] + column * self.pitch[1]


def grid_layout(
    images: int, shape: tuple[int, int], captions: Captions, columns: int | None = None
) -> GridLayout:
    """Lays out a captioned grid.

    Args:
        images: number of images.
        shape: (H, W) of an image.
        captions: words of the grid.
        columns: number of images in a row; None for a grid that is as square as possible.
    """
    H, W = shape
    columns = columns or math.ceil(math.sqrt(images))
    rows = math.ceil(images / columns)
    enlarge = max(
        1, math.ceil(MIN_TILE_SIDE / H), math.ceil(MIN_GRID_SIDE / max(rows * H, columns * W))
    )
    tile_h, tile_w = H * enlarge, W * enlarge
    font_size = min(max(tile_h // 10, FONT_SIZES[0]), FONT_SIZES[1])
    font, line = ImageFont.load_default(font_size), math.ceil(LINE * font_size)
    names = [wrapped(name, NAME_WIDTH * font_size, tile_h // line, font) for name in captions.rows]
    longest = max((font.getlength(text) for lines in names for text in lines), default=0)
    left = MARGIN + (math.ceil(longest) + MARGIN if longest else 0)
    name_lines = _most_lines(captions.tiles, tile_w, TILE_LINES, font)
    pitch = tile_h + GUTTER + name_lines * line, tile_w + GUTTER
    width = max(left + columns * pitch[1] - GUTTER + MARGIN, MIN_WIDTH)
    title_lines = _most_lines([captions.title], width - 2 * MARGIN, TITLE_LINES, font)
    column_lines = _most_lines(captions.columns, tile_w, COLUMN_LINES, font)
    top = MARGIN + (title_lines + column_lines) * line + (MARGIN if title_lines else 0)
    height = top + rows * pitch[0] - GUTTER + MARGIN
    origin = top + name_lines * line, left
    return GridLayout((height, width), (tile_h, tile_w), enlarge, columns, origin, pitch, font_size)


def captioned_grid(
    images_NHWC: np.ndarray,
    captions: Captions,
    columns: int | None = None,
    most_side: int = MOST_PIXELS,
) -> np.ndarray:
    """Draws images in rows, enlarged by a whole number if they are small, with words.

    The words are left out if the picture would be larger than Pillow opens or `most_side`.

    Args:
        images_NHWC: uint8 images with 1, 3 or 4 channels.
        captions: words of the grid.
        columns: number of images in a row; None for a grid that is as square as possible.
        most_side: pixels of the longer side that the picture's format holds.

    Returns:
        A uint8 picture (height, width, C), black on white.
    """
    N, H, W, C = images_NHWC.shape
    layout = grid_layout(N, (H, W), captions, columns)
    if math.prod(layout.size) > MOST_PIXELS or max(layout.size) > most_side:
        return image_grid(images_NHWC, columns)
    words = _draw_words(layout, captions, N)
    picture_HWC = np.repeat(words[..., None], C, axis=-1)
    if C == 4:
        picture_HWC[..., 3] = 255  # opaque
    tile_h, tile_w = layout.tile
    for i, image_HWC in enumerate(images_NHWC):
        y, x = layout.corner(i)
        large_HWC = image_HWC.repeat(layout.enlarge, axis=0).repeat(layout.enlarge, axis=1)
        picture_HWC[y : y + tile_h, x : x + tile_w] = large_HWC
    return picture_HWC


def _draw_words(layout: GridLayout, captions: Captions, images: int) -> np.ndarray:
    """Draws the words of a grid on white, (height, width) uint8."""
    picture = Image.new("L", (layout.size[1], layout.size[0]), WHITE)
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(layout.font_size)
    line, (tile_h, tile_w) = math.ceil(LINE * layout.font_size), layout.tile

    def write(lines: Sequence[str], y: float, x: float, anchor: str) -> None:
        for number, text in enumerate(lines):
            draw.text((x, y + number * line), text, fill=BLACK, font=font, anchor=anchor)

    title = wrapped(captions.title, layout.size[1] - 2 * MARGIN, TITLE_LINES, font)
    write(title, MARGIN, MARGIN, "la")
    for i, name in enumerate(captions.tiles[:images]):
        y, x = layout.corner(i)
        lines = wrapped(name, tile_w, TILE_LINES, font)
        write(lines, y - len(lines) * line, x + tile_w / 2, "ma")
    for i, name in enumerate(captions.columns):
        x = layout.corner(i)[1]
        lines = wrapped(name, tile_w, COLUMN_LINES, font)
        top = layout.corner(0)[0] - (layout.pitch[0] - tile_h - GUTTER)
        write(lines, top - len(lines) * line, x + tile_w / 2, "ma")
    for row, name in enumerate(captions.rows):
        y = layout.corner(row * layout.columns)[0]
        lines = wrapped(name, layout.origin[1] - 2 * MARGIN, tile_h // line, font)
        write(lines, y + (tile_h - (len(lines) - 1) * line) / 2, MARGIN, "lm")
    return np.array(picture)


def wrapped(text: str, width: float, most_lines: int, font: Font) -> list[str]:
    """Breaks text into lines that fit a width; what does not fit is replaced by "…".

    Args:
        text: text of one line.
        width: pixels of a line.
        most_lines: number of lines at most.
        font: font of the text.
    """
    lines: list[str] = []
    for word in drawable(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    if len(lines) > most_lines:
        lines = [*lines[: most_lines - 1], " ".join(lines[most_lines - 1 :])]
    return [_shortened(line, width, font) for line in lines]


def drawable(text: str) -> str:
    """Replaces characters that Pillow's own font lacks: "é" by "e", others by "?"."""
    letters = unicodedata.normalize("NFD", text)
    kept = [c for c in letters if not unicodedata.combining(c)]
    return "".join(c if c.isascii() or c in "·…" else "?" for c in kept)


def _shortened(text: str, width: float, font: Font) -> str:
    if font.getlength(text) <= width:
        return text
    while len(text) > 1 and font.getlength(f"{text}…") > width:
        text = text[:-1]
    return f"{text.rstrip()}…"


def _most_lines(texts: Sequence[str], width: float, most: int, font: Font) -> int:
    return max((len(wrapped(text, width, most, font)) for text in texts), default=0)
