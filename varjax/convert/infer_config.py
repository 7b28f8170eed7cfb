"""What an official model is, worked out from the shapes of its tensors."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from varjax.core.errors import InputError
from varjax.tokenizers.vq.model import TokenizerConfig
from varjax.tokenizers.vq.pyramid import SCALES_256, SCALES_512, SCALES_1024, Pyramid, Scale
from varjax.var.model import VARConfig

HEAD_SIZE = 64  # of every official transformer
KNOWN_BY = {"tokenizer": "quantize.embedding.weight", "var": "word_embed.weight"}
CALLED = {"tokenizer": "a tokenizer (VQVAE)", "var": "a transformer (VAR)"}
Tensors = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Choices:
    """What tensors cannot tell. None stands for what they do tell, else for the official models'.

    scales: side length or (h, w) of each token map. heads: of attention without cosine.
    groups: of the tokenizer's group norms. phi_ratio: weight of φ's convolution.
    cosine_codes: look up codes by angle instead of by distance.
    """

    scales: tuple[Scale, ...] | None = None
    heads: int | None = None
    groups: int = 32
    phi_ratio: float = 0.5
    cosine_codes: bool = False


def check_kind(tensors: Tensors, kind: str) -> None:
    """Raises InputError if the tensors are not those of `kind`, "tokenizer" or "var"."""
    found = [other for other, name in KNOWN_BY.items() if name in tensors]
    if found and kind not in found:
        raise InputError(
            f"holds {CALLED[found[0]]}, not {CALLED[kind]}; give it as --{found[0]} instead"
        )
    if not found:
        raise InputError(
            f"holds neither {CALLED['tokenizer']} nor {CALLED['var']}: among its {len(tensors)} "
            f"tensors is neither {' nor '.join(KNOWN_BY.values())}"
        )


def infer_tokenizer(tensors: Tensors, choices: Choices) -> TokenizerConfig:
    """The config of an official `VQVAE`.

    Its tensors do not hold the scales, at most their number. Raises InputError for what is missing
    or contradicts itself.
    """
    check_kind(tensors, "tokenizer")
    vocab, code_channels = _shape(tensors, "quantize.embedding.weight", 2)
    width, image_channels, *_ = _shape(tensors, "encoder.conv_in.weight", 4)
    levels = _numbers(tensors, r"encoder\.down\.(\d+)\.")
    outputs = [_shape(tensors, f"encoder.down.{i}.block.0.conv1.weight", 4)[0] for i in levels]
    if odd := [n for n in outputs if n % width]:
        raise InputError(f"the encoder's levels have {odd} channels, no multiples of {width}")
    own_phis = len(_numbers(tensors, r"quantize\.quant_resi\.(\d+)\.weight"))
    shared_phis = len(_numbers(tensors, r"quantize\.quant_resi\.qresi_ls\.(\d+)\.weight"))
    scales = choices.scales or SCALES_256
    hits = tensors.get("quantize.ema_vocab_hit_SV")
    for count in (own_phis, 0 if hits is None else len(hits)):
        if count not in (0, len(scales)):
            raise InputError(
                f"the tokenizer has {count} scales, but the transformer, or --scales, or without "
                f"both the official 256 px model has {len(scales)}: {scales}"
            )
    return TokenizerConfig(
        scales=scales,
        image_channels=image_channels,
        width=width,
        multipliers=tuple(n // width for n in outputs),
        blocks=len(_numbers(tensors, r"encoder\.down\.0\.block\.(\d+)\.")),
        groups=choices.groups,
        vocab=vocab,
        code_channels=code_channels,
        phis=0 if own_phis else shared_phis or 1,
        phi_ratio=choices.phi_ratio,
        cosine_codes=choices.cosine_codes,
    )


def infer_var(tensors: Tensors, choices: Choices) -> VARConfig:
    """The config of an official `VAR`; ValueError for what is missing or contradicts itself."""
    check_kind(tensors, "var")
    width, code_channels = _shape(tensors, "word_embed.weight", 2)
    scale_mul = tensors.get("blocks.0.attn.scale_mul_1H11")
    heads = None if scale_mul is None else scale_mul.size
    if heads and choices.heads not in (None, heads):
        raise InputError(f"heads={choices.heads}, but the tensors have {heads}; leave --heads out")
    heads = heads or choices.heads or width // HEAD_SIZE
    if not heads or width % heads:
        raise InputError(f"a width of {width} does not tell the number of heads; give --heads")
    return VARConfig(
        depth=len(_numbers(tensors, r"blocks\.(\d+)\.")),
        width=width,
        heads=heads,
        classes=_shape(tensors, "class_emb.weight", 2)[0] - 1,
        scales=_scales(tensors, choices.scales),
        vocab=_shape(tensors, "head.weight", 2)[0],
        code_channels=code_channels,
        shared_adaln="shared_ada_lin.1.weight" in tensors,
        cosine_attention=scale_mul is not None,
    )


def _scales(tensors: Tensors, chosen: tuple[Scale, ...] | None) -> tuple[Scale, ...]:
    _, length, _ = _shape(tensors, "pos_1LC", 3)
    count, _ = _shape(tensors, "lvl_embed.weight", 2)
    level_1L = tensors.get("lvl_1L")
    if level_1L is not None:
        counts = np.bincount(np.asarray(level_1L, np.int64).ravel()).tolist()
        found = tuple(math.isqrt(n) for n in counts)
        if chosen is None and [side**2 for side in found] != counts:
            raise InputError(f"its scales of {counts} tokens are not square; give --scales")
        if chosen and list(Pyramid(chosen).lengths) != counts:
            raise InputError(f"scales are {chosen}, but its scales have {counts} tokens")
        return chosen or found
    for scales in [chosen] if chosen else [SCALES_256, SCALES_512, SCALES_1024]:
        pyramid = Pyramid(scales)
        if (len(pyramid), pyramid.length) == (count, length):
            return scales
    raise InputError(
        f"it has {count} scales of {length} tokens together, "
        + (f"which is not {chosen}; " if chosen else "and no lvl_1L to tell their sizes; ")
        + "give the right --scales"
    )


def _shape(tensors: Tensors, name: str, ndim: int) -> tuple[int, ...]:
    if name not in tensors:
        raise InputError(f"{name} is missing, so the model's sizes cannot be told")
    shape = tuple(tensors[name].shape)
    if len(shape) != ndim:
        raise InputError(f"{name} has shape {shape}, but must have {ndim} dimensions")
    return shape


def _numbers(names: Iterable[str], pattern: str) -> range:
    """0 … n-1 for the n numbers that the pattern's group takes at the start of names."""
    return range(len({match[1] for name in names if (match := re.match(pattern, name))}))
