"""Partitioning of arrays and batches over devices: a mesh, and ordered rules over tree paths."""

import collections
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from varjax import trees
from varjax.errors import InputError
from varjax.training.task import Batch

# A spec applies to the last dimensions, so the axis of stacked layers stays whole. The first match
# wins. The table covers optimizer moments and EMA too, because their paths end in the parameter's.
SHARDING_RULES = (
    (r"(^|/)(encoder|decoder)/", P("fsdp", None)),  # convolutions: their input channels
    (r"(^|/)(q|k|v|up)/kernel$", P("fsdp", "tensor")),
    (r"(^|/)(proj|down)/kernel$", P("tensor", "fsdp")),
    (r"(^|/)class_embed$", P()),  # otherwise looking up labels would exchange activations
    (r"_embed$", P(None, "fsdp")),
    (r"/kernel$", P("fsdp", None)),  # AdaLN, token projection, head, other convolutions
    (r"", P()),
)

MAX_REPLICATED_FRACTION = 0.1  # of the parameters; above it, a note is printed


MAX_LOCAL_FSDP = 64  # divides the presets' widths, and larger values would save little more
AXES = ("data", "fsdp", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Sets the size of each axis of the mesh, in devices; one may be -1, for all that remain.

    Attributes:
        data: number of copies of the model; each gets an equal part of the batch.
        fsdp: number of parts of each array, and of the batch. 0 for those with fast connections,
            the GPUs of a machine or the devices of a TPU slice (HSDP): the largest power of two
            that divides their number, at most 64.
        tensor: number of parts of the layers' width, all with the same part of the batch.
    """

    data: int = -1
    fsdp: int = 1
    tensor: int = 1


def make_mesh(shape: MeshShape, devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh with axes data, fsdp and tensor over all devices.

    Neighbours along `tensor`, then along `fsdp`, have the fastest connections. The axis `data` runs
    between machines of GPUs and slices of TPUs, as far as it divides over them.

    Raises InputError if the sizes are invalid, do not multiply to the number of devices, or cannot
    be laid out on them.
    """
    devices = jax.devices() if devices is None else devices
    sizes = _sizes(shape, devices)
    slices = len({_slice_of(device) for device in devices})
    between, left = [], slices
    for size in sizes:
        between.append(math.gcd(size, left))
        left //= between[-1]
    within = [size // parts for size, parts in zip(sizes, between, strict=True)]
    try:
        if slices == 1:
            grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        else:
            grid = mesh_utils.create_hybrid_device_mesh(
                within, between, devices, allow_split_physical_axes=True
            )
    except (ValueError, NotImplementedError, AssertionError) as error:
        named = ", ".join(f"{name}={size}" for name, size in zip(AXES, sizes, strict=True))
        raise InputError(
            f"mesh {named} cannot be laid out on {len(devices)} devices of kind "
            f"{devices[0].device_kind!r} in {slices} slice{'s' * (slices > 1)} ({error}); choose "
            "sizes that are products of the sides of a slice"
        ) from error
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * 3)


def _sizes(shape: MeshShape, devices: Sequence[Any]) -> list[int]:
    """Returns the sizes of all three axes, which multiply to the number of devices."""
    sizes = [shape.data, shape.fsdp, shape.tensor]
    if shape.fsdp == 0:
        counts = collections.Counter(map(_slice_of, devices))
        local = math.gcd(*counts.values()) // max(shape.tensor, 1)
        sizes[1] = math.gcd(max(local, 1), MAX_LOCAL_FSDP)
    product = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise InputError(f"{shape}: give positive numbers of devices, at most one of them -1")
    if len(devices) % product or (-1 not in sizes and len(devices) != product):
        advice = "leave data=-1, which means the rest"
        if -1 in sizes:
            advice = "choose a smaller mesh.fsdp or mesh.tensor (fsdp=0 fits it to the devices)"
        raise InputError(
            f"{shape} asks for {product} devices{' or a multiple' if -1 in sizes else ''}, "
            f"but there are {len(devices)}; {advice}"
        )
    return [len(devices) // product if size == -1 else size for size in sizes]


def _slice_of(device: Any) -> int:
    """Returns the TPU slice or the GPU machine of a device; 0 for CPU devices."""
    return getattr(device, "slice_index", 0) or 0


def shardings(tree: Any, mesh: Mesh) -> Any:
    """Returns a NamedSharding for each leaf (array or ShapeDtypeStruct), by SHARDING_RULES.

    A dimension that its mesh axis does not divide is replicated.
    """

    def place(path: str, leaf: Any) -> NamedSharding:
        spec = trees.first_match(SHARDING_RULES, path)
        if len(spec) > len(leaf.shape):
            return replicated(mesh)
        sizes = leaf.shape[len(leaf.shape) - len(spec) :]
        fits = [
            a if a and n % mesh.shape[a] == 0 else None for a, n in zip(spec, sizes, strict=True)
        ]
        return NamedSharding(mesh, P(*[None] * (len(leaf.shape) - len(spec)), *fits))

    return trees.map_with_path(place, tree)


def replicated_parameters_note(tree: Any, mesh: Mesh) -> str:
    """Returns a warning if the mesh splits too little of a tree over its devices; else ""."""
    if mesh.shape["fsdp"] * mesh.shape["tensor"] == 1:
        return ""
    leaves, specs = jax.tree.leaves(tree), jax.tree.leaves(shardings(tree, mesh))
    pairs = zip(leaves, specs, strict=True)
    fraction = sum(x.size for x, s in pairs if s.is_fully_replicated) / sum(x.size for x in leaves)
    if fraction < MAX_REPLICATED_FRACTION:
        return ""
    replicated = f"{fraction:.0%} of the parameters are replicated on every device, because"
    if mesh.shape["fsdp"] == 1:
        return (
            f"{replicated} mesh.tensor splits only attention and MLP, where it divides them; a "
            "larger mesh.fsdp would split the others too"
        )
    sizes = f"mesh.fsdp={mesh.shape['fsdp']} and mesh.tensor={mesh.shape['tensor']}"
    return f"{replicated} {sizes} do not divide them; divisors of the width would save memory"


def bytes_on_device(tree: Any, placement: Any) -> int:
    """Adds up the bytes of a tree on one device.

    Args:
        tree: arrays or their shapes and dtypes.
        placement: sharding of each array.
    """
    pairs = zip(jax.tree.leaves(tree), jax.tree.leaves(placement), strict=True)
    return sum(math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize for x, s in pairs)


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of everything with a leading batch axis."""
    return NamedSharding(mesh, P(("data", "fsdp")))


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of an array that is whole on every device."""
    return NamedSharding(mesh, P())


def on_mesh(function: Callable[..., Any], mesh: Mesh) -> Callable[..., Any]:
    """Wraps a function for `jax.jit` so that it is traced with the mesh in context.

    `nn.compute.shard_batch` finds it there.
    """

    @functools.wraps(function)
    def traced(*arguments: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def put(tree: Any, shardings: Any) -> Any:
    """Copies arrays, equal in every process, to the devices; each process fills its own.

    Args:
        tree: arrays, equal in every process.
        shardings: a NamedSharding for each array.
    """

    def place(x: Any, sharding: NamedSharding) -> jax.Array:
        return jax.make_array_from_process_local_data(sharding, np.asarray(x), np.shape(x))

    return jax.tree.map(place, tree, shardings)


def rows_of_process(mesh: Mesh, batch_size: int, process: int | None = None) -> np.ndarray:
    """Returns the numbers of the rows of a batch that a process's devices hold, in order.

    Processes that differ along `tensor` alone hold the same rows. Where the mesh interleaves the
    devices of processes, as on TPU slices, rows of others are in between.

    Args:
        mesh: mesh of all devices of all processes.
        batch_size: rows of the whole batch.
        process: index of a process; None for this one.

    Raises InputError as `check_batch_size` does.
    """
    check_batch_size(mesh, batch_size)
    process = jax.process_index() if process is None else process
    device_PT = mesh.devices.reshape(-1, mesh.shape["tensor"])
    held_P = np.array([any(d.process_index == process for d in row) for row in device_PT])
    return np.arange(batch_size).reshape(len(held_P), -1)[held_P].reshape(-1)


def check_batch_size(mesh: Mesh, batch_size: int, accumulate: int = 1) -> None:
    """Raises InputError where the mesh axes data and fsdp do not divide each microbatch.

    Args:
        mesh: mesh of all devices.
        batch_size: rows of a batch, over all processes.
        accumulate: number of microbatches in a batch.
    """
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (parts * accumulate):
        sizes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
        many = f" in {accumulate} microbatches" if accumulate > 1 else ""
        instead = "another accumulate" if many else "a larger mesh.tensor, which keeps the batch"
        raise InputError(
            f"batch_size {batch_size}{many} does not divide over {parts} devices (mesh: {sizes}); "
            f"choose a multiple of {parts * accumulate}, or {instead}"
        )


PREFETCHED_BATCHES = 2


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, size: int) -> Batch:
    """Copies a batch to the devices, its rows spread over them.

    Args:
        batch: arrays whose first axis is the `rows_of_process` of this process.
        mesh: mesh of all devices of all processes.
        size: number of rows of the whole batch, over all processes.
    """
    rows = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(rows, x, (size, *x.shape[1:]))
        for name, x in batch.items()
    }


class Prefetcher:
    """Yields batches on the devices, copied while earlier ones are processed.

    batches = Prefetcher(loader.train(0), mesh, batch_size)
    state, metrics = train_step(state, frozen, next(batches), key)
    """

    def __init__(self, batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, size: int):
        self._batches, self._mesh, self._size = batches, mesh, size
        self._ahead: collections.deque[Batch] = collections.deque()

    def __next__(self) -> Batch:
        while len(self._ahead) <= PREFETCHED_BATCHES:
            self._ahead.append(put_batch(next(self._batches), self._mesh, self._size))
        return self._ahead.popleft()
