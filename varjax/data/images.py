"""Bytes of an image file in, a uint8 array out, or an error that says which file and why."""

import io
import os
import pathlib

import numpy as np

from varjax import pictures

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # Pillow's names by number of channels


class BrokenImage(ValueError):
    """An image that cannot be decoded: the `name` of its file or record, and the `reason`."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)  # both, so that it survives pickling
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name} cannot be read as an image: {self.reason}"


def decode(file: bytes | str | os.PathLike, channels: int = 3, name: str = "") -> np.ndarray:
    """uint8 (H, W, channels) of an encoded image, or of the file at a path.

    Gray, palette, CMYK, 1-bit and 16-bit images become what their channels ask for: 1 gray, 3 RGB,
    4 RGBA. With 1 and 3 the alpha channel is dropped, as `convert("RGB")` of the reference does.
    EXIF orientation is applied; of an animation the first frame counts. Raises BrokenImage, with
    `name` or the path in it.
    """
    if not name:
        assert not isinstance(file, bytes), "bytes need a name"
        name = os.fsdecode(file).encode("utf-8", "replace").decode()  # so that it can be printed
    try:
        data = file if isinstance(file, bytes) else pathlib.Path(file).read_bytes()
        picture = pictures.load(io.BytesIO(data))
        if picture.mode == "P":  # by this detour Pillow does not warn of transparent palettes
            picture = picture.convert("RGBA")
        image = np.asarray(picture.convert(MODES[channels]))
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged data
        reason = f"{type(error).__name__}: {error}".removeprefix("ValueError: ")
        raise BrokenImage(name, reason) from error
    return image.reshape(*image.shape[:2], channels)
