"""Reads image files of unknown origin, and limits their formats, sizes and ranges of values.

image_HWC = decode_file(path)

If an image cannot be read, a BrokenImage means that the file is missing or damaged, and a
StorageError means that the machine failed.
"""

import contextlib
import errno
import io
import itertools
import os
import stat
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from varjax.errors import InputError, StorageError
from varjax.storage import buckets
from varjax.storage.buckets import as_path, in_bucket
from varjax.storage.read_errors import machine_errno, retry_read
from varjax.storage.untrusted import image_limits

# By how much a resized or processed image may exceed [0, 1]. Images in [-1, 1] exceed it by more.
OVERSHOOT = 0.5
# Pillow's formats by suffix. Some of its other formats run programs (PostScript).
IMAGE_FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".png": "PNG",
    ".webp": "WEBP",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".ppm": "PPM",
    ".pgm": "PPM",
    ".jp2": "JPEG2000",
    ".avif": "AVIF",
}
DECODING_BYTES = 16  # per pixel; more than any image needs
# These errors mean a wrong path, not a failing machine.
NO_FILE_ERRNOS = (
    errno.ENOENT,
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENXIO,  # a socket, or a device without hardware
)
OUT_OF_MEMORY = "out of memory error", "decoder error -9"  # texts of Pillow's OSErrors
ROWS_AT_ONCE = 256
PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels
MAX_BROKEN_RATIO = 0.01
SHOWN_BROKEN = 10  # in a message
T = TypeVar("T")


