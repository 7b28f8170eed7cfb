"""Pictures: any image file in, as a model takes it; grids of images out, as PNG."""

import math
import os
from typing import IO

import numpy as np
from PIL import Image, ImageOps

from varjax.core import files
from varjax.core.errors import InputError

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


def read_image(path: str | os.PathLike, shape: tuple[int, int, int]) -> np.ndarray:
    """An image file as a uint8 array of `shape`, (H, W, channels): `open_image`, then `fit`."""
    return fit(open_image(path), shape)


def open_image(path: str | os.PathLike) -> Image.Image:
    """An image file as 8-bit gray ("L") or "RGB"; what is transparent shows white.

    Otherwise as `load` does it. Raises InputError for a file that is missing, damaged or no image.
    """
    if not os.path.isfile(path):
        raise InputError(f"{path} {'is a folder' if os.path.isdir(path) else 'does not exist'}")
    try:
        picture = load(path)
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


def load(file: str | os.PathLike | IO[bytes]) -> Image.Image:
    """The picture in a file, in its own mode but with 8 bits, upright as its EXIF data say.

    16 bits are scaled to 8; of an animation the first frame. Whatever Pillow raises passes through;
    ValueError for floats, whose range is unknown.
    """
    with Image.open(file) as picture:
        picture.load()
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode == "F":
        raise InputError("holds floats, whose range is unknown; save it with 8 or 16 bits")
    if picture.mode.startswith("I"):  # Pillow would clip, not scale, 16 bits
        return Image.fromarray(to_uint8(np.asarray(picture) / 65535))
    return picture


def fit(picture: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """The middle of a picture as a uint8 array of `shape`, (H, W, channels).

    Resized (Lanczos) until it just covers (H, W), its aspect kept, then center-cropped. One that
    has this size already is not touched.
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
