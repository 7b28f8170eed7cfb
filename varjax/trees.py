"""Trees of arrays by path: names of leaves, rule tables, differences, and digests."""

import hashlib
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from varjax.errors import InputError

T = TypeVar("T")
PyTree = Any  # nested containers of arrays; JAX has no narrower type for them


def paths(tree: Any) -> dict[str, Any]:
    """Returns the leaves by path, such as "blocks/q/kernel".

    Fields of named tuples and dataclasses give names, items of sequences their numbers.
    """
    return {_name(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_with_path(f: Callable[[str, Any], Any], tree: Any) -> Any:
    """Makes a tree of the same structure with `f(path, leaf)` at each leaf."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: f(_name(path), leaf), tree)


def cast(pattern: str, tree: Any, dtype: Any) -> Any:
    """Returns the tree with the leaves whose path has the pattern in `dtype`."""

    def convert(path: str, leaf: Any) -> Any:
        if not re.search(pattern, path) or leaf.dtype == dtype:
            return leaf
        return jnp.asarray(leaf).astype(dtype)

    return map_with_path(convert, tree)


def first_match(rules: Sequence[tuple[str, T]], path: str) -> T:
    """Returns the value of the first rule whose pattern is found in `path`; else InputError."""
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    raise InputError(f"no rule matches {path!r}; the patterns are {[p for p, _ in rules]}")


def difference(expected: Any, actual: Any) -> str:
    """Lists every missing, unexpected and misshapen leaf, one a line; "" when there is none.

    Leaves are anything with a shape and a dtype: arrays or `jax.ShapeDtypeStruct`.
    """
    wanted, found = paths(expected), paths(actual)
    lines = [f"missing:    {p} {_kind(wanted[p])}" for p in sorted(wanted.keys() - found.keys())]
    lines += [f"unexpected: {p} {_kind(found[p])}" for p in sorted(found.keys() - wanted.keys())]
    for path in sorted(wanted.keys() & found.keys()):
        kinds = _kind(wanted[path]), _kind(found[path])
        if kinds[0] != kinds[1]:
            lines.append(f"misshapen:  {path} is {kinds[1]}, expected {kinds[0]}")
    return "\n".join(lines)


def nbytes(tree: Any) -> int:
    """Returns how many bytes all leaves have together, arrays or `jax.ShapeDtypeStruct`."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def nonfinite(tree: Any) -> list[str]:
    """Lists the paths of leaves of floats that hold NaN or infinite numbers."""
    floats = {p: x for p, x in paths(tree).items() if jnp.issubdtype(x.dtype, jnp.floating)}
    return [path for path, x in floats.items() if not np.isfinite(np.asarray(x, np.float32)).all()]


def refuse_tracers(tree: Any) -> None:
    """Raises InputError if JAX is tracing any leaf, for functions that check their arguments."""
    if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(tree)):
        raise InputError(
            "this function checks its arguments and runs a compiled program, so JAX cannot trace "
            "it; inside jit, grad, vmap or shard_map, call the same function of model.pure "
            "(docs/python.md)"
        )


def digest(tree: Any) -> str:
    """Returns the sha256 of all leaves' paths, types, shapes and bytes, in hexadecimal digits."""
    total = hashlib.sha256()
    for path, leaf in sorted(paths(tree).items()):
        total.update(f"{path} {_kind(leaf)}\n".encode())
        # One device's copy: a spread array would keep the copy made for NumPy in memory.
        whole = isinstance(leaf, jax.Array) and leaf.is_fully_replicated
        here = leaf.addressable_data(0) if whole else leaf
        total.update(np.ascontiguousarray(here).reshape(-1).view(np.uint8).data)
    return total.hexdigest()


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _kind(leaf: Any) -> str:
    return f"{tuple(leaf.shape)} {leaf.dtype}"
