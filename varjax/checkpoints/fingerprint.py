"""Computes fingerprints of arrays, which show whether the numbers read are those saved.

    saved = fingerprints(params)  # {"q/kernel": "float32[64,64] 0d5c2f5b91f7a3e4", …}
    changed = [path for path, text in fingerprints(read).items() if text != saved[path]]

The bits of each element are mixed with its position in the whole array, and the results are summed.
The order of a sum does not matter, so a fingerprint depends neither on the mesh nor on the number
of processes: each device sums the elements that it holds, and processes exchange only the sums.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from varjax import trees
from varjax.runtime.distributed import gather_json
from varjax.trees import PyTree

# NumPy sums smaller shards, because compiling a program would take longer.
MIN_DEVICE_BYTES = 2**20
POSITION_FACTOR = np.uint32(0x9E3779B9)  # 2^32 / golden ratio, as in Fibonacci hashing
# "lowbias32" of Chris Wellons' hash prospector: a bijection of 32 bits in which each bit of the
# input flips each bit of the output with a probability close to 1/2.
MIX_FACTORS = np.uint32(0x7FEB352D), np.uint32(0x846CA68B)


def fingerprints(tree: PyTree, written: bool = False) -> dict[str, str]:
    """Returns dtype, shape and a 64-bit fingerprint of each array, by path.

    All processes that hold parts of the arrays must call this. A process that holds all parts does
    not wait for others. If processes hold different copies of a part, the fingerprint is "".

    Args:
        tree: nested dict of arrays.
        written: whether to use only the copies that Orbax writes. Others may differ by rounding if
            a program is not deterministic.
    """
    leaves = trees.paths(tree)
    local = jax.device_get({path: _shard_sums(leaf, written) for path, leaf in leaves.items()})
    parts = {
        path: {start: [int(x) for x in sums] for start, sums in shards.items()}
        for path, shards in local.items()
    }
    # A process may read weights without the others.
    holds_all = all(leaf.is_fully_addressable for leaf in leaves.values())
    processes = [parts] if holds_all else gather_json(parts)
    return {path: _text(leaf, [p[path] for p in processes]) for path, leaf in leaves.items()}


def dtype_and_shape(leaf: Any) -> str:
    """Returns dtype and shape, such as "float32[64,64]", of an array or its description."""
    return f"{np.dtype(leaf.dtype).name}[{','.join(map(str, leaf.shape))}]"


def _text(leaf: Any, processes: list[dict[str, list[int]]]) -> str:
    """Sums the parts of an array in all processes, each part once."""
    parts: dict[str, list[int]] = {}
    for sums in processes:
        for start, pair in sums.items():
            if parts.setdefault(start, pair) != pair:
                return ""
    high, low = (sum(pair[i] for pair in parts.values()) % 2**32 for i in (0, 1))
    return f"{dtype_and_shape(leaf)} {high:08x}{low:08x}"


def _shard_sums(array: jax.Array, written: bool = False) -> dict[str, tuple[Any, Any]]:
    """Returns two sums for each part of the array in this process, by the part's start."""
    strides = [math.prod(array.shape[axis + 1 :]) % 2**32 for axis in range(array.ndim)]
    sums = {}
    for shard in array.addressable_shards:
        if written and shard.replica_id != 0:
            continue
        starts = [part.start or 0 for part in shard.index]
        if (name := ",".join(map(str, starts))) in sums:
            continue
        first = sum(a * b for a, b in zip(starts, strides, strict=True)) % 2**32
        if shard.data.nbytes < MIN_DEVICE_BYTES:
            compute, data = _sums_by_numpy, np.asarray(shard.data)
        else:
            compute, data = _sums_on_device, shard.data
        sums[name] = compute(data, np.uint32(first), np.array(strides, np.uint32))
    return sums


@jax.jit
def _sums_on_device(shard: jax.Array, first: jax.Array, strides: jax.Array) -> tuple:
    if shard.dtype == jnp.bool_:
        bits = shard.astype(jnp.uint32)
    else:
        unsigned = _UNSIGNED[min(shard.dtype.itemsize, 4)]
        bits = lax.bitcast_convert_type(shard, unsigned).astype(jnp.uint32)
    position = jnp.broadcast_to(first, bits.shape)
    for axis in range(bits.ndim):
        iota = lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
        position += iota * strides[axis]
    mixed = _mix(bits, position)
    # One reduction of a pair: on CPUs, it is ten times as fast as two sums.
    zero = jnp.uint32(0)
    return lax.reduce(
        (mixed, mixed * (mixed | np.uint32(1))),
        (zero, zero),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(bits.ndim)),
    )


def _sums_by_numpy(shard: np.ndarray, first: np.uint32, strides: np.ndarray) -> tuple:
    """Computes the same numbers as `_sums_on_device`."""
    bits = np.ascontiguousarray(shard).view(_UNSIGNED[shard.dtype.itemsize]).astype(np.uint32)
    position = np.full(bits.shape, first)
    for axis, length in enumerate(shard.shape):
        iota = np.arange(length, dtype=np.uint32) * strides[axis]
        position += iota.reshape(-1, *[1] * (shard.ndim - axis - 1))
    mixed = _mix(bits, position)
    return mixed.sum(dtype=np.uint32), (mixed * (mixed | np.uint32(1))).sum(dtype=np.uint32)


_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32}


def _mix(bits: Any, position: Any) -> Any:
    bits = bits ^ (position * POSITION_FACTOR)
    bits = (bits ^ (bits >> 16)) * MIX_FACTORS[0]
    bits = (bits ^ (bits >> 15)) * MIX_FACTORS[1]
    return bits ^ (bits >> 16)
