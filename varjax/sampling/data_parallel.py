"""Sampling on many devices: weights on each, batches shared out, nothing exchanged."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from varjax.core.errors import InputError
from varjax.core.trees import PyTree


def batch_mesh(devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh with the one axis "batch" over these devices; None for all of this process."""
    devices = jax.local_devices() if devices is None else devices
    if not devices:
        raise InputError(f"devices is empty; give some of {jax.local_devices()}")
    return jax.make_mesh((len(devices),), ("batch",), (AxisType.Auto,), devices=devices)


def put_everywhere(tree: PyTree, mesh: Mesh) -> PyTree:
    """The tree with every array whole on each device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def shared_out(f: Callable[..., jax.Array], mesh: Mesh) -> Callable[..., jax.Array]:
    """`f(params, options, *batch)`, jitted: each device computes its part of the leading axis.

    As every device runs the program of a small batch by itself, an image comes out the same to the
    bit on one device or on many. Where the devices do not divide the batch, each computes all.
    """

    def on_every_device(params, options, *batch):
        divides = len(jax.tree.leaves(batch)[0]) % mesh.size == 0
        spec = P("batch") if divides else P()
        specs = (P(), P(), *[spec] * len(batch))
        # Nothing is exchanged between devices, so there is no replication to keep track of.
        shared = jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)
        return shared(params, options, *batch)

    return jax.jit(on_every_device)
