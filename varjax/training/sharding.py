"""Where each array lies: one mesh, one ordered table of rules over tree paths."""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from varjax.core import trees
from varjax.core.errors import InputError

# A spec speaks of the last dimensions, so stacked layers stay whole; the first match wins. The
# table covers optimizer moments and EMA too, for their paths end in the parameter's.
RULES = (
    (r"(^|/)(encoder|decoder)/", P("fsdp", None)),  # convolutions: their input channels
    (r"(^|/)(q|k|v|up)/kernel$", P("fsdp", "tensor")),
    (r"(^|/)(proj|down)/kernel$", P("tensor", "fsdp")),
    (r"(^|/)class_embed$", P()),  # else looking up labels would exchange activations
    (r"_embed$", P(None, "fsdp")),
    (r"/kernel$", P("fsdp", None)),  # AdaLN, word embedding, head, other convolutions
    (r"", P()),
)


MUCH = 0.1


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Numbers of devices: copies of the model, parts of its arrays, parts of its layers' width.

    One of them may be -1: all devices that the others leave.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with axes data, fsdp and tensor over all devices; ValueError when they do not fit."""
    devices = jax.devices() if devices is None else devices
    sizes = [shape.data, shape.fsdp, shape.tensor]
    product = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"{shape}: give positive numbers of devices, at most one of them -1")
    if len(devices) % product or (-1 not in sizes and len(devices) != product):
        raise InputError(
            f"{shape} asks for {product} devices{' or a multiple' if -1 in sizes else ''}, "
            f"but there are {len(devices)}"
        )
    sizes = [len(devices) // product if size == -1 else size for size in sizes]
    names = ("data", "fsdp", "tensor")
    return jax.make_mesh(sizes, names, axis_types=(AxisType.Auto,) * 3, devices=devices)


def shardings(tree: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf (array or ShapeDtypeStruct), by RULES.

    A dimension that its mesh axis does not divide is replicated.
    """

    def place(path: str, leaf: Any) -> NamedSharding:
        spec = trees.first_match(RULES, path)
        if len(spec) > len(leaf.shape):
            return replicated(mesh)
        sizes = leaf.shape[len(leaf.shape) - len(spec) :]
        fits = [
            a if a and n % mesh.shape[a] == 0 else None for a, n in zip(spec, sizes, strict=True)
        ]
        return NamedSharding(mesh, P(*[None] * (len(leaf.shape) - len(spec)), *fits))

    return trees.map_with_path(place, tree)


def left_whole(tree: Any, mesh: Mesh) -> str:
    """A sentence where much of a tree lies whole on each device, though the mesh is to split it."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return ""
    leaves, specs = jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, mesh))
    pairs = zip(leaves, specs, strict=True)
    share = sum(x.size for x, s in pairs if s.is_fully_replicated) / sum(x.size for x in leaves)
    sizes = f"mesh.fsdp={mesh.shape['fsdp']} and mesh.tensor={mesh.shape['tensor']}"
    if share < MUCH:
        return ""
    return (
        f"{share:.0%} of the parameters lie whole on every device, for {sizes} do not divide them; "
        "divisors of the model's width would save memory"
    )


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of everything with a leading batch axis."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """`function` for `jax.jit`, with `nn.compute.spread_rows` at work inside."""

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def put(tree: Any, shardings: Any) -> Any:
    """Arrays that every process has, on the devices; each process copies what its own ones hold."""

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        x = np.asarray(x)
        return jax.make_array_from_callback(x.shape, sharding, lambda index: x[cast(Any, index)])

    return jax.tree.map(place, tree, shardings)


def rows_of_process(mesh: Mesh, batch_size: int) -> range:
    """The rows of a batch that the devices of this process hold, from the first to the last.

    Processes that differ along `tensor` alone hold the same rows. Where the mesh interleaves the
    devices of processes, as on TPU pods, rows of others lie between. Raises as `check_batch` does.
    """
    check_batch(mesh, batch_size)
    held = over_batch(mesh).addressable_devices_indices_map((batch_size,)).values()
    bounds = [rows[0].indices(batch_size) for rows in held if rows is not None]
    return range(min(start for start, _, _ in bounds), max(stop for _, stop, _ in bounds))


def check_batch(mesh: Mesh, batch_size: int) -> None:
    """Raises InputError where `data` times `fsdp` does not divide the batch."""
    if batch_size % (parts := mesh.shape["data"] * mesh.shape["fsdp"]):
        sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        raise InputError(
            f"batch_size {batch_size} does not divide over {parts} devices (mesh: {sizes}); "
            "choose a multiple"
        )
