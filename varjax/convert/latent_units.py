"""The scale and the shift of a KL tokenizer's latents: by flag, by its file, by known digests."""

import dataclasses
import math
import pathlib
import sys
from typing import Any

import numpy as np

from varjax.convert.diffusers_layout import is_diffusers
from varjax.convert.infer_config import Source
from varjax.convert.name_maps.kl import KL16_SCALE, is_kl16
from varjax.convert.name_maps.name_map import ConvertOptions
from varjax.convert.sources import sha256_of
from varjax.errors import InputError
from varjax.storage import files

SCALE_FACTOR = "scale_factor"  # a tensor of latent diffusion models that measured it
SD, SDXL, FLUX = (0.18215, 0.0), (0.13025, 0.0), (0.3611, 0.1159)
# SHA-256 of published files that do not hold their scale -> (scale, shift). Those of Hugging Face's
# Hub, as its pages show them.
KNOWN_FILES = {
    # stabilityai/sd-vae-ft-mse-original and -ema-original: .ckpt and .safetensors of each
    "c6a580b13a5bc05a5e16e4dbb80608ff2ec251a162311590c1f34c013d7f3dab": SD,
    "735e4c3a447a3255760d7f86845f09f937809baa529c17370d83e4c3758f3c75": SD,
    "0b204ad0cae549e0a7e298d803d57e36363760dec71c63109c1da3e1147ec520": SD,
    "95f26a5ab04779d5467d1fcecaf93160ffa523afe399b835b3e1bb77ff2d937a": SD,
    # whole models: sd-v1-4.ckpt, v1-5-pruned-emaonly.ckpt, v2-1_768-ema-pruned.ckpt
    "fe4efff1e174c627256e44ec2991ba279b3816e364b49f9be2abc0b3ff3f8556": SD,
    "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516": SD,
    "ad2a33c361c1f593c4a1fb32ea81afce2b5bb7d1983c6b94793a26a3b54b08a0": SD,
    # sdxl_vae.safetensors, and the whole sd_xl_base_1.0.safetensors
    "63aeecb90ff7bc1c115395962d3e803571385b61938377bc7089b36e81e92e2e": SDXL,
    "31e35c80fc4829d14f90153f4c74cd59c90b779f6afe05a74cd6120b893f7e5b": SDXL,
    # ae.safetensors of FLUX.1
    "afc8e28272cd15db3919bacdb6918ce9c1ed22e96cb12c4d5ed0fba823529e38": FLUX,
}


def with_latent_units(
    source: Source, location: pathlib.Path, options: ConvertOptions
) -> ConvertOptions:
    """Fills in `latent_scale` and `latent_shift` where a KL tokenizer's options leave them out.

    Says on stderr where they come from, if not from the flag or from being MAR's KL-16.

    Args:
        source: file of the tokenizer.
        location: file as the user gave it, whose folder may contain a config.json.
        options: options of the conversion, which take precedence.

    Raises:
        InputError: neither the flag, nor the file, nor its digest determines the scale.
    """
    if options.latent_scale is not None:
        return options
    found, origin = None, ""
    if SCALE_FACTOR in source.held:
        found, origin = (_scale_factor(source.held[SCALE_FACTOR]), 0.0), f"by its {SCALE_FACTOR}"
    elif is_diffusers(source.held) and (beside := _config_beside(location)):
        found, origin = beside, f"by {location.parent / 'config.json'}"
    elif is_kl16(source.kind.infer(source.tensors, options)):
        return dataclasses.replace(options, latent_scale=KL16_SCALE)
    else:
        (digest,) = sha256_of(source.files[:1]).values()
        found, origin = KNOWN_FILES.get(digest), "as is known of this file"
    if found is None:
        raise InputError(
            "neither this file nor its SHA-256 tells what its latents are multiplied by; give "
            f"--latent_scale: {SD[0]} for Stable Diffusion 1 and 2, {SDXL[0]} for SDXL, {FLUX[0]} "
            f"(and --latent_shift={FLUX[1]}) for FLUX, 0.22765929 for RDM's f16; or 1, and then "
            "the latent_scale that `varjax evaluate-tokenizer` measures"
        )
    scale, shift = found
    shift = shift if options.latent_shift is None else options.latent_shift
    shifted = f" after {shift:g} is subtracted" if shift else ""
    print(
        f"note: {location}: latents are multiplied by {scale:g}{shifted}, {origin}",
        file=sys.stderr,
    )
    return dataclasses.replace(options, latent_scale=scale, latent_shift=shift)


def _scale_factor(tensor: np.ndarray) -> float:
    if tensor.size != 1 or not np.isrealobj(tensor):
        raise InputError(f"{SCALE_FACTOR} is {tensor.dtype} {tensor.shape}; needed is one number")
    return _checked(SCALE_FACTOR, float(np.asarray(tensor).reshape(())))


def _config_beside(location: pathlib.Path) -> tuple[float, float] | None:
    """(scale, shift) of the config.json that diffusers writes next to weights; None without one."""
    path = location.parent / "config.json"
    config: Any = files.read_json(path) if files.exists(path) else None
    if not isinstance(config, dict) or not str(config.get("_class_name")).startswith("Autoencoder"):
        return None
    # Older files leave the scale out: diffusers' default is that of Stable Diffusion.
    scale, shift = config.get("scaling_factor", SD[0]), config.get("shift_factor") or 0.0
    for name, value in (("scaling_factor", scale), ("shift_factor", shift)):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{path}: {name}={value!r}; needed is a finite number")
    return _checked("scaling_factor", float(scale)), float(shift)


def _checked(name: str, scale: float) -> float:
    if not (scale > 0 and math.isfinite(scale)):
        raise InputError(f"{name}={scale}: needed is a finite number above 0; give --latent_scale")
    return scale
