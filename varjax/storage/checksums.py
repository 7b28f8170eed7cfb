"""Computes checksums of arrays in files, of rows in arrays, and of JSON data.

    seal({"best": 3.5})  # {"best": 3.5, "checksum": "…"}

They detect damage (a flipped bit, a zeroed page), not forgery: anyone can compute them.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import xxhash

from varjax.errors import DamagedFileError

SEAL = "checksum"  # key of the checksum in sealed JSON data


def array_checksum(dtype: np.dtype, shape: Iterable[int], chunks: Iterable[np.ndarray]) -> str:
    """Returns 32 hexadecimal digits for an array that comes in chunks in C order."""
    total = xxhash.xxh3_128(f"{dtype.name} {','.join(map(str, shape))}\n".encode())
    for chunk in chunks:
        total.update(contiguous_bytes(chunk))
    return total.hexdigest()


def row_checksum(arrays: Iterable[np.ndarray]) -> int:
    """Returns a 64-bit checksum of a few small arrays whose dtypes and shapes are known."""
    total = xxhash.xxh3_64()
    for array in arrays:
        total.update(contiguous_bytes(array))
    return total.intdigest()


def contiguous_bytes(array: np.ndarray) -> memoryview:
    """Returns the bytes of an array in C order, without a copy if it already has that order."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def seal(data: Mapping[str, Any]) -> dict[str, Any]:
    """Adds a checksum to JSON data."""
    return {**data, SEAL: _json_checksum(data)}


def unseal(data: Any, name: object) -> dict[str, Any]:
    """Removes the checksum that `seal` added; raises DamagedFileError if it differs."""
    if not isinstance(data, dict):
        raise DamagedFileError(f"{name} is not a JSON object")
    content = {key: value for key, value in data.items() if key != SEAL}
    if data.get(SEAL) != _json_checksum(content):
        raise DamagedFileError(f"{name} is damaged: its checksum is missing or does not match")
    return content


def _json_checksum(data: Mapping[str, Any]) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(data, sort_keys=True).encode())
