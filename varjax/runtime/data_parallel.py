"""Computes a batch on several devices, each with all weights and some rows of the batch."""

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from varjax.errors import InputError
from varjax.trees import PyTree

T = TypeVar("T")


def batch_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """Makes a mesh with the single axis "batch" over devices; None for all of this process.

    Raises InputError for an empty list.
    """
    devices = jax.local_devices() if devices is None else devices
    if not devices:
        raise InputError(f"devices is empty; use some of {jax.local_devices()}")
    return jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)


def replicate(tree: PyTree, mesh: Mesh) -> PyTree:
    """Copies every array of a tree to each device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def data_parallel(f: Callable[..., T], mesh: Mesh) -> Callable[..., T]:
    """Jits `f` so that each device computes its part of the batch.

    Each device runs the program of a small batch independently, so an image is bit-identical on any
    number of devices. A batch that cannot be divided equally is padded with its last row,
    and the padding is removed from the result.

    Args:
        f: (params, options, *batch) -> arrays; batch and result have a leading batch axis.
        mesh: mesh of devices, made by `batch_mesh`.
    """

    def on_every_device(params, options, *batch):
        B = len(jax.tree.leaves(batch)[0])
        row_B = np.minimum(np.arange(B + -B % mesh.size), max(B - 1, 0))
        if len(row_B) > B:
            batch = jax.tree.map(lambda x: x[row_B], batch)
        specs = (P(), P(), *[P("batch")] * len(batch))
        # Nothing is exchanged between devices, so there is no replication to keep track of.
        sharded = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("batch"), check_vma=False)
        return jax.tree.map(lambda x: x[:B], sharded(params, options, *batch))

    return jax.jit(on_every_device, compiler_options=_compiler_options(mesh))


def _compiler_options(mesh: Mesh) -> dict[str, int] | None:
    """Returns what XLA is told for the mesh's platform, unless the user's XLA_FLAGS say it."""
    # For a CPU, a sampler compiles in 0.5 to 0.7 of the time that XLA's default level takes. It
    # draws the same images as fast: most of its time goes into a library's matmuls.
    level = "xla_backend_optimization_level"
    if mesh.devices.flat[0].platform != "cpu" or level in os.environ.get("XLA_FLAGS", ""):
        return None
    return {level: 1}
