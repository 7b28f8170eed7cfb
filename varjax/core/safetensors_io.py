"""The .safetensors format: read as a memory map, written as a stream, so that nothing is copied."""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from reprlib import repr as short  # bounded, whatever a damaged header holds

import ml_dtypes
import numpy as np

from varjax.core.errors import InputError

AGAIN = "write or download it again"
MAX_HEADER_BYTES = 100 * 10**6  # the limit of the format itself
ALIGNMENT = 64  # what XLA needs to use memory as it lies there, without a copy
DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
    }.items()
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class Lazy:
    """An array that is made while it is written: `parts` gives its elements in order, in pieces."""

    shape: tuple[int, ...]
    dtype: np.dtype
    parts: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array, filled = np.empty(self.shape, self.dtype), 0
        for part in self.parts():
            array.reshape(-1)[filled : filled + part.size] = part.reshape(-1)
            filled += part.size
        assert filled == array.size, (self.shape, filled)
        return array if dtype is None else array.astype(dtype, copy=False)


Tensor = np.ndarray | Lazy


def parts(x: Tensor) -> Iterable[np.ndarray]:
    """The pieces that a tensor is written in."""
    return x.parts() if isinstance(x, Lazy) else (x,)


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes the tensors to `path`, one piece in memory at a time."""
    # Those of a whole number of lines come first, so that each of them starts on one.
    names = sorted(
        tensors,
        key=lambda name: (
            tensors[name].nbytes % ALIGNMENT > 0,
            -tensors[name].dtype.itemsize,
            name,
        ),
    )
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for name in names:
        x = tensors[name]
        start, end = end, end + x.nbytes
        header[name] = {
            "dtype": NAMES[x.dtype],
            "shape": list(x.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            before = file.tell()
            for part in parts(tensors[name]):
                file.write(np.ascontiguousarray(part).reshape(-1).view(np.uint8).data)
            assert file.tell() - before == tensors[name].nbytes, name


def read(file: np.ndarray) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """(tensors, metadata) in the bytes of a file (1-D uint8, usually a memory map), as views of it.

    Raises InputError for a damaged or shortened file.
    """
    start = 8 + int.from_bytes(file[:8].tobytes(), "little")
    if start > min(len(file), MAX_HEADER_BYTES):
        raise InputError(f"the file ends inside its safetensors header; {AGAIN}")
    try:
        header = json.loads(file[8:start].tobytes())
        metadata = header.pop("__metadata__", {})
        data = file[start:]
        return {name: _view(data, **entry) for name, entry in header.items()}, metadata
    except (ValueError, RecursionError, TypeError, AttributeError) as error:
        raise InputError(f"its safetensors header is damaged ({error}); {AGAIN}") from error


def _view(data: np.ndarray, dtype: str, shape: list[int], data_offsets: list[int]) -> np.ndarray:
    if dtype not in DTYPES:
        raise InputError(f"it has a tensor of type {dtype}; allowed: {', '.join(DTYPES)}")
    start, stop = data_offsets
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if stop - start != nbytes or min(shape, default=0) < 0 or not 0 <= start <= stop <= len(data):
        raise InputError(
            f"a tensor of {dtype} and shape {short(shape)} is said to fill bytes {start} to {stop} "
            f"of {len(data)}"
        )
    return np.ndarray(tuple(shape), DTYPES[dtype], data, start)
