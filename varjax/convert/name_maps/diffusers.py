"""Maps the names of diffusers' `AutoencoderKL` to the official names and back.

Diffusers numbers the decoder's levels in the order in which they run, and has linear layers where
the official attention has 1×1 convolutions.
"""

import functools
import re
from collections.abc import Mapping
from typing import Any

from varjax.convert.name_maps.name_map import MAX_LAYERS, Tensors
from varjax.errors import InputError
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
            raise InputError(f"two tensors, one of them {name}, get the official name {official}")
        renamed[official] = x[:, :, None, None] if IN_ATTENTION(official) and x.ndim == 2 else x
    return renamed


def with_diffusers_names(config: KLConfig, official: Mapping[str, LazyArray]) -> dict[str, Tensor]:
    """Renames official tensors of a KL tokenizer for diffusers.

    Raises InputError for a config that diffusers' `AutoencoderKL` does not support.
    """
    if config.features != config.latent_channels:
        raise InputError(
            f"feature_channels={config.features} and latent_channels={config.latent_channels}: "
            "diffusers' AutoencoderKL has one number for both; omit --layout"
        )
    levels, renamed = len(config.channel_mult), {}
    layers = {name: known[0] for name, known in LAYERS.items()}
    for name, x in official.items():
        shape = x.shape[:2] if IN_ATTENTION(name) else x.shape
        diffusers = _with_reversed_levels(_renamed(name, _rules(to_official=False), layers), levels)
        renamed[diffusers] = LazyArray(shape, x.dtype, x.chunks)
    return renamed


def diffusers_config(config: KLConfig, latent_std: float) -> dict[str, Any]:
    """Returns the config.json from which `AutoencoderKL.from_pretrained` builds the model.

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
    """Reverses the numbering of the decoder's levels in one of diffusers' names."""
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
