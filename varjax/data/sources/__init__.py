"""All datasets, and how a command line names them."""

from varjax.core.errors import InputError
from varjax.data.latents import Tokens
from varjax.data.sources.digits import Digits
from varjax.data.sources.folder import Folder
from varjax.data.sources.noise import Noise
from varjax.data.sources.photos import Photos
from varjax.data.sources.tfds import TFDS

__all__ = ["TFDS", "Digits", "Folder", "Noise", "Photos", "Tokens", "parse"]


def parse(
    text: str, size: int | tuple[int, int], channels: int = 3
) -> Digits | Folder | Noise | Photos | Tokens | TFDS:
    """The dataset that is meant by "folder:PATH", "tfds:NAME", "tfds:DIRECTORY", "tokens:PATH",
    "digits", "photos" or "random".

    `size` is that of its images, or (height, width); `channels` theirs, where there is a choice.
    Raises InputError for anything else.
    """
    kind, colon, where = text.partition(":")
    if kind == "folder" and where:
        return Folder(where, size, channels)
    if kind == "tfds" and where:
        return TFDS(where, size=size, channels=channels)
    if kind == "tokens" and where:
        return Tokens(where)
    if kind == "digits" and not colon:
        if size not in (8, (8, 8)):
            raise InputError(f"digits are 8 by 8 pixels, but {size} is wanted; choose other data")
        return Digits()
    if kind == "random" and not colon:
        return Noise(size, channels)
    if kind == "photos" and not colon:
        return Photos(size)
    raise InputError(
        f"data is {text!r}; give folder:PATH (images in folders), tfds:NAME or tfds:DIRECTORY "
        "(a prepared dataset), tokens:PATH (made of images once), digits, photos (crops of two "
        "photographs), or random (noise, to try things out)"
    )
