"""Maps the encoder and decoder that the official tokenizers share (VQGAN's and LDM's modules)."""

import re
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from varjax.convert.name_maps.name_map import (
    Link,
    Tensors,
    conv_links,
    count_numbers,
    norm_links,
    option,
    tensor_shape,
)
from varjax.errors import InputError
from varjax.storage.untrusted import shown


class AutoencoderSizes(Protocol):
    """Describes the part of a tokenizer's config that determines the names of its tensors."""

    @property
    def width(self) -> int: ...
    @property
    def channel_mult(self) -> tuple[int, ...]: ...
    @property
    def blocks(self) -> int: ...


def groups_option() -> Any:
    """Makes the option `groups`."""
    return option(None, "groups in each group norm of the tokenizer (the file's, else 32)", int)


def infer_autoencoder(tensors: Tensors) -> dict[str, Any]:
    """Infers the fields of a config that describe encoder and decoder.

    Raises InputError for tensors that are missing or contradict each other.
    """
    width, image_channels, *_ = tensor_shape(tensors, "encoder.conv_in.weight", 4)
    levels = range(count_numbers(tensors, r"encoder\.down\.(\d+)\."))
    outputs = [
        tensor_shape(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in levels
    ]
    if odd := [n for n in outputs if n % width]:
        raise InputError(
            f"the encoder's levels have {shown(odd)} channels, which are not multiples of {width}"
        )
    return {
        "image_channels": image_channels,
        "width": width,
        "channel_mult": tuple(n // width for n in outputs),
        "blocks": count_numbers(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
    }


def infer_attention(tensors: Tensors, half: str, levels: int) -> tuple[int, ...]:
    """Finds the levels with attention in a half, "encoder" or "decoder"; -1 is the coarsest.

    Raises InputError for a level that the encoder does not have.
    """
    matches = (re.match(rf"{half}\.(?:down|up)\.(\d+)\.attn\.", name) for name in tensors)
    numbers = sorted({int(match[1]) for match in matches if match})
    if numbers and numbers[-1] >= levels:
        raise InputError(f"the {half} has attention at level {numbers[-1]} of {levels} levels")
    return tuple(i - levels for i in numbers)


def autoencoder_links(
    config: AutoencoderSizes,
    split_qkv: bool,
    encoder_attention: Sequence[int],
    decoder_attention: Sequence[int],
) -> Iterator[Link]:
    """Yields the links of encoder and decoder.

    Args:
        config: sizes of the encoder and the decoder.
        split_qkv: whether an official attention layer has separate convolutions for q, k and v.
        encoder_attention: levels of the encoder with attention, -1 for the coarsest.
        decoder_attention: levels of the decoder with attention, -1 for the coarsest.
    """
    count = len(config.channel_mult)
    for half, way, blocks, resample, attention in (
        ("encoder", "down", config.blocks, "downsample", encoder_attention),
        ("decoder", "up", config.blocks + 1, "upsample", decoder_attention),
    ):
        yield from conv_links(f"{half}.conv_in", f"{half}/conv_in")
        yield from conv_links(f"{half}.conv_out", f"{half}/conv_out")
        yield from norm_links(f"{half}.norm_out", f"{half}/norm_out")
        width = config.width * (config.channel_mult[-1] if half == "decoder" else 1)
        for j in (1, 2):
            yield from _residual(f"{half}.mid.block_{j}", f"{half}/mid_block_{j}", shortcut=False)
        yield from _attention(f"{half}.mid.attn_1", f"{half}/mid_attn_1", split_qkv)
        levels = list(enumerate(config.channel_mult))
        for i, multiplier in levels if half == "encoder" else reversed(levels):
            for j in range(blocks):
                official, ours = f"{half}.{way}.{i}.block.{j}", f"{half}/{way}_{i}_block_{j}"
                yield from _residual(official, ours, shortcut=width != config.width * multiplier)
                width = config.width * multiplier
                if i - count in attention:
                    official, ours = f"{half}.{way}.{i}.attn.{j}", f"{half}/{way}_{i}_attn_{j}"
                    yield from _attention(official, ours, split_qkv)
            if i != (count - 1 if half == "encoder" else 0):
                official = f"{half}.{way}.{i}.{resample}.conv"
                yield from conv_links(official, f"{half}/{way}_{i}_{resample}/conv")


def _residual(official: str, ours: str, shortcut: bool) -> Iterator[Link]:
    for j in (1, 2):
        yield from norm_links(f"{official}.norm{j}", f"{ours}/norm{j}")
        yield from conv_links(f"{official}.conv{j}", f"{ours}/conv{j}")
    if shortcut:
        yield from conv_links(f"{official}.nin_shortcut", f"{ours}/shortcut")


def _attention(official: str, ours: str, split_qkv: bool) -> Iterator[Link]:
    yield from norm_links(f"{official}.norm", f"{ours}/norm")
    if split_qkv:
        for i, name in enumerate("qkv"):
            yield from conv_links(f"{official}.{name}", f"{ours}/qkv", part=(i, 3))
    else:
        yield from conv_links(f"{official}.qkv", f"{ours}/qkv")
    yield from conv_links(f"{official}.proj_out", f"{ours}/proj")
