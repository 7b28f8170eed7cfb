"""Maps the official transformer (`VAR` of FoundationVision/VAR) to ours."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from varjax.convert.name_maps.name_map import (
    REFERENCE_256,
    REFERENCE_512,
    Link,
    NameMap,
    PublishedResult,
    Release,
    Tensors,
    count_numbers,
    linear_links,
    option,
    tensor_shape,
)
from varjax.convert.name_maps.vq import (
    COMMIT,
    REPO,
    TOKENIZER_FILE,
    TOKENIZER_SHA256,
    scales_option,
)
from varjax.errors import InputError
from varjax.storage.safetensors_io import LazyArray, Tensor
from varjax.storage.untrusted import shown
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.pyramid import SCALES_256, SCALES_512, SCALES_1024, Pyramid, Scale
from varjax.var.model import VARConfig, check_fit
from varjax.var.sample import VAROptions

HEAD_SIZE = 64  # in every official transformer
HEAD_SCALES = "blocks.0.attn.scale_mul_1H11"
# By depth, from the first version of arXiv 2404.02905; 256 pixels, but 512 for the last.
PUBLISHED_FID = {16: 3.55, 20: 2.95, 24: 2.33, 30: 1.97, 36: 2.63}

# Of the files at COMMIT, as recorded by public projects that downloaded them. The digest of
# var_d36.pth is not known.
SHA256 = {
    "var_d16.pth": "4f6151aad91c94e03e224dd7358d8389fa05301c0c291279566998efb54b0ecb",
    "var_d20.pth": "f7d232978e6fe82a4f2e0f5d82b012e01b1aa5abfe93ce2b56104ec0e878a10f",
    "var_d24.pth": "12c03619b2d3906ed19fe59539a90aadf60d72287dbaa31cf540435e76ddf789",
    "var_d30.pth": "7b11551dd4d794c7d6ed10b3d2822d42efe609a86128171b646e543dd2633b56",
}


@dataclasses.dataclass(frozen=True)
class VARConvertOptions:
    """Holds what the tensors of a `VAR` do not say.

    Attributes:
        scales: side length or (h, w) of each token map, coarse to fine. None for those in the
            tensors, else the official models'.
        heads: attention heads, if attention is not cosine. None for one for each 64 channels.
    """

    scales: tuple[Scale, ...] | None = scales_option()
    heads: int | None = option(
        None, "attention heads, if attention is not cosine (width / 64)", int
    )


def infer_var(tensors: Tensors, options: VARConvertOptions) -> VARConfig:
    """Infers the config of an official `VAR`.

    Raises InputError for tensors that are missing or contradict each other or `options`.
    """
    width, code_channels = tensor_shape(tensors, "word_embed.weight", 2)
    cosine = HEAD_SCALES in tensors
    heads = tensor_shape(tensors, HEAD_SCALES, 4)[1] if cosine else None
    if heads and options.heads not in (None, heads):
        raise InputError(f"heads={options.heads}, but the tensors have {heads}; omit --heads")
    heads = heads or options.heads or width // HEAD_SIZE
    if not heads or width % heads:
        raise InputError(f"the number of heads is unknown for width {width}; give --heads")
    return VARConfig(
        depth=count_numbers(tensors, r"blocks\.(\d+)\."),
        width=width,
        heads=heads,
        classes=tensor_shape(tensors, "class_emb.weight", 2)[0] - 1,
        scales=_infer_scales(tensors, options.scales),
        vocab=tensor_shape(tensors, "head.weight", 2)[0],
        code_channels=code_channels,
        shared_adaln="shared_ada_lin.1.weight" in tensors,
        cosine_attention=cosine,
    )


def var_table(config: VARConfig) -> list[Link]:
    """Lists all tensors of the official `VAR` except its buffers."""
    links = [
        Link("pos_start", ("pos_start",), ones=(0,)),
        Link("pos_1LC", ("pos_embed",), ones=(0,)),
        Link("class_emb.weight", ("class_embed",)),
        Link("lvl_embed.weight", ("level_embed",)),
        *linear_links("word_embed", "token_proj"),
        *linear_links("head_nm.ada_lin.1", "head_adaln"),
        *linear_links("head", "head"),
    ]
    if config.shared_adaln:
        links += linear_links("shared_ada_lin.1", "shared_adaln")
    for i in range(config.depth):
        official, ours = f"blocks.{i}", "blocks"
        qkv = tuple(f"{ours}/attn/{name}/kernel" for name in "qkv")
        links.append(Link(f"{official}.attn.mat_qkv.weight", qkv, "linear", i))
        for name in "qv":
            links.append(
                Link(f"{official}.attn.{name}_bias", (f"{ours}/attn/{name}/bias",), index=i)
            )
        if config.cosine_attention:
            scale = f"{ours}/attn/log_scale"
            links.append(Link(f"{official}.attn.scale_mul_1H11", (scale,), index=i, ones=(0, 2, 3)))
        links += linear_links(f"{official}.attn.proj", f"{ours}/attn/proj", i)
        links += linear_links(f"{official}.ffn.fc1", f"{ours}/mlp/up", i)
        links += linear_links(f"{official}.ffn.fc2", f"{ours}/mlp/down", i)
        if config.shared_adaln:
            table = f"{ours}/adaln/table"
            links.append(Link(f"{official}.ada_gss", (table,), index=i, ones=(0, 1)))
        else:
            links += linear_links(f"{official}.ada_lin.1", f"{ours}/adaln/linear", i)
    return links


def var_buffers(config: VARConfig) -> dict[str, Tensor]:
    """Returns the buffers of an official `VAR` of these sizes."""
    level_L, length = config.pyramid.level_L, config.pyramid.length

    def bias_rows() -> Iterator[np.ndarray]:  # row by row, because the whole matrix is large
        for level in level_L:
            yield np.where(level >= level_L, np.float32(0), np.float32(-np.inf))

    zeros = {
        f"blocks.{i}.attn.zero_k_bias": np.zeros(config.width, np.float32)
        for i in range(config.depth)
    }
    return {
        "lvl_1L": level_L[None].astype(np.int64),
        "attn_bias_for_masking": LazyArray((1, 1, length, length), np.dtype(np.float32), bias_rows),
        **zeros,
    }


def _infer_scales(tensors: Tensors, chosen: tuple[Scale, ...] | None) -> tuple[Scale, ...]:
    _, length, _ = tensor_shape(tensors, "pos_1LC", 3)
    count, _ = tensor_shape(tensors, "lvl_embed.weight", 2)
    if "lvl_1L" in tensors:
        counts = _tokens_per_level(tensors["lvl_1L"], count, length)
        sides = tuple(math.isqrt(n) for n in counts)
        if chosen is None and [side**2 for side in sides] != counts:
            raise InputError(f"its scales of {shown(counts)} tokens are not square; give --scales")
        if chosen and list(Pyramid(chosen).lengths) != counts:
            raise InputError(f"scales are {chosen}, but its scales have {shown(counts)} tokens")
        return chosen or sides
    for scales in [chosen] if chosen else [SCALES_256, SCALES_512, SCALES_1024]:
        pyramid = Pyramid(scales)
        if (len(pyramid), pyramid.length) == (count, length):
            return scales
    raise InputError(
        f"it has {count} scales with {length} tokens in total, "
        + (f"which does not match {chosen}; " if chosen else "and no lvl_1L with their sizes; ")
        + "give the right --scales"
    )


def _tokens_per_level(level_1L: np.ndarray, count: int, length: int) -> list[int]:
    """Counts the tokens of each of `count` levels; raises InputError unless they fit `length`."""
    if level_1L.shape != (1, length) or np.iscomplexobj(level_1L):
        raise InputError(
            f"lvl_1L is {level_1L.dtype} {shown(level_1L.shape)}; expected integers (1, {length})"
        )
    level_L = level_1L[0].astype(np.float64)  # files in half precision may hold any number
    if not (level_L.min() >= 0 and level_L.max() < count):
        raise InputError(
            f"lvl_1L holds levels from {level_L.min():g} to {level_L.max():g}; there are {count}"
        )
    return np.bincount(level_L.astype(np.int64)).tolist()


def _release(depth: int, fid: float) -> Release:
    config = VARConfig.preset(f"d{depth}")
    options = VAROptions(guidance=2.5, top_k=900, top_p=0.96)
    references = REFERENCE_256 if config.scales == SCALES_256 else REFERENCE_512
    return Release(
        REPO,
        {"tokenizer": TOKENIZER_FILE, "var": f"var_d{depth}.pth"},
        COMMIT,
        TOKENIZER_SHA256 | SHA256,
        config=config,
        results=(PublishedResult({"fid": fid}, options, references),),
    )


VAR_MAP = NameMap(
    part="var",
    flag="var",
    description="a transformer (VAR)",
    known_by="word_embed.weight",
    config=VARConfig,
    options=VARConvertOptions,
    infer=infer_var,
    table=var_table,
    buffers=var_buffers,
    buffer_names=("lvl_1L", "attn_bias_for_masking", "zero_k_bias"),
    trainer_key="var_wo_ddp",
    tokenizer_options=lambda config, options: {"scales": config.scales},
    reads=VQConfig,
    check_fit=check_fit,
    sampling=lambda config: VAROptions(),
    releases={f"var_d{depth}": _release(depth, fid) for depth, fid in PUBLISHED_FID.items()},
    size_fields=("width", "classes", "depth", "scales"),
)
