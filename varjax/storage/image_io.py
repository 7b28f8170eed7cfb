"""Reads images of any kind for a model, and writes grids of images as PNG."""

import io
import math
import os
from collections.abc import Mapping

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from varjax.errors import InputError
from varjax.storage import files
from varjax.storage.image_files import BrokenImage, decode_picture, read_file, to_uint8

MIN_TILE_SIDE = 64  # pixels; smaller images are enlarged in a grid
# An image that would be enlarged to more pixels than this is cropped first. Smaller images are not,
# because Pillow rounds positions in a crop differently, which changes a few pixels by 1.
MAX_RESIZED_PIXELS = 2**24
KERNEL_RADIUS = 3  # pixels of Pillow's widest filter, Lanczos


def image_grid(images_NHWC: np.ndarray, columns: int | None = None) -> np.ndarray:
    """Arranges images in rows.

    Args:
        images_NHWC: uint8, or floats in [0, 1].
        columns: images in a row; None for a grid that is as square as possible.

    Returns:
        A uint8 image (height, width, C).
    """
    if images_NHWC.dtype != np.uint8:
        images_NHWC = to_uint8(images_NHWC)
    N, H, W, C = images_NHWC.shape
    height, width = grid_size(N, (H, W), columns)
    columns, enlarge = columns or math.ceil(math.sqrt(N)), max(1, MIN_TILE_SIDE // H)
    rows = math.ceil(N / columns)
    h, w = height // rows, width // columns
    tiles = np.zeros((rows * columns, h, w, C), np.uint8)
    large = images_NHWC.repeat(enlarge, axis=1).repeat(enlarge, axis=2)
    tiles[:N, : H * enlarge, : W * enlarge] = large
    tiles = tiles.reshape(rows, columns, h, w, C).transpose(0, 2, 1, 3, 4)
    return tiles.reshape(height, width, C)


def grid_size(images: int, shape: tuple[int, int], columns: int | None = None) -> tuple[int, int]:
    """Computes (height, width) of the picture that `image_grid` draws.

    Args:
        images: number of images.
        shape: (H, W) of an image.
        columns: images in a row; None for a grid that is as square as possible.
    """
    H, W = shape
    columns = columns or math.ceil(math.sqrt(images))
    gap, enlarge = 1 if H < MIN_TILE_SIDE else 0, max(1, MIN_TILE_SIDE // H)
    return math.ceil(images / columns) * (H * enlarge + gap), columns * (W * enlarge + gap)


def read_image(path: str | os.PathLike, shape: tuple[int, int, int]) -> np.ndarray:
    """Reads an image file as a uint8 array of `shape`, (H, W, channels).

        image_HWC = varjax.read_image("photo.jpg", model.image_shape)

    The image is resized and cropped by `resize_and_crop`. Raises the errors of `open_image`.
    """
    return resize_and_crop(open_image(path), shape)


def open_image(path: str | os.PathLike, background: str = "white") -> Image.Image:
    """Opens an image file as 8-bit gray ("L") or "RGB".

    Args:
        path: image file of any format in IMAGE_FORMATS.
        background: color shown behind transparent pixels.

    Raises:
        InputError: the file is missing, damaged or not an image.
        StorageError: the machine or the bucket cannot read it now.
    """
    path = files.local_copy(path)
    try:
        data = read_file(path)
    except BrokenImage as error:
        is_folder = isinstance(error.__cause__, IsADirectoryError)
        problem = "is a folder" if is_folder else f"does not exist ({error.reason})"
        raise InputError(f"{path} {problem}") from error
    try:
        picture = decode_picture(data, path)
    except BrokenImage as error:
        raise InputError(
            f"{path} is not an image that can be read ({error.reason}); use a PNG, JPEG, WebP …"
        ) from error
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, background), picture)
    return picture.convert("L" if picture.mode in ("1", "L") else "RGB")


