"""Decodes image files to uint8 arrays; an error names the file and the reason."""

import contextlib
import io
import os

import numpy as np
from PIL import UnidentifiedImageError

from varjax.core import buckets, image_io
from varjax.core.buckets import as_path, in_bucket
from varjax.core.errors import InputError

PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels


class BrokenImage(InputError):
    """Reports an image that cannot be decoded.

    Attributes:
        name: its file or record.
        reason: why, as Pillow or the operating system puts it.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it survives pickling
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read as an image: {self.reason}"


def read_file(path: str | os.PathLike) -> bytes:
    """Returns the content of a file.

    Raises BrokenImage where it cannot be read, or StorageError where its bucket cannot be reached.
    """
    try:
        path = as_path(path)
        if not in_bucket(path):
            return path.read_bytes()
        with buckets.storage_errors(path, "read"), contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        raise BrokenImage(str(path), "it is missing")
    except InputError:  # a network that fails tells nothing of the image
        raise
    except OSError as error:
        raise BrokenImage(printable_path(path), error.strerror or str(error)) from error


def decode_file(file: bytes | str | os.PathLike, channels: int = 3, name: str = "") -> np.ndarray:
    """Decodes an image by Pillow, whatever it holds: gray, palettes, CMYK, 1 bit and 16 bits.

    EXIF orientation is applied; of an animation the first frame counts. With 1 and 3 channels an
    alpha channel is dropped, as by the reference's `convert("RGB")`.

    Args:
        file: the encoded image, or the path of its file.
        channels: 1 gray, 3 RGB, 4 RGBA.
        name: for messages; needed where `file` is bytes.

    Returns:
        uint8 (H, W, channels).

    Raises:
        BrokenImage: tells `name`, or the path.
    """
    if isinstance(file, bytes):
        assert name, "bytes need a name"
        data = file
    else:
        name, data = name or printable_path(file), read_file(file)
    try:
        picture = image_io.decode_image(io.BytesIO(data))
        if picture.mode == "P":  # by this detour Pillow does not warn of transparent palettes
            picture = picture.convert("RGBA")
        image_HWC = np.asarray(picture.convert(PILLOW_MODES[channels]))
    except UnidentifiedImageError as error:
        reason = "it is of no known format" if data else "it is empty"
        raise BrokenImage(name, reason) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise BrokenImage(name, f"{kind}{error}") from error
    return image_HWC.reshape(*image_HWC.shape[:2], channels)


def printable_path(path: str | os.PathLike) -> str:
    """Returns a path as text that any terminal and file takes, also where it is not UTF-8."""
    return os.fspath(path).encode("utf-8", "replace").decode()
