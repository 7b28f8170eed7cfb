"""How evaluation cuts images out of photographs: by the recipe that a model was trained by.

VAR's tokenizer saw images that were cropped in one way, MAR's and latent diffusion's in another,
and FID, rFID and the scale of latents depend on it.
"""

import pathlib

from varjax.checkpoints.weights import WeightsDir
from varjax.data.transforms import Crop
from varjax.errors import InputError
from varjax.models import recipe_crop

AUTO = "auto"
CROPPED = "folder:", "tfds:"  # the datasets whose images may have any size
CROPS: dict[str, Crop] = {"var": "random", "adm": "center"}  # what flags call them
DESCRIPTIONS: dict[Crop, str] = {
    "random": "cropped as by VAR: Lanczos to 1.125 times the size, then the middle (--crop=var)",
    "center": "cropped as by ADM and MAR: box filter and bicubic to the size, then the middle "
    "(--crop=adm)",
}
CROP_HELP = "crop of a dataset's photographs: auto (the model's recipe), var or adm (auto)"


def choose_crop(flag: str, location: str | pathlib.Path | WeightsDir | None) -> Crop:
    """Returns the crop that a flag names.

    Args:
        flag: kind of crop, "auto", "var" or "adm".
        location: location of the model, whose recipe "auto" follows; None for VAR's.

    Raises:
        InputError: another flag, or no model is there.
    """
    if flag in CROPS:
        return CROPS[flag]
    if flag != AUTO:
        raise InputError(f"crop={flag}: must be {', '.join((AUTO, *CROPS))}")
    return "random" if location is None else recipe_crop(location)


def describe_crop(data: str, crop: Crop) -> str | None:
    """Says how the evaluation images of a command line's dataset are cropped; None: not at all."""
    return DESCRIPTIONS[crop] if data.startswith(CROPPED) else None
