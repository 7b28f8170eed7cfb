"""Computes which tokens an edit redraws, from a box or a mask image."""

import pathlib
import sys

import numpy as np

from varjax.errors import InputError
from varjax.storage import image_io


def box_mask(text: str, size: tuple[int, int], finest: tuple[int, int]) -> np.ndarray:
    """Returns whether each token (h, w) is in the box "y0,x0,y1,x1", its sides rounded to tokens.

    Numbers that are all at most 1 are fractions of height and width, others are whole pixels of an
    image of `size`. Raises InputError for a box that is none or holds no token.
    """
    wrong = InputError(
        f"box={text}: give y0,x0,y1,x1 with 0 <= y0 < y1 <= {size[0]} and 0 <= x0 < x1 <= "
        f"{size[1]} in whole pixels, or all in fractions from 0 to 1"
    )
    try:
        y0, x0, y1, x1 = numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise wrong from None
    if max(numbers) > 1:
        if any(number % 1 for number in numbers):
            raise wrong
        y0, x0, y1, x1 = y0 / size[0], x0 / size[1], y1 / size[0], x1 / size[1]
    if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
        raise wrong
    h, w = finest
    inside_hw = np.zeros(finest, bool)
    inside_hw[round(y0 * h) : round(y1 * h), round(x0 * w) : round(x1 * w)] = True
    if not inside_hw.any():
        raise InputError(
            f"box={text} holds no token, of which one has {size[0] // h}x{size[1] // w} pixels; "
            "give a larger box"
        )
    return inside_hw


def read_mask(
    path: str | pathlib.Path,
    image_size: tuple[int, int],
    size: tuple[int, int],
    finest: tuple[int, int],
) -> np.ndarray:
    """Whether each token (h, w) is white in the mask, by more than half of its pixels.

    The mask has the image's own size (width, height) and is resized and cropped as the image is.
    What is transparent counts as black. Says on stderr if all tokens are white.

    Raises InputError for another size or if no token is white.
    """
    picture = image_io.open_image(path, background="black")
    if picture.size != image_size:
        raise InputError(
            f"{path} has {picture.width}x{picture.height} pixels, but the image has "
            f"{image_size[0]}x{image_size[1]}; give a mask of the same size"
        )
    white_HW = image_io.resize_and_crop(picture, (*size, 1))[..., 0] / 255
    (H, W), (h, w) = size, finest
    white_hw = white_HW.reshape(h, H // h, w, W // w).mean(axis=(1, 3)) > 0.5
    if not white_hw.any():
        raise InputError(
            f"{path} leaves nothing to draw: paint white, and opaque, what is to be drawn again"
        )
    if white_hw.all():
        print(
            f"{path} is white everywhere: nothing of the image is kept. Paint black, or make "
            "transparent, what is to be kept",
            file=sys.stderr,
        )
    return white_hw