def frame_count(path: str | os.PathLike) -> int:
    """Returns the number of frames of an image file; 1 if those after the first are damaged.

    path: file on this machine that `open_image` can read, which decodes the first frame alone.
    """
    with Image.open(path) as picture:
        try:
            return getattr(picture, "n_frames", 1)
        except Exception:  # Pillow raises IndexError, KeyError, SyntaxError, struct.error …
            return 1


def resize_and_crop(picture: Image.Image, shape: tuple[int, int, int]) -> np.ndarray:
    """Resizes a picture (Lanczos) until it just covers (H, W), then crops its center.

    A picture of this size is returned unchanged.

    Args:
        picture: picture of any size.
        shape: (H, W, channels), with 1 or 3 channels; InputError for others.

    Returns:
        A uint8 array of `shape`.
    """
    H, W, channels = shape
    if channels not in (1, 3):
        raise InputError(f"the model has {channels} channels; image files have 1 or 3")
    width, height = picture.size
    scale = max(H / height, W / width)
    size = max(W, round(width * scale)), max(H, round(height * scale))
    left, top = (size[0] - W) // 2, (size[1] - H) // 2
    box = left, top, left + W, top + H
    picture = resized_part(picture, size, box, Image.Resampling.LANCZOS)
    return np.asarray(picture.convert("L" if channels == 1 else "RGB")).reshape(shape)


def resized_part(
    picture: Image.Image,
    size: tuple[int, int],
    box: tuple[int, int, int, int],
    resampling: Image.Resampling,
) -> Image.Image:
    """Returns `picture.resize(size, resampling).crop(box)` with bounded memory.

    The pixels are equal unless `size` has more than MAX_RESIZED_PIXELS and more than `picture`.

    Args:
        picture: picture of any size.
        size: (width, height) that the whole picture is resized to.
        box: (left, top, right, bottom), within `size`.
        resampling: Pillow's resampling filter.
    """
    if size == picture.size:
        return picture.crop(box)
    if math.prod(size) <= max(MAX_RESIZED_PIXELS, math.prod(picture.size)):
        return picture.resize(size, resampling).crop(box)
    # Resize one axis after the other; otherwise Pillow chooses their order by the box.
    turn = Image.Transpose.TRANSPOSE
    columns = _resized_columns(picture, size[0], box[0], box[2], resampling)
    return _resized_columns(columns.transpose(turn), size[1], box[1], box[3], resampling).transpose(
        turn
    )


def _resized_columns(
    picture: Image.Image, width: int, left: int, right: int, resampling: Image.Resampling
) -> Image.Image:
    """Returns the columns from `left` to `right` of a picture whose width is resized."""
    scale = picture.width / width
    margin = math.ceil(KERNEL_RADIUS * max(1, scale)) + 1
    start = max(0, math.floor(left * scale) - margin)
    stop = min(picture.width, math.ceil(right * scale) + margin)
    part = picture.crop((start, 0, stop, picture.height))  # few columns: boxes are float32
    inner = left * scale - start, 0, min(right * scale, stop) - start, picture.height
    return part.resize((right - left, picture.height), resampling, inner)


def write_png(
    path: str | os.PathLike, image_HWC: np.ndarray, text: Mapping[str, str] | None = None
) -> None:
    """Writes a uint8 image with 1, 3 or 4 channels, atomically.

    Args:
        path: path of the file.
        image_HWC: image to write.
        text: text that the file carries, by keyword; see `varjax.storage.picture_text`.
    """
    data = png_bytes(image_HWC, text)
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(data)


def png_bytes(image_HWC: np.ndarray, text: Mapping[str, str] | None = None) -> bytes:
    """Encodes an image as PNG; arguments are those of `write_png`."""
    chunks = PngInfo()
    for keyword, value in (text or {}).items():
        chunks.add_text(keyword, value)
    picture = image_HWC[..., 0] if image_HWC.shape[-1] == 1 else image_HWC
    file = io.BytesIO()
    Image.fromarray(picture).save(file, format="png", pnginfo=chunks)
    return file.getvalue()
