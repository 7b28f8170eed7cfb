"""The official multi-scale VQ tokenizer (`VQVAE` of FoundationVision/VAR) and ours."""

from collections.abc import Iterator

import numpy as np

from varjax.convert.name_maps.link import Link, conv_links, norm_links
from varjax.convert.name_maps.name_map import (
    ConvertOptions,
    NameMap,
    Release,
    Tensors,
    count_numbers,
    tensor_shape,
)
from varjax.core.errors import InputError
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.pyramid import SCALES_256

REPO = "FoundationVision/var"
TOKENIZER_FILE = "vae_ch160v4096z32.pth"
HITS = "quantize.ema_vocab_hit_SV"  # the buffer: how often each scale used each code


def infer_vq(tensors: Tensors, options: ConvertOptions) -> VQConfig:
    """Infers the config of an official `VQVAE`; its tensors tell at most the number of scales.

    Raises InputError for tensors that are missing or contradict each other.
    """
    vocab, code_channels = tensor_shape(tensors, "quantize.embedding.weight", 2)
    width, image_channels, *_ = tensor_shape(tensors, "encoder.conv_in.weight", 4)
    levels = range(count_numbers(tensors, r"encoder\.down\.(\d+)\."))
    outputs = [
        tensor_shape(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in levels
    ]
    if odd := [n for n in outputs if n % width]:
        raise InputError(f"the encoder's levels have {odd} channels, no multiples of {width}")
    own_phis = count_numbers(tensors, r"quantize\.quant_resi\.(\d+)\.weight")
    shared_phis = count_numbers(tensors, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight")
    scales = options.scales or SCALES_256
    hits_SV = tensors.get(HITS)
    for count in (own_phis, 0 if hits_SV is None else len(hits_SV)):
        if count not in (0, len(scales)):
            raise InputError(
                f"the tokenizer has {count} scales, but the transformer, or --scales, or without "
                f"both the official 256 px model has {len(scales)}: {scales}"
            )
    return VQConfig(
        scales=scales,
        image_channels=image_channels,
        width=width,
        multipliers=tuple(n // width for n in outputs),
        blocks=count_numbers(tensors, r"encoder\.down\.0\.block\.(\d+)\."),
        groups=options.groups,
        vocab=vocab,
        code_channels=code_channels,
        phis=0 if own_phis else shared_phis or 1,
        phi_ratio=options.phi_ratio,
        cosine_codes=options.cosine_codes,
    )


def vq_table(config: VQConfig) -> list[Link]:
    """Lists all tensors of the official `VQVAE` but its buffer."""
    last = len(config.multipliers) - 1
    links = [
        Link("quantize.embedding.weight", ("quantizer/codebook",)),
        *conv_links("quant_conv", "quant_conv"),
        *conv_links("post_quant_conv", "post_quant_conv"),
    ]
    phi_names = {0: "{}", 1: "qresi"}.get(config.phis, "qresi_ls.{}")
    for p in range(config.phis or len(config.scales)):
        name = f"quantize.quant_resi.{phi_names.format(p)}"
        links.append(Link(f"{name}.weight", ("quantizer/phi_kernel",), "conv", p))
        links.append(Link(f"{name}.bias", ("quantizer/phi_bias",), index=p))
    for half, way, blocks, resample in (
        ("encoder", "down", config.blocks, "downsample"),
        ("decoder", "up", config.blocks + 1, "upsample"),
    ):
        links += conv_links(f"{half}.conv_in", f"{half}/conv_in")
        links += conv_links(f"{half}.conv_out", f"{half}/conv_out")
        links += norm_links(f"{half}.norm_out", f"{half}/norm_out")
        width = config.width * (config.multipliers[-1] if half == "decoder" else 1)
        for j in (1, 2):
            links += _residual(f"{half}.mid.block_{j}", f"{half}/mid_block_{j}", shortcut=False)
        links += _attention(f"{half}.mid.attn_1", f"{half}/mid_attn_1")
        levels = list(enumerate(config.multipliers))
        for i, multiplier in levels if half == "encoder" else reversed(levels):
            for j in range(blocks):
                official, ours = f"{half}.{way}.{i}.block.{j}", f"{half}/{way}_{i}_block_{j}"
                links += _residual(official, ours, shortcut=width != config.width * multiplier)
                width = config.width * multiplier
                if i == last:
                    links += _attention(f"{half}.{way}.{i}.attn.{j}", f"{half}/{way}_{i}_attn_{j}")
            if i != (last if half == "encoder" else 0):
                official = f"{half}.{way}.{i}.{resample}.conv"
                links += conv_links(official, f"{half}/{way}_{i}_{resample}/conv")
    return links


def vq_buffers(config: VQConfig) -> dict[str, np.ndarray]:
    """Returns the buffer of a fresh official `VQVAE`."""
    return {HITS: np.zeros((len(config.pyramid), config.vocab), np.float32)}


def _residual(official: str, ours: str, shortcut: bool) -> Iterator[Link]:
    for j in (1, 2):
        yield from norm_links(f"{official}.norm{j}", f"{ours}/norm{j}")
        yield from conv_links(f"{official}.conv{j}", f"{ours}/conv{j}")
    if shortcut:
        yield from conv_links(f"{official}.nin_shortcut", f"{ours}/shortcut")


def _attention(official: str, ours: str) -> Iterator[Link]:
    yield from norm_links(f"{official}.norm", f"{ours}/norm")
    yield from conv_links(f"{official}.qkv", f"{ours}/qkv")
    yield from conv_links(f"{official}.proj_out", f"{ours}/proj")


VQ = NameMap(
    part="tokenizer",
    description="a tokenizer (VQVAE)",
    known_by="quantize.embedding.weight",
    config=VQConfig,
    infer=infer_vq,
    table=vq_table,
    buffers=vq_buffers,
    buffer_names=("ema_vocab_hit_SV",),
    trainer_key="vae_local",
    releases={"vae_ch160v4096z32": Release(REPO, {"tokenizer": TOKENIZER_FILE})},
)
