"""Maps the official transformer (`VAR` of FoundationVision/VAR) to ours; names its releases."""

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from varjax.convert.name_maps.name_map import (
    Link,
    NameMap,
    Tensors,
    count_numbers,
    fields_of,
    linear_links,
    option,
    scale_differences,
    tensor_shape,
)
from varjax.convert.name_maps.release import (
    REFERENCE_256,
    REFERENCE_512,
    PublishedFile,
    PublishedResult,
    Release,
)
from varjax.convert.name_maps.vq import COMMIT, REPO, TOKENIZER, scales_option
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
FID = {16: 3.55, 20: 2.95, 24: 2.33, 30: 1.97, 36: 2.63}
# SHA-256 of the files at COMMIT, as recorded by public projects that downloaded them. The one of
# var_d36.pth is not known.
SHA256 = {
    16: "4f6151aad91c94e03e224dd7358d8389fa05301c0c291279566998efb54b0ecb",
    20: "f7d232978e6fe82a4f2e0f5d82b012e01b1aa5abfe93ce2b56104ec0e878a10f",
    24: "12c03619b2d3906ed19fe59539a90aadf60d72287dbaa31cf540435e76ddf789",
    30: "7b11551dd4d794c7d6ed10b3d2822d42efe609a86128171b646e543dd2633b56",
}

# CCA (arXiv 2410.09347, table 2): sampled without guidance. No commit is known.
CCA_REPO = "ChenDRAG/CCA_VAR"
CCA_RESULTS = {
    16: {"fid": 4.03, "inception_score": 271.1},
    20: {"fid": 3.02, "inception_score": 282.6},
    24: {"fid": 2.63, "inception_score": 298.8},
    30: {"fid": 2.54, "inception_score": 264.2},
}

# DDO (arXiv 2503.01103): FID without and with guidance. The commit is the one that a public project
# (fixed-reference estimates of FID) pinned for its downloads.
DDO_REPO = "nvidia/DirectDiscriminativeOptimization"
DDO_COMMIT = "49257a0ed81726645e274e2fd5ac8e38a3ca7826"
DDO_FID = {16: (3.12, 2.54), 30: (1.79, 1.73)}
# The README calls 1.0 "guidance-free" and 1.4 the best, but the script passes the number to VAR's
# `cfg`, where 0 is off. By the script, 1.0 would be a guidance of 2 here.
DDO_CAVEAT = "the meaning of the authors' guidance values is uncertain (docs/convert.md)"

# CoDe (arXiv 2411.17787): fine-tuned pairs by the number of drafted scales. No commit is known.
CODE_REPO = "Zigeng/VAR_CoDe"
CODE_RESULTS = {
    6: {"fid": 2.27, "inception_score": 297.0, "precision": 0.82, "recall": 0.58},
    7: {"fid": 2.11, "inception_score": 303.0, "precision": 0.82, "recall": 0.59},
    8: {"fid": 1.98, "inception_score": 302.0, "precision": 0.81, "recall": 0.60},
    9: {"fid": 1.94, "inception_score": 296.0, "precision": 0.80, "recall": 0.61},
}
CODE_OPTIONS = VAROptions(guidance=2.5, top_k=600, top_p=0.96, temperature=(1.1,) * 7 + (1.0,) * 3)


@dataclasses.dataclass(frozen=True)
class VARConvertOptions:
    """Holds the settings that the tensors of a `VAR` do not determine.

    Attributes:
        scales: side length or (h, w) of each token map, coarse to fine. None for those in the
            tensors, otherwise those of the official models.
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


def _official(depth: int) -> Release:
    config = VARConfig.preset(f"d{depth}")
    references = REFERENCE_256 if config.scales == SCALES_256 else REFERENCE_512
    options = VAROptions(guidance=2.5, top_k=900, top_p=0.96)
    file = PublishedFile(f"var_d{depth}.pth", REPO, COMMIT, SHA256.get(depth))
    return Release(
        {"tokenizer": TOKENIZER, "var": file},
        license="MIT",
        config=config,
        results=(PublishedResult({"fid": FID[depth]}, options, references),),
    )


def _fine_tuned(
    depth: int,
    file: PublishedFile,
    license: str,
    sampling: VAROptions,
    *results: PublishedResult,
) -> Release:
    return Release(
        {"tokenizer": TOKENIZER, "var": file},
        license=license,
        config=VARConfig.preset(f"d{depth}"),
        results=results,
        sampling=sampling,
    )


def _cca(depth: int) -> Release:
    file = PublishedFile(f"CCA_VAR_Guidance_Free/VAR_d{depth}_CCA.pth", CCA_REPO)
    options = VAROptions(guidance=1.0, top_k=900, top_p=0.96)
    return _fine_tuned(depth, file, "MIT", options, PublishedResult(CCA_RESULTS[depth], options))


def _ddo(depth: int) -> Release:
    file = PublishedFile(f"var_d{depth}-ddo.pth", DDO_REPO, DDO_COMMIT)
    options = [VAROptions(guidance=guidance, top_k=0, top_p=0.0) for guidance in (1.0, 1.4)]
    results = [
        PublishedResult({"fid": fid}, chosen, caveat=DDO_CAVEAT)
        for fid, chosen in zip(DDO_FID[depth], options, strict=True)
    ]
    license = "CC BY-NC-SA 4.0 (non-commercial)"
    return _fine_tuned(depth, file, license, options[0], *results)


def _drafter(scales: int) -> Release:
    refiner = f"var_d16_code_refiner_{scales}"
    caveat = f"published together with --refiner={refiner} --draft_scales={scales}"
    result = PublishedResult(CODE_RESULTS[scales], CODE_OPTIONS, caveat=caveat)
    file = PublishedFile(f"drafter_{scales}.pth", CODE_REPO)
    return _fine_tuned(30, file, "MIT", CODE_OPTIONS, result)


def _refiner(scales: int) -> Release:
    file = PublishedFile(f"refiner_{scales}.pth", CODE_REPO)
    return _fine_tuned(16, file, "MIT", CODE_OPTIONS)


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
    official_differences=lambda config: scale_differences(config.scales),
    option_values=fields_of("scales", "heads"),
    trainer_key="var_wo_ddp",
    tokenizer_options=lambda config, options: {"scales": config.scales},
    reads=VQConfig,
    check_fit=check_fit,
    sampling=lambda config: VAROptions(),
    releases={
        # The authors' models come first: other weights are compared with the first of equal sizes.
        **{f"var_d{depth}": _official(depth) for depth in FID},
        **{f"var_d{depth}_cca": _cca(depth) for depth in CCA_RESULTS},
        **{f"var_d{depth}_ddo": _ddo(depth) for depth in DDO_FID},
        **{f"var_d30_code_drafter_{scales}": _drafter(scales) for scales in CODE_RESULTS},
        **{f"var_d16_code_refiner_{scales}": _refiner(scales) for scales in CODE_RESULTS},
    },
    size_fields=("width", "classes", "depth", "scales"),
)
