"""Resizes, crops and distorts NumPy images, at random by an explicit Generator."""

import math
from typing import Any

import numpy as np
from PIL import Image
from scipy import ndimage

from varjax.core.errors import InputError

RESIZE_RATIO = 1.125  # images are resized to so many times the size that is cut out of them


def random_crop(
    image_HWC: np.ndarray, rng: np.random.Generator, size: tuple[int, int], flip: bool = False
) -> np.ndarray:
    """Augments as the reference does: resizes to cover 1.125 × `size`, cuts a random part out.

    Args:
        image_HWC: uint8 with 1, 3 or 4 channels.
        rng: three numbers are drawn from it, always.
        size: (height, width) of the result.
        flip: whether to mirror every second image left to right.
    """
    (h, w), resized = size, resize_to_cover(image_HWC, *_resized(size))
    y, x, mirror = rng.random(3)
    top, left = int(y * (len(resized) - h + 1)), int(x * (resized.shape[1] - w + 1))
    cropped = resized[top : top + h, left : left + w]
    return np.ascontiguousarray(cropped[:, ::-1] if flip and mirror < 0.5 else cropped)


def center_crop(image_HWC: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resizes as for training and cuts the middle out, (height, width) = `size`: for evaluation."""
    (h, w), resized = size, resize_to_cover(image_HWC, *_resized(size))
    # Half to even, as the reference's framework rounds.
    top, left = round((len(resized) - h) / 2), round((resized.shape[1] - w) / 2)
    return np.ascontiguousarray(resized[top : top + h, left : left + w])


def resize_to_cover(image_HWC: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes by Lanczos, the aspect kept, until the image just covers (height, width).

    For a square that is "the shorter side to so many pixels"; the longer one is rounded down.

    Args:
        image_HWC: uint8 with 1, 3 or 4 channels, of which the fourth is alpha.
        height: pixels.
        width: pixels.
    """
    H, W, channels = image_HWC.shape
    if height * W >= width * H:
        width = height * W // H
    else:
        height = width * H // W
    if (height, width) == (H, W):
        return image_HWC
    picture = Image.fromarray(image_HWC[..., 0] if channels == 1 else image_HWC)
    resized = picture.resize((width, height), Image.Resampling.LANCZOS)
    return np.asarray(resized).reshape(height, width, channels)


def _resized(size: tuple[int, int]) -> tuple[int, int]:
    height, width = size
    return round(RESIZE_RATIO * height), round(RESIZE_RATIO * width)


def random_affine(
    image_HWC: np.ndarray,
    rng: np.random.Generator,
    shift: float = 0.0,
    rotate: float = 0.0,
    zoom: float = 0.0,
) -> np.ndarray:
    """Moves, rotates and scales at random, each uniform in its range, in one resampling.

    Args:
        image_HWC: uint8.
        rng: four numbers are drawn from it, always.
        shift: pixels, at most, up or down and left or right.
        rotate: degrees, at most, either way.
        zoom: the scale is 1 ± `zoom`, at most.
    """
    y, x, turn, scale = rng.uniform(-1, 1, size=4)
    return affine(image_HWC, (shift * y, shift * x), rotate * turn, 1 + zoom * scale)


def affine(
    image_HWC: np.ndarray, shift: tuple[float, float], degrees: float, scale: float
) -> np.ndarray:
    """Scales and rotates about the center, then moves; by cubic splines, which keep it sharp.

    Args:
        image_HWC: uint8; beyond its border all is zero.
        shift: pixels down and right.
        degrees: counter-clockwise.
        scale: above 1 enlarges.
    """
    cos, sin = math.cos(math.radians(degrees)) / scale, math.sin(math.radians(degrees)) / scale
    matrix = np.array([[cos, sin], [-sin, cos]])
    center = (np.array(image_HWC.shape[:2]) - 1) / 2
    offset: Any = center - matrix @ (center + np.array(shift))
    channels = [
        # "grid-constant" also interpolates between the border pixels and the zeros around them.
        ndimage.affine_transform(
            image_HWC[..., c].astype(np.float32), matrix, offset, order=3, mode="grid-constant"
        )
        for c in range(image_HWC.shape[-1])
    ]
    return np.rint(np.clip(np.stack(channels, axis=-1), 0, 255)).astype(np.uint8)


def height_width(size: int | tuple[int, int]) -> tuple[int, int]:
    """Returns a size, as configs give it, as (height, width) in pixels."""
    return (size, size) if isinstance(size, int) else size


def check_image_size(size: int | tuple[int, int], channels: int) -> None:
    """Raises InputError unless images of this size and number of channels can be made."""
    if min(height_width(size)) < 1:
        raise InputError(f"size is {size}, but must be at least 1 pixel")
    if channels not in (1, 3, 4):
        raise InputError(f"channels is {channels}, but image files give 1, 3 or 4 (with alpha)")
