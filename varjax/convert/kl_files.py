"""Reads and writes KL tokenizers of other projects: diffusers' names, and the units of latents.

Diffusers numbers the decoder's levels in the order in which they run, and has linear layers where
the official attention has 1×1 convolutions. The scale and the shift of latents are determined by
flags, by the file, or by known digests of files.
"""

import dataclasses
import functools
import math
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from varjax.convert.name_maps.kl import KL16_SCALE, is_kl16
from varjax.convert.name_maps.name_map import MAX_LAYERS, ConvertOptions, Tensors
from varjax.convert.sources import Source, sha256_of
from varjax.errors import InputError
from varjax.storage import files
from varjax.storage.safetensors_io import LazyArray, Tensor
from varjax.tokenizers.kl.model import KLConfig

KNOWN_BY = "encoder.mid_block.resnets.0.conv1.weight"
IN_ATTENTION = re.compile(r"(en|de)coder\..*\.attn[._]").match  # official names
UP_BLOCK = re.compile(r"decoder\.up_blocks\.(\d+)\.")
# (official, diffusers'). `{n}` is a number; the decoder's levels are also renumbered.
NAMES = (
    ("encoder.down.{n}.block.{n}.", "encoder.down_blocks.{n}.resnets.{n}."),
    ("encoder.down.{n}.attn.{n}.", "encoder.down_blocks.{n}.attentions.{n}."),
    ("encoder.down.{n}.downsample.", "encoder.down_blocks.{n}.downsamplers.0."),
    ("decoder.up.{n}.block.{n}.", "decoder.up_blocks.{n}.resnets.{n}."),
    ("decoder.up.{n}.attn.{n}.", "decoder.up_blocks.{n}.attentions.{n}."),
    ("decoder.up.{n}.upsample.", "decoder.up_blocks.{n}.upsamplers.0."),
    ("encoder.mid.block_1.", "encoder.mid_block.resnets.0."),
    ("encoder.mid.block_2.", "encoder.mid_block.resnets.1."),
    ("encoder.mid.attn_1.", "encoder.mid_block.attentions.0."),
    ("decoder.mid.block_1.", "decoder.mid_block.resnets.0."),
    ("decoder.mid.block_2.", "decoder.mid_block.resnets.1."),
    ("decoder.mid.attn_1.", "decoder.mid_block.attentions.0."),
    ("encoder.norm_out.", "encoder.conv_norm_out."),
    ("decoder.norm_out.", "decoder.conv_norm_out."),
)
# Layers of a block: diffusers' first name is written; the others are from older versions.
LAYERS = {
    "nin_shortcut.": ("conv_shortcut.",),
    "norm.": ("group_norm.",),
    "q.": ("to_q.", "query."),
    "k.": ("to_k.", "key."),
    "v.": ("to_v.", "value."),
    "proj_out.": ("to_out.0.", "proj_attn."),
}


def is_diffusers(tensors: Tensors) -> bool:
    """Returns whether tensors have the names of diffusers' `AutoencoderKL`."""
    return KNOWN_BY in tensors


def with_official_names(tensors: Tensors) -> Tensors:
    """Renames the tensors of diffusers' `AutoencoderKL`; returns any others unchanged.

    Raises InputError if two tensors get the same name.
    """
    if not is_diffusers(tensors):
        return tensors
    numbers = [int(match[1]) for name in tensors if (match := UP_BLOCK.match(name))]  # of levels
    levels = max(numbers, default=0) + 1
    if levels > MAX_LAYERS:
        raise InputError(f"its decoder has {levels} levels; allowed are {MAX_LAYERS}")
    layers = {old: official for official, known in LAYERS.items() for old in known}
    renamed = {}
    for name, x in tensors.items():
        official = _renamed(_with_reversed_levels(name, levels), _rules(to_official=True), layers)
        if official in renamed:
            raise InputError(f"two tensors, one of them {name}, are {official} in diffusers' names")
        renamed[official] = x[:, :, None, None] if IN_ATTENTION(official) and x.ndim == 2 else x
    return renamed


def with_diffusers_names(config: KLConfig, official: Mapping[str, LazyArray]) -> dict[str, Tensor]:
    """Renames official tensors of a KL tokenizer for diffusers.

    Raises InputError for a config that diffusers' `AutoencoderKL` does not support.
    """
    if config.features != config.latent_channels:
        raise InputError(
            f"feature_channels={config.features} and latent_channels={config.latent_channels}: "
            "diffusers' AutoencoderKL has one number for both; leave --layout out"
        )
    levels, renamed = len(config.channel_mult), {}
    layers = {name: known[0] for name, known in LAYERS.items()}
    for name, x in official.items():
        shape = x.shape[:2] if IN_ATTENTION(name) else x.shape
        diffusers = _with_reversed_levels(_renamed(name, _rules(to_official=False), layers), levels)
        renamed[diffusers] = LazyArray(shape, x.dtype, x.chunks)
    return renamed


