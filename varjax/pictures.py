"""Pictures for people: grids of images as PNG."""

import math
import os

import numpy as np
from PIL import Image

from varjax import files

SMALLEST = 64  # pixels; smaller images are enlarged in a grid, or nobody could see them


def to_uint8(images: np.ndarray) -> np.ndarray:
    """[0, 1] -> [0, 255], rounded."""
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def grid(images_NHWC: np.ndarray, columns: int | None = None) -> np.ndarray:
    """uint8 (height, width, C) from uint8 or [0, 1]: rows of images, as square as it goes."""
    if images_NHWC.dtype != np.uint8:
        images_NHWC = to_uint8(images_NHWC)
    N, H, W, C = images_NHWC.shape
    columns = columns or math.ceil(math.sqrt(N))
    rows = math.ceil(N / columns)
    gap, enlarge = 1 if H < SMALLEST else 0, max(1, SMALLEST // H)
    tiles = np.zeros((rows * columns, H * enlarge + gap, W * enlarge + gap, C), np.uint8)
    large = images_NHWC.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    tiles[:N, : H * enlarge, : W * enlarge] = large
    _, h, w, _ = tiles.shape
    tiles = tiles.reshape(rows, columns, h, w, C).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(rows * h, columns * w, C)


def write_png(path: str | os.PathLike, image_HWC: np.ndarray) -> None:
    """Writes a uint8 image with 1, 3 or 4 channels, atomically."""
    with files.atomic_path(path) as temporary:
        picture = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
        Image.fromarray(picture).save(temporary, format="png")
