"""Computes which tokens an edit redraws, from a box or a mask image."""

import pathlib
import sys

import numpy as np

from varjax.errors import InputError
from varjax.storage import image_io


def box_mask(text: str, size: tuple[int, int], finest: tuple[int, int]) -> np.ndarray:
    """Returns whether each token (h, w) is in the box "y0,x0,y1,x1", its sides rounded to tokens.

    If all numbers are at most 1, they are fractions of height and width, otherwise whole pixels of
    an image of `size`. Raises InputError for an invalid box, or one that contains no token.
    """
    invalid = InputError(
        f"box={text}: give y0,x0,y1,x1 with 0 <= y0 < y1 <= {size[0]} and 0 <= x0 < x1 <= "
        f"{size[1]} in whole pixels, or all in fractions from 0 to 1"
    )
    try:
        y0, x0, y1, x1 = numbers = [float(part) for part in text.split(",")]
    except ValueError:
        raise invalid from None
    if max(numbers) > 1:
        if any(number % 1 for number in numbers):
            raise invalid
        y0, x0, y1, x1 = y0 / size[0], x0 / size[1], y1 / size[0], x1 / size[1]
    if not (0 <= y0 < y1 <= 1 and 0 <= x0 < x1 <= 1):
        raise invalid
    h, w = finest
    inside_hw = np.zeros(finest, bool)
    inside_hw[round(y0 * h) : round(y1 * h), round(x0 * w) : round(x1 * w)] = True
    if not inside_hw.any():
        raise InputError(
            f"box={text} contains no token; a token has {size[0] // h}x{size[1] // w} pixels, so "
            "give a larger box"
        )
    return inside_hw


def read_mask(
    path: str | pathlib.Path, image_size: tuple[int, int], size: tuple[int, int]
) -> np.ndarray:
    """Returns how white each pixel (H, W) of a mask is, in [0, 1].

    The mask has the size (width, height) of the original image, and is resized and cropped to
    `size` like it. Transparent pixels count as black. Raises InputError for another size.
    """
    picture = image_io.open_image(path, background="black")
    if picture.size != image_size:
        raise InputError(
            f"{path} has {picture.width}x{picture.height} pixels, but the image has "
            f"{image_size[0]}x{image_size[1]}; give a mask of the same size"
        )
    return image_io.resize_and_crop(picture, (*size, 1))[..., 0] / np.float32(255)


def mask_tokens(
    white_HW: np.ndarray, finest: tuple[int, int], name: str | pathlib.Path
) -> np.ndarray:
    """Returns whether more than half of each token's pixels (h, w) are white in a mask.

    Prints a note on stderr if all tokens are white.

    Args:
        white_HW: how white each pixel is, from `read_mask`.
        finest: size (h, w) of the token map.
        name: name of the mask, for messages.

    Raises:
        InputError: no token is white.
    """
    white_hw = white_tokens(white_HW, finest)
    if not white_hw.any():
        raise InputError(
            f"{name} leaves nothing to draw: paint the parts to redraw in opaque white"
        )
    if white_hw.all():
        print(
            f"{name} is white everywhere, so the whole image is redrawn. Paint the parts to keep "
            "in black, or make them transparent",
            file=sys.stderr,
        )
    return white_hw


def white_tokens(white_HW: np.ndarray, finest: tuple[int, int]) -> np.ndarray:
    """Returns whether more than half of each token's pixels (h, w) are white; see `mask_tokens`."""
    (H, W), (h, w) = white_HW.shape, finest
    return white_HW.reshape(h, H // h, w, W // w).mean(axis=(1, 3)) > 0.5