def diffusers_config(config: KLConfig, latent_std: float) -> dict[str, Any]:
    """Returns the config.json by which `AutoencoderKL.from_pretrained` builds the model.

    Args:
        config: config of the tokenizer.
        latent_std: standard deviation of the latents, the scalar among the parameters.
    """
    H, W, channels = config.image_shape
    levels = range(-len(config.channel_mult), 0)
    down = ["AttnDown" if i in config.encoder_attention else "Down" for i in levels]
    up = ["AttnUp" if i in config.decoder_attention else "Up" for i in reversed(levels)]
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [config.width * n for n in config.channel_mult],
        "down_block_types": [f"{kind}EncoderBlock2D" for kind in down],
        "in_channels": channels,
        "latent_channels": config.latent_channels,
        "layers_per_block": config.blocks,
        "mid_block_add_attention": True,
        "norm_num_groups": config.groups,
        "out_channels": channels,
        "sample_size": max(H, W),
        "scaling_factor": round(1 / latent_std, 7),
        "shift_factor": config.latent_shift or None,
        "up_block_types": [f"{kind}DecoderBlock2D" for kind in up],
        "use_post_quant_conv": config.quant_convs,
        "use_quant_conv": config.quant_convs,
    }


def _with_reversed_levels(name: str, levels: int) -> str:
    """Numbers the decoder's levels in one of diffusers' names from the other end."""
    return UP_BLOCK.sub(lambda match: f"decoder.up_blocks.{levels - 1 - int(match[1])}.", name)


def _renamed(name: str, rules: list[tuple[re.Pattern[str], str]], layers: Mapping[str, str]) -> str:
    for pattern, template in rules:
        if match := pattern.match(name):
            rest = name[match.end() :]
            old = next((layer for layer in layers if rest.startswith(layer)), "")
            return match.expand(template) + layers.get(old, "") + rest.removeprefix(old)
    return name


@functools.cache
def _rules(to_official: bool) -> list[tuple[re.Pattern[str], str]]:
    """Returns, for each pair in NAMES, the pattern to match and the template that replaces it."""
    rules = []
    for official, diffusers in NAMES:
        old, new = (diffusers, official) if to_official else (official, diffusers)
        first, *others = new.split("{n}")
        template = first + "".join(f"\\g<{i}>{part}" for i, part in enumerate(others, 1))
        rules.append((re.compile(re.escape(old).replace(r"\{n\}", r"(\d+)")), template))
    return rules


SCALE_FACTOR = "scale_factor"  # a tensor of latent diffusion models that measured their scale
SD, SDXL, FLUX = (0.18215, 0.0), (0.13025, 0.0), (0.3611, 0.1159)
# SHA-256 of published files that do not hold their scale -> (scale, shift). The digests are those
# shown on the pages of Hugging Face's Hub.
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
    """Fills in `latent_scale` and `latent_shift` if the options of a KL tokenizer omit them.

    Reports on stderr where they come from, unless the flag sets them or the file is MAR's KL-16.

    Args:
        source: file of the tokenizer.
        location: file as the user gave it, whose folder may contain a config.json.
        options: options of the conversion, which take precedence.

    Raises:
        InputError: neither the flag, nor the file, nor its digest determines the scale.
    """
    if options.latent_scale is not None:
        return options
    units, origin = None, ""
    if SCALE_FACTOR in source.held:
        units = _scale_factor(source.held[SCALE_FACTOR]), 0.0
        origin = f"according to its {SCALE_FACTOR}"
    elif is_diffusers(source.held) and (units := _units_from_config(location)):
        origin = f"according to {location.parent / 'config.json'}"
    elif is_kl16(source.kind.infer(source.tensors, options)):
        return dataclasses.replace(options, latent_scale=KL16_SCALE)
    else:
        (digest,) = sha256_of(source.files[:1]).values()
        units, origin = KNOWN_FILES.get(digest), "as published for this file"
    if units is None:
        raise InputError(
            "this file does not hold the scale of its latents, and its SHA-256 is unknown; give "
            f"--latent_scale: {SD[0]} for Stable Diffusion 1 and 2, {SDXL[0]} for SDXL, {FLUX[0]} "
            f"(and --latent_shift={FLUX[1]}) for FLUX, 0.22765929 for RDM's f16; or 1, and then "
            "the latent_scale that `varjax evaluate-tokenizer` measures"
        )
    scale, shift = units
    shift = shift if options.latent_shift is None else options.latent_shift
    shifted = f" after subtracting {shift:g}" if shift else ""
    print(
        f"note: {location}: latents are multiplied by {scale:g}{shifted}, {origin}",
        file=sys.stderr,
    )
    return dataclasses.replace(options, latent_scale=scale, latent_shift=shift)


def _scale_factor(tensor: np.ndarray) -> float:
    if tensor.size != 1 or not np.isrealobj(tensor):
        raise InputError(f"{SCALE_FACTOR} is {tensor.dtype} {tensor.shape}; expected one number")
    return _checked(SCALE_FACTOR, float(np.asarray(tensor).reshape(())))


def _units_from_config(location: pathlib.Path) -> tuple[float, float] | None:
    """Reads (scale, shift) from diffusers' config.json next to the weights; None without one."""
    path = location.parent / "config.json"
    config: Any = files.read_json(path) if files.exists(path) else None
    if not isinstance(config, dict) or not str(config.get("_class_name")).startswith("Autoencoder"):
        return None
    # Older files omit the scale; diffusers' default is that of Stable Diffusion.
    scale, shift = config.get("scaling_factor", SD[0]), config.get("shift_factor") or 0.0
    for name, value in (("scaling_factor", scale), ("shift_factor", shift)):
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise InputError(f"{path}: {name}={value!r}; expected a finite number")
    return _checked("scaling_factor", float(scale)), float(shift)


def _checked(name: str, scale: float) -> float:
    if not (scale > 0 and math.isfinite(scale)):
        raise InputError(f"{name}={scale}: expected a finite number above 0; give --latent_scale")
    return scale
