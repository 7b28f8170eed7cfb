"""Weights through a table of names, in either direction, one tensor in memory at a time."""

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.convert.name_maps.tables import Link, tokenizer_table, var_table
from varjax.core import trees
from varjax.core.errors import InputError
from varjax.core.safetensors_io import LazyArray
from varjax.core.trees import PyTree
from varjax.tokenizers.vq.model import VQConfig
from varjax.var.model import VARConfig

Config = VQConfig | VARConfig
# Buffers of the official modules: derived from the sizes, so neither read nor needed here.
BUFFERS = ("lvl_1L", "attn_bias_for_masking", "zero_k_bias", "ema_vocab_hit_SV")
FLOAT32 = np.dtype(np.float32)


def table_of(config: Config) -> list[Link]:
    """The names of the model that `config` describes."""
    return tokenizer_table(config) if isinstance(config, VQConfig) else var_table(config)


@functools.cache
def describe(config: Config) -> PyTree:
    """Shapes of the model's parameters, without making them."""
    init = type(config).init
    return jax.eval_shape(functools.partial(init, config), jax.random.key(0))


def official_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name and shape of every official tensor, without the buffers."""
    return _shapes(table_of(config), trees.paths(describe(config)))


def is_weight(name: str) -> bool:
    """Whether an official name is of a weight, not of a buffer."""
    return name.rsplit(".", 1)[-1] not in BUFFERS


def check(config: Config, tensors: Mapping[str, np.ndarray]) -> None:
    """Raises InputError with every missing, unexpected, misshapen and mistyped tensor at once."""
    _check(official_shapes(config), _weights(tensors))


def to_ours(config: Config, tensors: Mapping[str, np.ndarray]) -> dict[str, LazyArray]:
    """Our leaves by path, float32, from official tensors in any floating-point format.

    Raises InputError like `check`.
    """
    return fill(table_of(config), describe(config), _weights(tensors))


def fill(table: list[Link], params: PyTree, tensors: Mapping[str, np.ndarray]) -> dict[str, LazyArray]:
    """The leaves of `params` (whose shapes are all that counts) by path, as `table` says.

    `tensors` are of any floating-point format, the leaves float32. Raises InputError like `check`.
    """
    leaves = trees.paths(params)
    _check(_shapes(table, leaves), tensors)
    links: dict[str, list[Link]] = {}
    for link in table:
        for path in link.ours:
            links.setdefault(path, []).append(link)
    assert links.keys() == leaves.keys(), links.keys() ^ leaves.keys()

    def pieces(path: str) -> Iterator[np.ndarray]:
        for link in links[path]:  # a stacked leaf has one for each layer, in order
            yield link.forward(tensors[link.official], path).astype(np.float32)

    return {
        path: LazyArray(leaf.shape, FLOAT32, functools.partial(pieces, path))
        for path, leaf in leaves.items()
    }


def from_official(config: Config, tensors: Mapping[str, np.ndarray]) -> PyTree:
    """Our parameter tree, NumPy float32; raises InputError like `check`."""
    leaves = to_ours(config, tensors)
    return trees.map_with_path(lambda path, _: np.asarray(leaves[path]), describe(config))


def to_official(config: Config, params: PyTree) -> dict[str, LazyArray]:
    """Every official tensor by name, without the buffers; `params` are on the host."""
    leaves = trees.paths(params)

    def pieces(link: Link) -> Iterator[np.ndarray]:
        parts = [
            leaves[path] if link.index is None else leaves[path][link.index] for path in link.ours
        ]
        yield link.backward(parts)

    return {
        link.official: LazyArray(
            link.shape(leaves[link.ours[0]].shape), FLOAT32, functools.partial(pieces, link)
        )
        for link in table_of(config)
    }


def official_buffers(config: Config) -> dict[str, np.ndarray]:
    """What else the official modules' state dicts hold, as it is when they are built."""
    pyramid = config.pyramid
    if isinstance(config, VQConfig):
        shape = (len(pyramid), config.vocab)
        return {"quantize.ema_vocab_hit_SV": np.zeros(shape, np.float32)}
    bias_LL = np.where(pyramid.mask_LL, np.float32(0), np.float32(-np.inf))
    zeros = {
        f"blocks.{i}.attn.zero_k_bias": np.zeros(config.width, np.float32)
        for i in range(config.depth)
    }
    return {
        "lvl_1L": pyramid.level_L[None].astype(np.int64),
        "attn_bias_for_masking": bias_LL[None, None],
        **zeros,
    }


def _weights(tensors):
    return {name: x for name, x in tensors.items() if is_weight(name)}


def _shapes(table: list[Link], leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {link.official: link.shape(leaves[link.ours[0]].shape) for link in table}


def _check(wanted: Mapping[str, tuple[int, ...]], given: Mapping[str, np.ndarray]) -> None:
    problems = [f"missing: {n} {shape}" for n, shape in wanted.items() if n not in given]
    problems += [f"unexpected: {n} {tuple(given[n].shape)}" for n in given if n not in wanted]
    for n in (n for n in wanted if n in given):
        if given[n].shape != wanted[n]:
            problems.append(f"misshapen: {n} is {given[n].shape}, needed is {wanted[n]}")
        if not jnp.issubdtype(given[n].dtype, jnp.floating):
            problems.append(f"mistyped: {n} is {given[n].dtype}, needed are floating-point numbers")
    if problems:
        raise InputError("the tensors do not fit the model:\n  " + "\n  ".join(problems))
