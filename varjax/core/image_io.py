"""Image files: any kind in, as a model takes it; grids of images out, as PNG."""

import math
import os
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from varjax.core import files
from varjax.core.errors import InputError

MIN_TILE_SIDE = 64  # pixels; smaller images are enlarged in a grid, or nobody could see them


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Turns values in [0, 1] into 0 … 255, rounded."""
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def image_grid(images_NHWC: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Arranges images in rows.

    Args:
        images_NHWC: uint8, or floats in [0, 1].
        columns: images in a row; None for a grid as square as it goes.

    Returns:
        A uint8 image (height, width, C).
    """
    if images_NHWC.dtype != np.uint8:
        images_NHWC = to_uint8(images_NHWC)
    N, H, W, C = images_NHWC.shape
    columns = columns or math.ceil(math.sqrt(N))
    rows = math.ceil(N / columns)
    gap, enlarge = 1 if H < MIN_TILE_SIDE else 0, max(1, MIN_TILE_SIDE // H)
    tiles = np.zeros((rows * columns, H * enlarge + gap, W * enlarge + gap, C), np.uint8)
    large = images_NHWC.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    tiles[:N, : H * enlarge, : W * enlarge] = large
    _, h, w, _ = tiles.shape
    tiles = tiles.reshape(rows, columns, h, w, C).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(rows * h, columns * w, C)


def read_image(path: str | os.PathLike, shape: tuple[int, int, int]) -> np.ndarray:
    """Reads an image file as a uint8 array of `shape`, (H, W, channels).

    It is resized and cropped to it as in `resize_and_crop`. Raises InputError for a file that is
    missing, damaged or no image.
    """
    return resize_and_crop(open_image(path), shape)


def open_image(path: str | os.PathLike) -> Image.Image:
    """Opens an image file as 8-bit gray ("L") or "RGB", on white where it is transparent.

    Raises InputError for a file that is missing, damaged or no image.
    """
    path = files.local_copy(path)
    if not os.path.isfile(path):
        raise InputError(f"{path} {'is a folder' if os.path.isdir(path) else 'does not exist'}")
    try:
        picture = decode_image(path)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{path} is not an image that can be read ({error}); give a PNG, JPEG, WebP …"
        ) from error
    except ValueError as error:
        raise InputError(f"{path} {error}") from error
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def decode_image(file: str | os.PathLike | IO[bytes]) -> Image.Image:
    """Decodes a picture in its own mode but with 8 bits, upright as its EXIF data say.

    16 bits are scaled to 8; the first frame of an animation is taken. Whatever Pillow raises passes
    through; raises InputError for floats, whose range is unknown.
    """
    with Image.open(file) as picture:
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "F":
        raise InputError("holds floats, whose range is unknown; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # Pillow would clip, not scale, 16 bits
        return Image.fromarray(to_uint8(np.asarray(picture) / 65535))
    return picture


def resize_and_crop(picture: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Resizes a picture (Lanczos) until it just covers (H, W), then crops its center.

    One that has this size already is not touched.

    Args:
        picture: of any size.
        shape: (H, W, channels), with 1 or 3 channels; InputError for others.

    Returns:
        A uint8 array of `shape`.
    """
    H, W, channels = shape
    if channels not in (1, 3):
        raise InputError(f"the model has {channels} channels; image files hold 1 or 3")
    width, height = picture.size
    scale = max(H / height, W / width)
    size = max(W, round(width * scale)), max(H, round(height * scale))
    if size != picture.size:
        picture = picture.resize(size, Image.Resampling.LANCZOS)
    left, top = (size[0] - W) // 2, (size[1] - H) // 2
    picture = picture.crop((left, top, left + W, top + H))
    return np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(shape)


def write_png(path: str | os.PathLike, image_HWC: np.ndarray) -> None:
    """Writes a uint8 image with 1, 3 or 4 channels, atomically."""
    with files.atomic_path(path) as temporary:
        picture = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
        Image.fromarray(picture).save(temporary, format="png")
