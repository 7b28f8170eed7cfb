"""Maps the official transformer (`MAR` of LTH14/mar) to ours."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from varjax.convert.name_maps.kl import (
    KL16,
    MAR_COMMIT,
    MAR_PAGE,
    MAR_REPO,
    image_size_option,
)
from varjax.convert.name_maps.name_map import (
    Link,
    NameMap,
    Tensors,
    count_numbers,
    field_differences,
    linear_links,
    norm_links,
    option,
    scale_differences,
    tensor_shape,
)
from varjax.convert.name_maps.release import PublishedFile, PublishedResult, Release
from varjax.errors import InputError, check_setting
from varjax.mar.heads import DiffusionHead
from varjax.mar.latents import check_latents_fit
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions
from varjax.tokenizers.kl.model import KLConfig

HEADS = {768: 12, 1024: 16, 1280: 16}  # of the official models, by width
HEAD_SIZE = 64  # of other models
PUBLISHED_STEPS = 256  # of all published results; 64 steps already give good samples
GUIDANCE = {768: 2.9, 1024: 3.0, 1280: 3.2}  # of the published results, by width
LATENT_CHANNELS = KLConfig.latent_channels  # of every official model
CHECKPOINT = "checkpoint-last.pth"
MAR_B = PublishedFile(
    CHECKPOINT,
    MAR_REPO,
    MAR_COMMIT,
    sha256="7e970a33bc90353e2fabe3498ed1f2d194dd8d17cd387665f80b2984dfca538c",
)
MLP = "diffloss.net"


def parse_heads(text: str) -> tuple[int, int]:
    """Parses "12,16" into (12, 16); raises ValueError."""
    encoder, decoder = map(int, text.split(","))
    return encoder, decoder


@dataclasses.dataclass(frozen=True)
class MARConvertOptions:
    """Holds the settings that the tensors of a `MAR` do not determine.

    Attributes:
        image_size: pixels of both sides, or (height, width). None for square images.
        latent_channels: channels of the KL tokenizer, which determine the patch size. None for
            those in the tokenizer's file if it is given, otherwise 16.
        mar_heads: attention heads of encoder and decoder. None for those of the official model of
            that width, otherwise one for each 64 channels.
        downsampling: pixels per latent along one side, from the tokenizer's file if it is given.
    """

    image_size: int | tuple[int, int] | None = image_size_option()
    latent_channels: int | None = option(
        None, "channels of MAR's KL tokenizer (the file's, else 16)", int
    )
    mar_heads: tuple[int, int] | None = option(
        None,
        "attention heads of a MAR's encoder and decoder, like 12,12",
        parse_heads,
        "the encoder's and decoder's, 12,12",
    )
    downsampling: int = 16


def infer_mar(tensors: Tensors, options: MARConvertOptions) -> MARConfig:
    """Infers the config of an official `MAR`.

    Raises InputError for tensors that are missing or contradict each other or `options`.
    """
    classes, width = tensor_shape(tensors, "class_emb.weight", 2)
    _, positions, _ = tensor_shape(tensors, "encoder_pos_embed_learned", 3)
    _, length, decoder_width = tensor_shape(tensors, "diffusion_pos_embed_learned", 3)
    _, token = tensor_shape(tensors, "z_proj.weight", 2)
    channels = LATENT_CHANNELS if options.latent_channels is None else options.latent_channels
    check_setting("latent_channels", channels, channels >= 1, "1 or more")
    patch = math.isqrt(token // channels)
    if not patch or channels * patch**2 != token:
        raise InputError(
            f"a token has {token} numbers, which is not a square patch of latents of {channels} "
            "channels; give its KL tokenizer as --kl, or --latent_channels"
        )
    encoder_heads, decoder_heads = options.mar_heads or map(_heads, (width, decoder_width))
    return MARConfig(
        width=width,
        encoder_depth=count_numbers(tensors, r"encoder_blocks\.(\d+)\."),
        decoder_depth=count_numbers(tensors, r"decoder_blocks\.(\d+)\."),
        encoder_heads=encoder_heads,
        decoder_heads=decoder_heads,
        head=DiffusionHead(
            channels=channels,
            patch=patch,
            depth=count_numbers(tensors, rf"{MLP}\.res_blocks\.(\d+)\."),
            width=tensor_shape(tensors, f"{MLP}.input_proj.weight", 2)[0],
        ),
        classes=classes,
        latent_map=_infer_latent_map(length, patch, options),
        buffer_size=positions - length,
        decoder_width=None if decoder_width == width else decoder_width,
    )


def mar_table(config: MARConfig) -> list[Link]:
    """Lists all tensors of the official `MAR`.

    Raises InputError for variants that the official code does not have.
    """
    if config.causal or not isinstance(config.head, DiffusionHead):
        raise InputError(
            f"a MAR with causal={config.causal} and a {type(config.head).__name__} has no official "
            "counterpart; only causal=False with a DiffusionHead has one"
        )
    links = [
        Link("class_emb.weight", ("class_embed",)),
        Link("fake_latent", ("no_class_embed",)),
        Link("mask_token", ("mask_token",), ones=(0, 1)),
        *linear_links("z_proj", "z_proj"),
        *norm_links("z_proj_ln", "z_proj_norm"),
        *linear_links("decoder_embed", "decoder_embed"),
        *linear_links(f"{MLP}.time_embed.mlp.0", "head/time_embed/up"),
        *linear_links(f"{MLP}.time_embed.mlp.2", "head/time_embed/down"),
        *linear_links(f"{MLP}.cond_embed", "head/cond_embed"),
        *linear_links(f"{MLP}.input_proj", "head/input_proj"),
        *linear_links(f"{MLP}.final_layer.adaLN_modulation.1", "head/adaln"),
        *linear_links(f"{MLP}.final_layer.linear", "head/out"),
    ]
    for part in ("encoder", "decoder", "diffusion"):
        links.append(Link(f"{part}_pos_embed_learned", (f"{part}_pos_embed",), ones=(0,)))
    for part, depth in (("encoder", config.encoder_depth), ("decoder", config.decoder_depth)):
        links += norm_links(f"{part}_norm", f"{part}_norm")
        for i in range(depth):
            links += _vit_block_links(f"{part}_blocks.{i}", f"{part}_blocks", i)
    for i in range(config.head.depth):
        official, ours = f"{MLP}.res_blocks.{i}", "head/blocks"
        links += norm_links(f"{official}.in_ln", f"{ours}/norm", i)
        links += linear_links(f"{official}.mlp.0", f"{ours}/up", i)
        links += linear_links(f"{official}.mlp.2", f"{ours}/down", i)
        links += linear_links(f"{official}.adaLN_modulation.1", f"{ours}/adaln", i)
    return links


def _vit_block_links(official: str, ours: str, i: int) -> list[Link]:
    def qkv(leaf):
        return tuple(f"{ours}/attn/{name}/{leaf}" for name in "qkv")

    return [
        *norm_links(f"{official}.norm1", f"{ours}/norm1", i),
        Link(f"{official}.attn.qkv.weight", qkv("kernel"), "linear", i),
        Link(f"{official}.attn.qkv.bias", qkv("bias"), index=i),
        *linear_links(f"{official}.attn.proj", f"{ours}/attn/proj", i),
        *norm_links(f"{official}.norm2", f"{ours}/norm2", i),
        *linear_links(f"{official}.mlp.fc1", f"{ours}/mlp/up", i),
        *linear_links(f"{official}.mlp.fc2", f"{ours}/mlp/down", i),
    ]


def mar_tokenizer_options(config: MARConfig, options: MARConvertOptions) -> dict[str, Any]:
    """Returns options for the tokenizer: the size of images, which its file does not contain."""
    H, W = (side * options.downsampling for side in config.latent_map)
    return {"image_size": options.image_size or (H if H == W else (H, W))}


def mar_option_values(config: MARConfig) -> dict[str, Any]:
    """Returns the values of the options that a config determines."""
    heads = {"mar_heads": (config.encoder_heads, config.decoder_heads)}
    if not isinstance(config.head, DiffusionHead):  # another `mar_table` refuses
        return heads
    return heads | {"latent_channels": config.head.channels}


def mar_differences(config: MARConfig) -> list[str]:
    """Lists the settings that differ from the official `MAR`: random orders, and square maps."""
    fields = field_differences(config, {"order": MARConfig.order})
    return fields + scale_differences([config.latent_map])


def mar_sampling(config: MARConfig) -> MAROptions:
    """Returns the guidance of the published results, and at most as many steps as tokens."""
    default = MAROptions()
    return MAROptions(
        guidance=GUIDANCE.get(config.width, default.guidance),
        steps=min(default.steps, config.length),
    )


def _heads(width: int) -> int:
    if (heads := HEADS.get(width)) is None and width % HEAD_SIZE:
        raise InputError(f"the number of heads is unknown for width {width}; give --mar_heads")
    return heads or width // HEAD_SIZE


def _infer_latent_map(length: int, patch: int, options: MARConvertOptions) -> tuple[int, int]:
    size, token_pixels = options.image_size, patch * options.downsampling
    if size is None:
        side = math.isqrt(length)
        if side**2 != length:
            raise InputError(f"its {length} tokens do not form a square; give --image_size=HxW")
        return side * patch, side * patch
    H, W = (size, size) if isinstance(size, int) else size
    h, w = H // token_pixels, W // token_pixels
    if min(H, W) < 1 or (h * token_pixels, w * token_pixels, h * w) != (H, W, length):
        raise InputError(
            f"image_size={H}x{W}: the transformer has {length} tokens of "
            f"{token_pixels}x{token_pixels} pixels, which do not form such an image"
        )
    return h * patch, w * patch


def _release(size: str, guided: Mapping[str, float], unguided_fid: float) -> Release:
    config = MARConfig.preset(f"mar_{size}")
    # No hub has the EMA weights of the larger models, and their digests are not known.
    file = MAR_B if size == "b" else PublishedFile(CHECKPOINT)
    page = f"{MAR_PAGE} (the links of MAR-{size.upper()} and KL-16)"
    guidance = MAROptions(guidance=GUIDANCE[config.width], steps=PUBLISHED_STEPS)
    no_guidance = MAROptions(guidance=1.0, temperature=0.95, steps=PUBLISHED_STEPS)
    return Release(
        {"mar": file, "kl": KL16},
        license="MIT",
        page=page,
        config=config,
        results=(
            PublishedResult(guided, guidance),
            PublishedResult({"fid": unguided_fid}, no_guidance),
        ),
        evaluation_options={"steps": PUBLISHED_STEPS},
    )


MAR_MAP = NameMap(
    part="mar",
    flag="mar",
    description="a transformer (MAR)",
    known_by="diffloss.net.input_proj.weight",
    config=MARConfig,
    options=MARConvertOptions,
    infer=infer_mar,
    table=mar_table,
    official_differences=mar_differences,
    option_values=mar_option_values,
    tokenizer_options=mar_tokenizer_options,
    sampling=mar_sampling,
    reads=KLConfig,
    check_fit=check_latents_fit,
    releases={  # with arXiv 2406.11838's results, with and without guidance
        "mar_b": _release("b", {"fid": 2.31, "inception_score": 281.7}, 3.48),
        "mar_l": _release("l", {"fid": 1.78, "inception_score": 296.0}, 2.60),
        "mar_h": _release("h", {"fid": 1.55, "inception_score": 303.7}, 2.35),
    },
    size_fields=("width", "classes", "encoder_depth", "head", "latent_map"),
)
