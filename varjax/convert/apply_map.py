"""Converts tensors through a name map, in either direction, one tensor in memory at a time."""

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from varjax import trees
from varjax.checkpoints.weights import abstract_params
from varjax.convert.name_maps import kinds, name_map_of
from varjax.convert.name_maps.name_map import Link, Tensors
from varjax.errors import InputError
from varjax.storage.safetensors_io import LazyArray, Tensor
from varjax.storage.untrusted import abridged, shown
from varjax.trees import PyTree

FLOAT32 = np.dtype(np.float32)


def official_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every official tensor by name, buffers left out."""
    return _shapes(name_map_of(config).table(config), trees.paths(abstract_params(config)))


def is_weight(name: str) -> bool:
    """Returns whether an official name belongs to a weight rather than a buffer."""
    last_part = name.rsplit(".", 1)[-1]
    return not any(last_part in kind.buffer_names for kind in kinds().values())


def from_official(
    config: Any,
    tensors: Tensors,
    options: Any = None,
) -> PyTree:
    """Converts official tensors into a tree of our parameters, NumPy float32.

    Takes the arguments of `lazy_leaves` and raises the same errors.
    """
    leaves = lazy_leaves(config, tensors, options)
    return trees.map_with_path(lambda path, _: np.asarray(leaves[path]), abstract_params(config))


def lazy_leaves(
    config: Any,
    tensors: Tensors,
    options: Any = None,
) -> dict[str, Tensor]:
    """Converts official tensors into our parameters by path; each is computed when it is used.

    Args:
        config: config of the model, of one of the classes in `NAME_MAPS`.
        tensors: official tensors of any floating-point format, with or without buffers.
        options: options of the kind, which supply parameters that no tensor holds; None for the
            defaults.

    Returns:
        Float32 arrays by path, "blocks/attn/q/kernel".

    Raises:
        InputError: lists every missing, unexpected, misshapen and mistyped tensor.
    """
    name_map, params = name_map_of(config), trees.paths(abstract_params(config))
    constants = name_map.constants(options or name_map.options())
    params = {path: leaf for path, leaf in params.items() if path not in constants}
    leaves = leaves_by_table(name_map.table(config), params, _weights(tensors))
    return {**leaves, **constants}


def leaves_by_table(table: list[Link], params: PyTree, tensors: Tensors) -> dict[str, LazyArray]:
    """Converts like `lazy_leaves`, for any tree of parameters and a table that fills it.

    Args:
        table: one link for each tensor; together they name every leaf of `params`.
        params: arrays or jax.ShapeDtypeStruct; only their shapes are used.
        tensors: the tensors that the table names and no others, of any floating-point format.
    """
    leaves = trees.paths(params)
    _check_shapes(_shapes(table, leaves), tensors)
    links: dict[str, list[Link]] = {}
    for link in table:
        for path in link.ours:
            links.setdefault(path, []).append(link)
    assert links.keys() == leaves.keys(), links.keys() ^ leaves.keys()

    def chunks(path: str) -> Iterator[np.ndarray]:
        # A stacked leaf has one link per layer, in order; a divided leaf has one per part.
        for _, layer in itertools.groupby(links[path], key=lambda link: link.index):
            parts = [link.to_ours(tensors[link.official], path) for link in layer]
            yield np.concatenate(parts, axis=-1, dtype=np.float32)

    return {
        path: LazyArray(leaf.shape, FLOAT32, functools.partial(chunks, path))
        for path, leaf in leaves.items()
    }


def to_official(config: Any, params: PyTree) -> dict[str, LazyArray]:
    """Converts our parameters, on the host, into official tensors by name, buffers left out."""
    leaves = trees.paths(params)

    def chunks(link: Link) -> Iterator[np.ndarray]:
        index = () if link.index is None else link.index
        yield link.to_official([leaves[path][index] for path in link.ours])

    return {
        link.official: LazyArray(
            link.official_shape(leaves[link.ours[0]].shape),
            FLOAT32,
            functools.partial(chunks, link),
        )
        for link in name_map_of(config).table(config)
    }


def official_buffers(config: Any) -> dict[str, Tensor]:
    """Returns the buffers of an official state dict, with the values of a newly built model."""
    return name_map_of(config).buffers(config)


def _weights(tensors: Tensors) -> dict[str, np.ndarray]:
    return {name: x for name, x in tensors.items() if is_weight(name)}


def _shapes(table: list[Link], leaves: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {link.official: link.official_shape(leaves[link.ours[0]].shape) for link in table}


def _check_shapes(shapes: Mapping[str, tuple[int, ...]], tensors: Tensors) -> None:
    problems = [f"missing: {n} {shape}" for n, shape in shapes.items() if n not in tensors]
    problems += [f"unexpected: {n} {shown(x.shape)}" for n, x in tensors.items() if n not in shapes]
    for n, shape in shapes.items():
        if n not in tensors:
            continue
        if tensors[n].shape != shape:
            problems.append(f"misshapen: {n} is {shown(tensors[n].shape)}, expected {shape}")
        if not jnp.issubdtype(tensors[n].dtype, jnp.floating):
            problems.append(f"mistyped: {n} is {tensors[n].dtype}, expected floating-point numbers")
    if problems:
        raise InputError("the tensors do not fit the model:\n  " + "\n  ".join(abridged(problems)))