class BrokenImage(InputError):
    """Reports an image that cannot be decoded.

    Attributes:
        name: name of the file or record.
        reason: reason, as Pillow or the operating system states it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it survives pickling
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read as an image: {self.reason}"


class BrokenImageCounter:
    """Counts the images of a split that were read, and reports those that are broken.

    counter = BrokenImageCounter(len(source))
    counter.add(read=64, broken=[])
    """

    def __init__(self, size: int):
        self._size, self._read = size, 0
        self._names: dict[str, None] = {}  # in the order of their first reading

    def add(self, read: int, broken: Sequence[BrokenImage]) -> None:
        """Reports newly found broken images on stderr.

        Args:
            read: number of images read since the last call.
            broken: images among them that are broken.

        Raises:
            InputError: more than 1 % of the split are broken, or most of the images read so far.
        """
        self._read += read
        for error in broken:
            if error.name not in self._names:
                self._names[error.name] = None
                tqdm.write(f"skipped: {error}", file=sys.stderr)
        read, count = min(self._read, self._size), len(self._names)
        most = count > SHOWN_BROKEN and 2 * count > read
        if most or count > MAX_BROKEN_RATIO * self._size:
            some = "\n  ".join(itertools.islice(self._names, SHOWN_BROKEN))
            raise InputError(
                f"{count} of the {read} images read so far are broken; allowed is "
                f"{MAX_BROKEN_RATIO:.0%} of {self._size}, and less than half of those read first. "
                f"Repair or remove them; the first ones are\n  {some}"
            )


def read_file(path: str | os.PathLike) -> bytes:
    """Returns the content of a file.

    Raises:
        BrokenImage: the file is missing or not a regular file.
        StorageError: the machine or the bucket cannot read it now.
    """
    path = as_path(path)
    if in_bucket(path):
        with buckets.storage_errors(path, "read"), contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        raise BrokenImage(str(path), "it is missing")
    return _read_regular_file(path, lambda file: file.read())


def read_size_and_alpha(path: str | os.PathLike) -> tuple[tuple[int, int], bool]:
    """Reads (width, height) of an image on a disk, and whether it may be transparent.

    Raises:
        BrokenImage: the file is missing or not a regular file, or is too large, too thin or not an
            image.
        StorageError: the machine cannot read it now.
    """

    def header(file: IO[bytes]) -> tuple[tuple[int, int], bool]:
        with _decoder_errors(printable_path(path)), _open_picture(file) as picture:
            return picture.size, picture.has_transparency_data

    return _read_regular_file(path, header)


def decode_picture(
    data: bytes, name: str | os.PathLike, convert: Callable[[Image.Image], Any] = lambda x: x
) -> Any:
    """Decodes a picture without changing its mode, with 8 bits per channel.

    Values of more than 8 bits are scaled. The picture is rotated as its EXIF data say. Only the
    first frame of an animation is decoded.

    Args:
        data: content of the image file.
        name: name of the file, for messages.
        convert: function that makes the result from the picture; its errors also mean that the
            image is broken.

    Raises:
        BrokenImage: the data are damaged, too large, or have an unknown range of values.
        StorageError: the machine is out of memory.
    """
    name = printable_path(name)
    with _decoder_errors(name):
        if not data:
            raise InputError("it is empty")
        return retry_read(lambda: convert(_decode(data)), name)


def decode_file(file: bytes | str | os.PathLike, channels: int = 3, name: str = "") -> np.ndarray:
    """Decodes an image of any kind: gray, palette, CMYK, 1 bit, 16 bits.

    The image is rotated as its EXIF data say. With 1 and 3 channels, alpha is dropped, as by the
    reference's `convert("RGB")`.

    Args:
        file: the encoded image, or the path of its file.
        channels: number of channels: 1 gray, 3 RGB, 4 RGBA.
        name: name for messages, needed if `file` is bytes.

    Returns:
        uint8 (H, W, channels).

    Raises:
        BrokenImage: the file is missing or cannot be decoded.
        StorageError: the machine or the bucket cannot read it now.
    """
    if isinstance(file, bytes):
        assert name, "bytes need a name"
        data = file
    else:
        name, data = name or printable_path(file), read_file(file)
    mode = PILLOW_MODES[channels]
    return decode_picture(data, name, lambda picture: picture_array(picture, mode))


def picture_array(picture: Image.Image, mode: str) -> np.ndarray:
    """Returns a picture's pixels in a mode of Pillow, as uint8 (H, W, channels).

    Some rows are converted at a time, because the whole picture would take three times the memory.
    """
    width, height = picture.size
    pixels_HWC = np.empty((height, width, len(mode)), np.uint8)
    for top in range(0, height, ROWS_AT_ONCE):
        rows = picture.crop((0, top, width, min(top + ROWS_AT_ONCE, height)))
        if rows.mode == "P":  # otherwise Pillow warns of transparent palettes
            rows = rows.convert("RGBA")
        rows_HWC = np.asarray(rows.convert(mode))
        pixels_HWC[top : top + ROWS_AT_ONCE] = rows_HWC.reshape(-1, width, len(mode))
    return pixels_HWC


def check_pixels(images: Any, name: str = "images") -> None:
    """Checks that an array holds uint8, or floats in [0, 1], which may exceed that a little.

    Args:
        images: array of NumPy or JAX, not empty.
        name: name of the array, for messages.

    Raises:
        InputError: numbers of another type or range, or NaN.
    """
    if images.dtype == np.uint8:
        return
    if images.dtype.kind != "f" and images.dtype.name != "bfloat16":
        raise InputError(f"{name} are {images.dtype}; give uint8 or floats in [0, 1]")
    low, high = float(images.min()), float(images.max())
    if not np.isfinite([low, high]).all():
        raise InputError(f"{name} hold NaN or infinite numbers; give floats in [0, 1]")
    if low < -OVERSHOOT or high > 1 + OVERSHOOT:
        raise InputError(
            f"{name} range from {low:.3g} to {high:.3g}; give uint8, or floats in [0, 1]"
        )


def to_uint8(images: np.ndarray) -> np.ndarray:
    """Rounds values in [0, 1] to 0 … 255; raises InputError for NaN and infinity."""
    if not np.isfinite(images).all():
        raise InputError("the images contain NaN or infinity, which no image file can store")
    return np.rint(np.clip(images, 0, 1) * 255).astype(np.uint8)


def printable_path(path: str | os.PathLike) -> str:
    """Returns a path as text that can be printed and written, even if it is not UTF-8."""
    return os.fspath(path).encode("utf-8", "replace").decode()


def _read_regular_file(path: str | os.PathLike, read: Callable[[IO[bytes]], T]) -> T:
    name = printable_path(path)

    def opener(name: str, flags: int) -> int:
        return os.open(name, flags | os.O_NONBLOCK)  # a pipe would block until it is written

    def attempt() -> T:
        with open(path, "rb", opener=opener) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise BrokenImage(name, "it is not a regular file")
            return read(file)

    try:
        return retry_read(attempt, name)
    except InputError:
        raise
    except OSError as error:
        if error.errno in NO_FILE_ERRNOS:
            raise BrokenImage(name, error.strerror or str(error)) from error
        raise StorageError(f"{name} cannot be read now: {error.strerror or error}") from error


@contextlib.contextmanager
def _decoder_errors(name: str) -> Iterator[None]:
    """Raises BrokenImage for a decoder's exceptions; those of a failing machine pass through."""
    image_limits()  # outside the try: an invalid limit does not make the image broken
    try:
        yield
    except StorageError as error:
        if machine_errno(error) == errno.ENOMEM and _memory_is_left():
            reason = "it requests more memory than an image of its size needs"
            raise BrokenImage(name, reason) from error
        raise
    except UnidentifiedImageError as error:
        raise BrokenImage(name, "its format is unknown") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        if machine_errno(error) is not None:  # the disk failed while the header was read
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise BrokenImage(name, f"{kind}{error}") from error


