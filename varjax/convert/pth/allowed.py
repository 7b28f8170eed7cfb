"""The names that a PyTorch checkpoint may use, and their meaning here: arrays and plain data."""

import dataclasses
import math
import re
from reprlib import repr as short  # bounded: the full repr of a hostile object may never end
from typing import Any

import ml_dtypes
import numpy as np

from varjax.core.errors import InputError

STORAGES = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
    "ComplexFloatStorage": np.dtype(np.complex64),
    "ComplexDoubleStorage": np.dtype(np.complex128),
}
DTYPES = {
    dtype.name: dtype
    for dtype in (
        *STORAGES.values(),
        *map(np.dtype, (np.uint16, np.uint32, np.uint64)),
        *map(np.dtype, (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)),
    )
}
# A tensor of stride 0 can claim any size; beyond this it must be in proportion to its storage.
MAX_BROADCAST_BYTES = 2**26
REFUSED = (
    "a checkpoint of weights needs no such thing, so it was refused and nothing was executed. "
    "If you trust the file, save only its weights: torch.save(model.state_dict(), path)"
)


@dataclasses.dataclass(frozen=True)
class Storage:
    """Holds the bytes behind one or more tensors.

    Attributes:
        data: 1-D uint8, usually a memory map.
        dtype: type of the elements.
    """

    data: np.ndarray
    dtype: np.dtype


class Namespace(dict):
    """Holds the attributes of an argparse.Namespace: a trainer's settings, as plain data."""


def strided_view(
    data: np.ndarray, dtype: np.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> np.ndarray:
    """Views part of a storage as an array.

    Args:
        data: the storage, 1-D uint8.
        dtype: type of the elements.
        offset: of the first element, in elements.
        size: shape of the array.
        stride: distance between neighbours along each axis, in elements.

    Raises:
        InputError: an element would lie outside `data`, or the numbers are not plausible.
    """
    numbers = (offset, *size, *stride)
    if any(type(n) is not int or not 0 <= n < 2**48 for n in numbers) or len(size) != len(stride):
        raise InputError(
            f"a tensor has offset {short(offset)}, size {short(size)} and stride {short(stride)}; "
            "these must be non-negative integers, one stride per dimension: the file is damaged"
        )
    reach = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if 0 in size:
        return np.empty(size, dtype)
    if reach > len(data) // dtype.itemsize:
        raise InputError(
            f"a tensor of size {short(size)}, stride {short(stride)} and offset {offset} needs "
            f"{reach} elements, but its storage has {len(data) // dtype.itemsize}: "
            "the file is damaged"
        )
    if math.prod(size) * dtype.itemsize > max(MAX_BROADCAST_BYTES, 16 * len(data)):
        raise InputError(
            f"a storage of {len(data)} bytes is spread over a tensor of size {short(size)}, "
            "more than is plausible; save tensor.contiguous() if it is meant"
        )
    steps = tuple(step * dtype.itemsize for step in stride)
    return np.ndarray(size, dtype, data, offset * dtype.itemsize, steps)


def check_key(key: Any) -> Any:
    """Returns `key`; raises InputError if a dict or set of a checkpoint has no such keys."""
    # Hashing nested tuples can take exponential time, and no checkpoint is keyed by them.
    if not isinstance(key, str | int | float | bytes | None):
        raise InputError(f"its pickle has a key of type {type(key).__name__}; {REFUSED}")
    return key


def _rebuild_tensor(storage, offset, size, stride) -> np.ndarray:
    return _rebuild_tensor_v2(storage, offset, size, stride, False, {})


def _rebuild_tensor_v2(storage, offset, size, stride, _grad, _hooks, metadata=None) -> np.ndarray:
    dtype = storage.dtype  # version 3 is for types that have no storage class of their own
    return _rebuild_tensor_v3(storage, offset, size, stride, _grad, _hooks, dtype, metadata)


def _rebuild_tensor_v3(
    storage, offset, size, stride, _grad, _hooks, dtype, metadata=None
) -> np.ndarray:
    if not isinstance(storage, Storage):
        raise TypeError(f"a tensor over a {type(storage).__name__}")
    if metadata:
        raise InputError(
            "it holds a tensor that is conjugated or negated only when read; "
            "save tensor.resolve_conj().resolve_neg()"
        )
    if not isinstance(dtype, np.dtype):
        raise TypeError(f"a tensor of type {short(dtype)}")
    return strided_view(storage.data, dtype, offset, tuple(size), tuple(stride))


def _rebuild_parameter(tensor, _grad, _hooks, _state=None) -> np.ndarray:
    return tensor


def _ordered_dict(items=()) -> dict:
    return {check_key(key): value for key, value in items}


def _size(dimensions) -> tuple:
    return tuple(dimensions)


def _device(kind, index=None) -> str:
    return ":".join([kind] if index is None else [kind, format(index, "d")])


def _set(items=()) -> set:
    return set(map(check_key, items))


def _encode(text, encoding) -> bytes:
    if encoding != "latin1":
        raise InputError(f"its pickle encodes text as {short(encoding)}; {REFUSED}")
    return text.encode("latin1")


def _numpy_dtype(code, _align, _copy) -> np.dtype:
    if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code):
        raise InputError(f"its pickle holds a NumPy scalar of type {short(code)}; {REFUSED}")
    return np.dtype(code)


def _numpy_scalar(dtype, data) -> np.generic:
    if not isinstance(dtype, np.dtype) or dtype.itemsize != len(data):
        raise TypeError(f"a NumPy scalar of type {short(dtype)} in {len(data)} bytes")
    return np.frombuffer(data, dtype)[0]


ALLOWED: dict[str, Any] = {
    "argparse.Namespace": Namespace,
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    "torch.Size": _size,
    "torch.device": _device,
    "torch._utils._rebuild_tensor": _rebuild_tensor,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor_v2,
    "torch._utils._rebuild_tensor_v3": _rebuild_tensor_v3,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch._utils._rebuild_parameter_with_state": _rebuild_parameter,
    "torch.storage.UntypedStorage": DTYPES["uint8"],
    **{f"torch.{name}": dtype for name, dtype in (STORAGES | DTYPES).items()},
}
