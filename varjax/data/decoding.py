"""Decodes image files to uint8 arrays; an error names the file and the reason."""

import os

import numpy as np

from varjax.storage.image_files import decode_picture, picture_array, printable_path, read_file

PILLOW_MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # by number of channels


def decode_file(file: bytes | str | os.PathLike, channels: int = 3, name: str = "") -> np.ndarray:
    """Decodes an image by Pillow, whatever it holds: gray, palettes, CMYK, 1 bit and 16 bits.

    EXIF orientation is applied; of an animation the first frame counts. With 1 and 3 channels an
    alpha channel is dropped, as by the reference's `convert("RGB")`.

    Args:
        file: the encoded image, or the path of its file.
        channels: number of channels: 1 gray, 3 RGB, 4 RGBA.
        name: name for messages, needed if `file` is bytes.

    Returns:
        uint8 (H, W, channels).

    Raises:
        BrokenImage: names `name`, or the path: there is no such file, or the decoder refuses it.
        StorageError: the machine or the bucket cannot read it now.
    """
    if isinstance(file, bytes):
        assert name, "bytes need a name"
        data = file
    else:
        name, data = name or printable_path(file), read_file(file)
    mode = PILLOW_MODES[channels]
    return decode_picture(data, name, lambda picture: picture_array(picture, mode))
