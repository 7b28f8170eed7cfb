"""Where each array lies: one mesh, one ordered table of rules over tree paths."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from varjax import trees

# A spec speaks of the last dimensions, so stacked layers stay whole; the first match wins. The
# table covers optimizer moments and EMA too, for their paths end in the parameter's.
RULES = (
    (r"(^|/)(q|k|v|up)/kernel$", P("fsdp", "tensor")),
    (r"(^|/)(proj|down)/kernel$", P("tensor", "fsdp")),
    (r"_embed$", P(None, "fsdp")),  # not the rows: 1,001 classes divide by little
    (r"/kernel$", P("fsdp", None)),  # AdaLN, word embedding, head; convolutions: input channels
    (r"", P()),
)


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
        raise ValueError(f"{shape}: give positive numbers of devices, at most one of them -1")
    if len(devices) % product or (-1 not in sizes and len(devices) != product):
        raise ValueError(
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


def over_batch(mesh: Mesh) -> NamedSharding:
    """The sharding of everything with a leading batch axis."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """The same on every device."""
    return NamedSharding(mesh, P())
