"""How evaluation crops photographs: as in the recipe that the model was trained with.

VAR's tokenizer was trained on one kind of crop, MAR's and latent diffusion's on another. FID, rFID
and the scale of latents depend on it.
"""

import pathlib

from varjax.checkpoints.weights import WeightsDir
from varjax.data.transforms import Crop
from varjax.errors import InputError
from varjax.models import recipe_crop

AUTO = "auto"
CROPPED = "folder:", "tfds:"  # the datasets whose images may have any size
CROPS: dict[str, Crop] = {"var": "random", "adm": "center"}  # by the value of --crop
DESCRIPTIONS: dict[Crop, str] = {
    "random": "cropped as in VAR: Lanczos to 1.125 times the size, then the middle (--crop=var)",
    "center": "cropped as in ADM and MAR: box filter and bicubic to the size, then the middle "
    "(--crop=adm)",
}
CROP_HELP = "crop of a dataset's photographs: auto (the model's recipe), var or adm (auto)"


def choose_crop(flag: str, location: str | pathlib.Path | WeightsDir | None) -> Crop:
    """Returns the crop that a flag names.

    Args:
        flag: kind of crop, "auto", "var" or "adm".
        location: location of the model, whose recipe "auto" follows; None for VAR's.

    Raises:
        InputError: an unknown flag, or no model at `location`.
    """
    if flag in CROPS:
        return CROPS[flag]
    if flag != AUTO:
        raise InputError(f"crop={flag}: must be {', '.join((AUTO, *CROPS))}")
    return "random" if location is None else recipe_crop(location)


def describe_crop(data: str, crop: Crop) -> str | None:
    """Describes how the evaluation images of a dataset are cropped; None if they are not."""
    return DESCRIPTIONS[crop] if data.startswith(CROPPED) else None
