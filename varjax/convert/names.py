"""Official PyTorch names and layouts <-> ours: one table per model, which accounts for every tensor.

A table lists each official tensor once and says where it goes. Reading it forwards converts
official weights, backwards exports ours; neither direction has names of its own.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

import jax
import numpy as np

from varjax.tokenizer.model import TokenizerConfig
from varjax.var.model import VARConfig

# Buffers of the official modules: derived from the sizes, so neither read nor needed.
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")


@dataclasses.dataclass(frozen=True)
class Link:
    """One official tensor and the leaves that hold its numbers.

    ours: paths of the leaves; several share the tensor in equal parts of its first axis.
    layout: "linear" (out, in) <-> (in, out); "conv" OIHW <-> HWIO; "plain" the same up to axes of 1.
    index: position along the leaf's leading (stacked) axis, or None.
    ones: for "plain", where the official shape has axes of length 1.
    """

    official: str
    ours: tuple[str, ...]
    layout: Literal["plain", "linear", "conv"] = "plain"
    index: int | None = None
    ones: tuple[int, ...] = ()

    def forward(self, tensor: np.ndarray) -> list[np.ndarray]:
        """The official tensor's numbers for each of `ours`."""
        return [self._swap(part, (1, 0), (2, 3, 1, 0)) for part in np.split(tensor, len(self.ours))]

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


def official_shapes(table: list[Link], abstract) -> dict[str, tuple[int, ...]]:
    """Name and shape of every official tensor; `abstract` is our tree of shapes (`eval_shape`)."""
    leaves = _leaves(abstract)
    return {link.official: link.shape(leaves[link.ours[0]].shape) for link in table}


def from_official(table: list[Link], abstract, tensors: Mapping[str, np.ndarray]):
    """Our parameter tree, NumPy float32, from official tensors; reads each of them once.

    Raises ValueError with every missing, unexpected and misshapen tensor at once.
    """
    given = {n: t for n, t in tensors.items() if n.rsplit(".", 1)[-1] not in BUFFERS}
    wanted = official_shapes(table, abstract)
    problems = [f"missing: {n} {shape}" for n, shape in wanted.items() if n not in given]
    problems += [f"unexpected: {n} {tuple(given[n].shape)}" for n in given if n not in wanted]
    problems += [
        f"misshapen: {n} is {tuple(given[n].shape)}, needed is {shape}"
        for n, shape in wanted.items()
        if n in given and tuple(given[n].shape) != shape
    ]
    if problems:
        raise ValueError("the tensors do not fit the model:\n  " + "\n  ".join(problems))
    out = {path: np.empty(leaf.shape, np.float32) for path, leaf in _leaves(abstract).items()}
    filled = set()
    for link in table:
        for path, part in zip(link.ours, link.forward(given[link.official]), strict=True):
            leaf = out[path] if link.index is None else out[path][link.index]
            leaf[...] = part.reshape(leaf.shape)
            filled.add(path)
    assert filled == out.keys(), f"the table never fills {sorted(out.keys() - filled)}"
    return _nest(out)


def to_official(table: list[Link], params) -> Iterator[tuple[str, np.ndarray]]:
    """(name, tensor) of every official tensor, one at a time."""
    leaves = _leaves(params)
    for link in table:
        parts = [leaves[path] for path in link.ours]
        shape = link.shape(parts[0].shape)
        if link.index is not None:
            parts = [part[link.index] for part in parts]
        yield link.official, link.backward([np.asarray(p) for p in parts]).reshape(shape)


def _leaves(tree) -> dict:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _nest(leaves: Mapping[str, np.ndarray]):
    tree: dict = {}
    for path, leaf in leaves.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree
