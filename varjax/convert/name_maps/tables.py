"""Official PyTorch names and layouts <-> ours: a table per model that accounts for every tensor.

A table lists each official tensor once and says where it goes. Reading it forwards converts
official weights, backwards exports ours; neither direction has names of its own.
"""

import dataclasses
from collections.abc import Iterator
from typing import Literal

import numpy as np

from varjax.tokenizers.vq.model import TokenizerConfig
from varjax.var.model import VARConfig


@dataclasses.dataclass(frozen=True)
class Link:
    """One official tensor and the leaves that hold its numbers.

    ours: paths of the leaves; several share the tensor in equal parts of its first axis.
    layout: "linear" (out, in) <-> (in, out); "conv" OIHW <-> HWIO; "plain" the same but axes of 1.
    index: position along the leaf's leading (stacked) axis, or None.
    ones: for "plain", where the official shape has axes of length 1.
    """

    official: str
    ours: tuple[str, ...]
    layout: Literal["plain", "linear", "conv"] = "plain"
    index: int | None = None
    ones: tuple[int, ...] = ()

    def forward(self, tensor: np.ndarray, path: str) -> np.ndarray:
        """The official tensor's numbers for the leaf at `path`, one of `ours`: a view."""
        part = np.split(tensor, len(self.ours))[self.ours.index(path)]
        return self._swap(part, (1, 0), (2, 3, 1, 0))

    def backward(self, leaves: list[np.ndarray]) -> np.ndarray:
        """The official tensor from the numbers of each of `ours`."""
        return np.concatenate([self._swap(leaf, (1, 0), (3, 2, 0, 1)) for leaf in leaves])

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The official shape, from the shape of one of our leaves (its stacked axis included)."""
        if self.index is not None:
            shape = shape[1:]
        if self.layout == "plain":
            for axis in self.ones:
                shape = (*shape[:axis], 1, *shape[axis:])
        else:
            order = (1, 0) if self.layout == "linear" else (3, 2, 0, 1)
            shape = tuple(shape[axis] for axis in order)
        return (shape[0] * len(self.ours), *shape[1:])

    def _swap(self, array, linear, conv):
        if self.layout == "plain":
            return array
        return array.transpose(linear if self.layout == "linear" else conv)


def tokenizer_table(config: TokenizerConfig) -> list[Link]:
    """All tensors of the official `VQVAE`."""
    last = len(config.multipliers) - 1
    links = [
        Link("quantize.embedding.weight", ("quantizer/codebook",)),
        *_conv("quant_conv", "quant_conv"),
        *_conv("post_quant_conv", "post_quant_conv"),
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
        links += _conv(f"{half}.conv_in", f"{half}/conv_in")
        links += _conv(f"{half}.conv_out", f"{half}/conv_out")
        links += _norm(f"{half}.norm_out", f"{half}/norm_out")
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
                links += _conv(official, f"{half}/{way}_{i}_{resample}/conv")
    return links


def var_table(config: VARConfig) -> list[Link]:
    """All tensors of the official `VAR`, without its buffers."""
    links = [
        Link("pos_start", ("pos_start",), ones=(0,)),
        Link("pos_1LC", ("pos_embed",), ones=(0,)),
        Link("class_emb.weight", ("class_embed",)),
        Link("lvl_embed.weight", ("level_embed",)),
        *_linear("word_embed", "word"),
        *_linear("head_nm.ada_lin.1", "head_ada"),
        *_linear("head", "head"),
    ]
    if config.shared_adaln:
        links += _linear("shared_ada_lin.1", "shared_ada")
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
        links += _linear(f"{official}.attn.proj", f"{ours}/attn/proj", i)
        links += _linear(f"{official}.ffn.fc1", f"{ours}/mlp/up", i)
        links += _linear(f"{official}.ffn.fc2", f"{ours}/mlp/down", i)
        if config.shared_adaln:
            table = f"{ours}/adaln/table"
            links.append(Link(f"{official}.ada_gss", (table,), index=i, ones=(0, 1)))
        else:
            links += _linear(f"{official}.ada_lin.1", f"{ours}/adaln/linear", i)
    return links


def _linear(official, ours, index=None):
    yield Link(f"{official}.weight", (f"{ours}/kernel",), "linear", index)
    yield Link(f"{official}.bias", (f"{ours}/bias",), index=index)


def _conv(official, ours):
    yield Link(f"{official}.weight", (f"{ours}/kernel",), "conv")
    yield Link(f"{official}.bias", (f"{ours}/bias",))


def _norm(official, ours):
    yield Link(f"{official}.weight", (f"{ours}/scale",))
    yield Link(f"{official}.bias", (f"{ours}/bias",))


def _residual(official, ours, shortcut) -> Iterator[Link]:
    for j in (1, 2):
        yield from _norm(f"{official}.norm{j}", f"{ours}/norm{j}")
        yield from _conv(f"{official}.conv{j}", f"{ours}/conv{j}")
    if shortcut:
        yield from _conv(f"{official}.nin_shortcut", f"{ours}/shortcut")


def _attention(official, ours) -> Iterator[Link]:
    yield from _norm(f"{official}.norm", f"{ours}/norm")
    yield from _conv(f"{official}.qkv", f"{ours}/qkv")
    yield from _conv(f"{official}.proj_out", f"{ours}/proj")
