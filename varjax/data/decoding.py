"""Bytes of an image file in, a uint8 array out, or an error that says which file and why."""

import io
import os
import pathlib

import numpy as np
from PIL import UnidentifiedImageError

from varjax.core import image_io
from varjax.core.errors import InputError

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names by number of channels


class BrokenImage(InputError):
    """An image that cannot be decoded: the `name` of its file or record, and the `reason`."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it survives pickling
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read as an image: {self.reason}"


def read(path: str | os.PathLike) -> bytes:
    """The content of a file; BrokenImage where it cannot be read."""
    try:
        return pathlib.Path(path).read_bytes()
    except OSError as error:
        raise BrokenImage(printable(path), error.strerror or str(error)) from error


def decode(file: bytes | str | os.PathLike, channels: int = 3, name: str = "") -> np.ndarray:
    """uint8 (H, W, channels) of an encoded image, or of the one in the file at a path.

    channels: 1 gray, 3 RGB, 4 RGBA; whatever the file holds is converted, gray, palettes, CMYK,
    1 bit and 16 bits. With 1 and 3 an alpha channel is dropped, as by the reference's
    `convert("RGB")`. EXIF orientation is applied; of an animation the first frame counts. Raises
    BrokenImage, which tells `name` or the path.
    """
    if isinstance(file, bytes):
        assert name, "bytes need a name"
        data = file
    else:
        name, data = name or printable(file), read(file)
    try:
        picture = image_io.load(io.BytesIO(data))
        if picture.mode == "P":  # by this detour Pillow does not warn of transparent palettes
            picture = picture.convert("RGBA")
        image = np.asarray(picture.convert(MODES[channels]))
    except UnidentifiedImageError as error:
        reason = "it is of no known format" if data else "it is empty"
        raise BrokenImage(name, reason) from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        reason = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        raise BrokenImage(name, reason) from error
    return image.reshape(*image.shape[:2], channels)


def printable(path: str | os.PathLike) -> str:
    """A path as text that any terminal and file takes, also where it is not UTF-8."""
    return os.fspath(path).encode("utf-8", "replace").decode()