def _open_picture(file: IO[bytes]) -> Image.Image:
    """Opens an image of a known format without decoding its pixels.

    Raises InputError if the header states too many pixels or too large an aspect ratio. Exceptions
    of Pillow pass through.
    """
    picture = Image.open(file, formats=tuple(dict.fromkeys(IMAGE_FORMATS.values())))
    width, height = picture.size
    pixels, ratio = image_limits()
    if width * height > pixels:
        raise InputError(
            f"it has {width}x{height} pixels; at most {pixels:,} in all are allowed, so resize it "
            "first, or set VARJAX_MAX_PIXELS"
        )
    if max(width, height) > ratio * min(width, height):
        raise InputError(
            f"it has {width}x{height} pixels; aspect ratios up to {ratio} are allowed, so crop it "
            "first, or set VARJAX_MAX_ASPECT_RATIO"
        )
    return picture


def _decode(data: bytes) -> Image.Image:
    try:
        with _open_picture(io.BytesIO(data)) as picture:
            largest = _largest_value(picture)
            picture.load()
            if picture.format == "PNG":
                _check_png_data(data)
            ImageOps.exif_transpose(picture, in_place=True)
    except OSError as error:
        if any(text in str(error) for text in OUT_OF_MEMORY):
            raise MemoryError(str(error)) from error
        raise
    return picture if largest is None else _scaled(picture, largest)


def _check_png_data(data: bytes) -> None:
    """Raises InputError if pixels of a PNG are damaged; Pillow does not check these checksums."""
    position, kind = 8, b""
    while position < len(data) and kind != b"IEND":
        end = position + 8 + int.from_bytes(data[position : position + 4], "big")
        kind = data[position + 4 : position + 8]
        checksum = zlib.crc32(memoryview(data)[position + 4 : end])
        if kind == b"IDAT" and checksum != int.from_bytes(data[end : end + 4], "big"):
            raise InputError("its pixels are damaged: a checksum does not match")
        position = end + 4


def _largest_value(picture: Image.Image) -> int | None:
    """Returns the largest value of a picture with more than 8 bits; None if Pillow decodes to 8.

    Refuses floats and 32-bit integers, because files use any range for them, and libraries
    disagree: some scale by the range of the type, which makes most of these images black, others by
    the values in the image.
    """
    if picture.mode == "F":
        raise InputError("it has floats, whose range is unknown; save it with 8 or 16 bits")
    if not picture.mode.startswith("I"):
        return None
    if picture.format != "TIFF":
        return 2**16 - 1  # Pillow scales PGM to this
    if picture.mode == "I":
        raise InputError(
            "it has signed or 32-bit integers, whose range is unknown; save it with 8 or 16 bits"
        )
    return 2 ** picture.tag_v2[258][0] - 1  # type: ignore[attr-defined]  # BitsPerSample


def _scaled(picture: Image.Image, largest: int) -> Image.Image:
    """Scales 0 … `largest` to 8 bits, some rows at a time, because floats take 8 bytes."""
    values_HW = np.asarray(picture)
    scaled_HW = np.empty(values_HW.shape, np.uint8)
    for top in range(0, len(values_HW), ROWS_AT_ONCE):
        rows = slice(top, top + ROWS_AT_ONCE)
        scaled_HW[rows] = to_uint8(values_HW[rows] / largest)
    return Image.fromarray(scaled_HW)


def _memory_is_left() -> bool:
    """Returns whether the machine has more memory left than decoding any image takes."""
    try:
        np.empty(DECODING_BYTES * image_limits()[0], np.uint8)
    except MemoryError:
        return False
    return True
