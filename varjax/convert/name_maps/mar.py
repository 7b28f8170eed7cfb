"""The official transformer (`MAR` of LTH14/mar) and ours."""

import math

from varjax.convert.name_maps.link import Link, linear_links, norm_links
from varjax.convert.name_maps.name_map import (
    ConvertOptions,
    NameMap,
    Tensors,
    count_numbers,
    tensor_shape,
)
from varjax.core.errors import InputError
from varjax.mar.model import DiffusionHead, MARConfig

HEADS = {768: 12, 1024: 16, 1280: 16}  # by width; else one for each 64 channels
MLP = "diffloss.net"


def infer_mar(tensors: Tensors, options: ConvertOptions) -> MARConfig:
    """Tells the transformer's sizes; raises InputError where the tensors contradict themselves."""
    classes, width = tensor_shape(tensors, "class_emb.weight", 2)
    _, places, _ = tensor_shape(tensors, "encoder_pos_embed_learned", 3)
    _, length, decoder_width = tensor_shape(tensors, "diffusion_pos_embed_learned", 3)
    if decoder_width != width:
        raise InputError(f"its encoder is {width} wide and its decoder {decoder_width}; must agree")
    _, token = tensor_shape(tensors, "z_proj.weight", 2)
    channels = options.latent_channels
    patch = math.isqrt(token // channels)
    if channels * patch**2 != token:
        raise InputError(
            f"a token has {token} numbers, which is no square of patches of {channels} channels"
        )
    side = math.isqrt(length)
    if side**2 != length:
        raise InputError(f"it has {length} tokens, which is no square")
    default = HEADS.get(width, max(width // 64, 1))
    encoder_heads, decoder_heads = options.mar_heads or (default, default)
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
        latent_map=(side * patch, side * patch),
        buffer=places - length,
    )


def mar_table(config: MARConfig) -> list[Link]:
    """Lists where each tensor's numbers are here."""
    assert isinstance(config.head, DiffusionHead)
    links = [
        Link("class_emb.weight", ("class_embed",)),
        Link("fake_latent", ("fake_latent",)),
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
        theirs, ours = f"{MLP}.res_blocks.{i}", "head/blocks"
        links += norm_links(f"{theirs}.in_ln", f"{ours}/norm", i)
        links += linear_links(f"{theirs}.mlp.0", f"{ours}/up", i)
        links += linear_links(f"{theirs}.mlp.2", f"{ours}/down", i)
        links += linear_links(f"{theirs}.adaLN_modulation.1", f"{ours}/adaln", i)
    return links


def _vit_block_links(theirs: str, ours: str, i: int) -> list[Link]:
    def qkv(leaf):
        return tuple(f"{ours}/attn/{name}/{leaf}" for name in "qkv")

    return [
        *norm_links(f"{theirs}.norm1", f"{ours}/norm1", i),
        Link(f"{theirs}.attn.qkv.weight", qkv("kernel"), "linear", i),
        Link(f"{theirs}.attn.qkv.bias", qkv("bias"), index=i),
        *linear_links(f"{theirs}.attn.proj", f"{ours}/attn/proj", i),
        *norm_links(f"{theirs}.norm2", f"{ours}/norm2", i),
        *linear_links(f"{theirs}.mlp.fc1", f"{ours}/mlp/up", i),
        *linear_links(f"{theirs}.mlp.fc2", f"{ours}/mlp/down", i),
    ]


MAR = NameMap(
    part="mar",
    flag="mar",
    description="a transformer (MAR)",
    known_by="diffloss.net.input_proj.weight",
    config=MARConfig,
    infer=infer_mar,
    table=mar_table,
)
