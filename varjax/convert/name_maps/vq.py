"""Maps the official multi-scale VQ tokenizer (`VQVAE` of FoundationVision/VAR) to ours."""

import dataclasses
from typing import Any

import numpy as np

from varjax.convert.name_maps.autoencoder import (
    autoencoder_links,
    groups_option,
    infer_autoencoder,
)
from varjax.convert.name_maps.name_map import (
    Link,
    NameMap,
    Tensors,
    conv_links,
    count_numbers,
    field_differences,
    fields_of,
    option,
    parse_side,
    scale_differences,
    tensor_shape,
)
from varjax.convert.name_maps.release import PublishedFile, Release
from varjax.errors import InputError
from varjax.nn.autoencoder import COARSEST
from varjax.storage.safetensors_io import Tensor
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.pyramid import SCALES_256, Scale

REPO, COMMIT = "FoundationVision/var", "6d0ee6598a42f75079aa79e58b012b57b284c91b"
TOKENIZER = PublishedFile(
    "vae_ch160v4096z32.pth",
    REPO,
    COMMIT,
    # From the Git LFS pointer at that commit.
    sha256="7c3ec27ae28a3f87055e83211ea8cc8558bd1985d7b51742d074fb4c2fcf186c",
)
OFFICIAL_SIZES = ("image_channels", "channel_mult", "blocks")  # that its code fixes
HITS = "quantize.ema_vocab_hit_SV"  # the buffer: how often each scale used each code


def parse_scales(text: str) -> tuple[Scale, ...]:
    """Parses "1,2,2x4" into (1, 2, (2, 4)); raises ValueError."""
    return tuple(parse_side(part) for part in text.split(","))


def scales_option() -> Any:
    """Makes the option `scales`, which the transformer has too."""
    about = "side lengths of token maps: 1,2,3 or 1x1,2x4 (the file's, else those of 256 px)"
    return option(None, about, parse_scales, "side lengths like 1,2,4 or 1x1,2x4")


@dataclasses.dataclass(frozen=True)
class VQConvertOptions:
    """Holds the settings that the tensors of a `VQVAE` do not determine.

    Attributes:
        scales: side length or (h, w) of each token map, coarse to fine. None for the transformer's,
            otherwise those of 256 pixels.
        groups: number of groups in each group norm. None for 32.
        phi_ratio: weight in [0, 1] of the φ convolutions against the identity.
        cosine_codes: whether codes are looked up by angle instead of by distance.
    """

    scales: tuple[Scale, ...] | None = scales_option()
    groups: int | None = groups_option()
    phi_ratio: float = option(0.5, "weight of the φ convolutions (0.5)", float)
    cosine_codes: bool = option(False, "look up codes by angle")


def infer_vq(tensors: Tensors, options: VQConvertOptions) -> VQConfig:
    """Infers the config of an official `VQVAE`; the options supply the scales.

    Raises InputError for tensors that are missing or contradict each other.
    """
    vocab, code_channels = tensor_shape(tensors, "quantize.embedding.weight", 2)
    own_phis = count_numbers(tensors, r"quantize\.quant_resi\.(\d+)\.weight")
    shared_phis = count_numbers(tensors, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight")
    scales = options.scales or SCALES_256
    for count in (own_phis, tensor_shape(tensors, HITS, 2)[0] if HITS in tensors else 0):
        if count not in (0, len(scales)):
            raise InputError(
                f"the tokenizer has {count} scales, but the transformer or --scales (by default "
                f"the official 256 px model) has {len(scales)}: {scales}"
            )
    return VQConfig(
        scales=scales,
        groups=VQConfig.groups if options.groups is None else options.groups,
        vocab=vocab,
        code_channels=code_channels,
        num_phi=0 if own_phis else shared_phis or 1,
        phi_ratio=options.phi_ratio,
        cosine_codes=options.cosine_codes,
        **infer_autoencoder(tensors),
    )


def vq_table(config: VQConfig) -> list[Link]:
    """Lists all tensors of the official `VQVAE` except its buffer."""
    links = [
        Link("quantize.embedding.weight", ("quantizer/codebook",)),
        *conv_links("quant_conv", "quant_conv"),
        *conv_links("post_quant_conv", "post_quant_conv"),
    ]
    phi_names = {0: "{}", 1: "qresi"}.get(config.num_phi, "qresi_ls.{}")
    for p in range(config.num_phi or len(config.scales)):
        name = f"quantize.quant_resi.{phi_names.format(p)}"
        links.append(Link(f"{name}.weight", ("quantizer/phi_kernel",), "conv", p))
        links.append(Link(f"{name}.bias", ("quantizer/phi_bias",), index=p))
    links += autoencoder_links(config, False, COARSEST, COARSEST)
    return links


def vq_differences(config: VQConfig) -> list[str]:
    """Lists the settings that differ from the official `VQVAE` or its arguments' defaults."""
    written = {name: getattr(VQConfig, name) for name in ("groups", *OFFICIAL_SIZES)}
    arguments = {"phi_ratio": "quant_resi", "cosine_codes": "using_znorm"}
    given = [
        f"{text} (its argument {argument})"
        for name, argument in arguments.items()
        for text in field_differences(config, {name: getattr(VQConfig, name)})
    ]
    return field_differences(config, written) + given + scale_differences(config.scales)


def vq_buffers(config: VQConfig) -> dict[str, Tensor]:
    """Returns the buffer of a newly built official `VQVAE`."""
    return {HITS: np.zeros((len(config.pyramid), config.vocab), np.float32)}


VQ_MAP = NameMap(
    part="tokenizer",
    flag="tokenizer",
    description="a tokenizer (VQVAE)",
    known_by="quantize.embedding.weight",
    config=VQConfig,
    options=VQConvertOptions,
    infer=infer_vq,
    table=vq_table,
    buffers=vq_buffers,
    buffer_names=("ema_vocab_hit_SV",),
    official_differences=vq_differences,
    option_values=fields_of("scales", "groups", "phi_ratio", "cosine_codes"),
    trainer_key="vae_local",
    releases={"vae_ch160v4096z32": Release({"tokenizer": TOKENIZER}, license="MIT")},
)
