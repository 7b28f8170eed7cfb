"""How evaluation cuts images out of photographs: by the recipe that a model was trained by.

VAR's tokenizer saw images that were cropped in one way, MAR's and latent diffusion's in another,
and FID, rFID and the scale of latents depend on it.
"""

import pathlib
from typing import Any, get_args

from varjax.checkpoints.model_files import find_model, read_model_config
from varjax.data.latent_shards import ABOUT_FILE
from varjax.data.transforms import Crop
from varjax.errors import InputError
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.load import read_tokenizer_config

AUTO = "auto"
CROPPED = "folder:", "tfds:"  # the datasets whose images may have any size
CROPS: dict[str, Crop] = {"var": "random", "adm": "center"}  # what flags call them
DESCRIPTIONS: dict[Crop, str] = {
    "random": "cropped as by VAR: Lanczos to 1.125 times the size, then the middle (--crop=var)",
    "center": "cropped as by ADM and MAR: box filter and bicubic to the size, then the middle "
    "(--crop=adm)",
}
CROP_HELP = "crop of a dataset's photographs: auto (the model's recipe), var or adm (auto)"


def choose_crop(flag: str, location: str | pathlib.Path | None) -> Crop:
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


def recipe_crop(location: str | pathlib.Path) -> Crop:
    """Finds the crop in a run's data, or of the tokenizer in a converted directory.

    A KL tokenizer is MAR's or latent diffusion's, so its images are cropped as by ADM.
    """
    config = read_model_config(find_model(location))
    crop = run_crop(config) or config.get("crop")
    for known in get_args(Crop):
        if crop == known:
            return known
    return "center" if isinstance(read_tokenizer_config(location), KLConfig) else "random"


def run_crop(config: dict[str, Any]) -> Any:
    """Returns the crop of the images in a run's config.json, or of those its latents are made of.

    None where there is no such setting: digits are not cropped.
    """
    data = config.get("data")
    if not isinstance(data, dict):
        return None
    if data.get("_type") == "CachedLatents":
        about = as_path(str(data.get("root"))) / ABOUT_FILE
        data = files.read_json(about).get("settings") if about.exists() else None
    return data.get("crop") if isinstance(data, dict) else None


def describe_crop(data: str, crop: Crop) -> str | None:
    """Says how the evaluation images of a command line's dataset are cropped; None: not at all."""
    return DESCRIPTIONS[crop] if data.startswith(CROPPED) else None
