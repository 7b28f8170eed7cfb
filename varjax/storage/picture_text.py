"""Writes into pictures how they were made, and reads it back."""

import json
import os
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

import varjax
from varjax.storage import files, image_io

SOFTWARE, COMMAND, SETTINGS = "Software", "Command", "Settings"
IMAGE_DESCRIPTION = 0x010E  # tag of Exif, which WebP files have


def command_text(
    command: str, arguments: Sequence[str], settings: Mapping[str, Any]
) -> dict[str, str]:
    """Returns the text of a picture: program, command line, and settings as JSON.

    Args:
        command: name of the command, such as "varjax sample".
        arguments: arguments of the command.
        settings: everything that the images depend on, as JSON data.
    """
    line = f"{command} {shlex.join(arguments)}"
    return {SOFTWARE: software(), COMMAND: line, SETTINGS: json.dumps(settings)}


def image_text(settings: Mapping[str, Any], number: int, label: Any) -> dict[str, str]:
    """Returns the text of one image of many.

    Args:
        settings: everything that all of the images depend on, as JSON data.
        number: number of the image.
        label: class of the image, or a mix of classes as text.
    """
    texts = {SOFTWARE: software(), SETTINGS: json.dumps(settings)}
    return texts | {"Image": str(number), "Label": str(label)}


def software() -> str:
    """Returns the name and version of this program."""
    return f"varjax {varjax.__version__}"


def film_text(text: Mapping[str, str], kind: str) -> dict[str, Any]:
    """Returns the arguments of Pillow's `save` that put text into an animation, as one JSON object.

    Args:
        text: text by keyword.
        kind: "gif" or "webp".
    """
    if not text:
        return {}
    line = json.dumps(text)
    if kind == "gif":
        return {"comment": line.encode()}
    exif = Image.Exif()
    exif[IMAGE_DESCRIPTION] = line
    return {"exif": exif.tobytes()}


def read_picture_text(path: str | os.PathLike) -> tuple[str, dict[str, str]]:
    """Reads what a picture says about itself.

    Args:
        path: path of an image file.

    Returns:
        A line about its size, and its text by keyword; {} if it has none.

    Raises:
        InputError: the file is missing, damaged or not an image.
    """
    path = files.local_copy(path)
    image_io.open_image(path)  # raises for anything that is not an image
    with Image.open(path) as picture:
        about = f"{picture.format} image, {picture.width}x{picture.height} pixels"
        if (frames := image_io.frame_count(path)) > 1:
            about += f", {frames} frames"
        info = picture.info
        if picture.format == "PNG":
            return about, {str(k): v for k, v in info.items() if isinstance(v, str)}
        comment = info.get("comment", b"")
        line = picture.getexif().get(IMAGE_DESCRIPTION) or comment
    line = line.decode(errors="replace") if isinstance(line, bytes) else str(line)
    try:
        text = json.loads(line)
    except ValueError:
        return about, {"Comment": line} if line else {}
    return about, {str(k): str(v) for k, v in text.items()} if isinstance(text, dict) else {}
