"""Lists the names that a PyTorch checkpoint may use, and what they mean: arrays or plain data."""

import dataclasses
import re
from typing import Any

import ml_dtypes
import numpy as np

from varjax.errors import InputError
from varjax.storage.untrusted import MAX_SIDE, check_integers, check_shape, shown

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
MAX_INT_KEY = 2**60  # larger integers can share a hash, and many such keys make a dict slow
REFUSED = (
    "a checkpoint of weights does not need this, so it was refused and nothing was executed. "
    "If you trust the file, save only its weights: torch.save(model.state_dict(), path)"
)


@dataclasses.dataclass(frozen=True)
class Storage:
    """Holds the bytes behind one or more tensors.

    Attributes:
        data: 1-D uint8, usually a memory map.
        dtype: dtype of the elements.
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
        dtype: dtype of the elements.
        offset: position of the first element, in elements.
        size: shape of the array.
        stride: distance between neighbors along each axis, in elements.

    Raises:
        InputError: an element would be outside `data`, or the numbers are not plausible.
    """
    size, stride = check_shape(size, dtype.itemsize), check_integers(stride)
    if len(size) != len(stride) or type(offset) is not int or not 0 <= offset < MAX_SIDE:
        raise InputError(
            f"a tensor has offset {shown(offset)}, size {shown(size)} and stride {shown(stride)}; "
            "these must be non-negative integers, one stride per dimension: the file is damaged"
        )
    if 0 in size:
        return np.empty(size, dtype)
    reach = offset + 1 + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if reach > len(data) // dtype.itemsize:
        raise InputError(
            f"a tensor of size {shown(size)}, stride {shown(stride)} and offset {offset} needs "
            f"{reach} elements, but its storage has {len(data) // dtype.itemsize}: "
            "the file is damaged"
        )
    steps = tuple(step * dtype.itemsize for step in stride)
    return np.ndarray(size, dtype, data, offset * dtype.itemsize, steps)


def check_key(key: Any) -> Any:
    """Returns `key`; raises InputError if dicts and sets of checkpoints do not have such keys."""
    # Hashing nested tuples can take exponential time, and no checkpoint is keyed by them.
    if not isinstance(key, str | int | float | bytes | None):
        raise InputError(f"its pickle has a key of type {type(key).__name__}; {REFUSED}")
    if isinstance(key, int) and abs(key) > MAX_INT_KEY:
        raise InputError(f"its pickle has the key {shown(key)}; {REFUSED}")
    return key


def _rebuild_tensor(storage, offset, size, stride) -> np.ndarray:
    return _rebuild_tensor_v2(storage, offset, size, stride, False, {})


def _rebuild_tensor_v2(storage, offset, size, stride, _grad, _hooks, metadata=None) -> np.ndarray:
    dtype = storage.dtype  # version 3 is for types without a storage class
    return _rebuild_tensor_v3(storage, offset, size, stride, _grad, _hooks, dtype, metadata)


def _rebuild_tensor_v3(
    storage, offset, size, stride, _grad, _hooks, dtype, metadata=None
) -> np.ndarray:
    if not isinstance(storage, Storage):
        raise TypeError(f"a tensor over a {type(storage).__name__}")
    if metadata:
        raise InputError(
            "it holds a tensor that is to be conjugated or negated when it is read; "
            "save tensor.resolve_conj().resolve_neg()"
        )
    if not isinstance(dtype, np.dtype):
        raise TypeError(f"a tensor of type {shown(dtype)}")
    return strided_view(storage.data, dtype, offset, size, stride)


def _rebuild_parameter(tensor, _grad, _hooks, _state=None) -> np.ndarray:
    return tensor


def _ordered_dict(items=()) -> dict:
    return {check_key(key): value for key, value in map(_checked, _checked(items))}


def _size(dimensions) -> tuple:
    return check_integers(dimensions)


def _device(kind, index=None) -> str:
    if type(kind) is not str or len(kind) > 32:
        raise TypeError(f"a device called {shown(kind)}")
    return ":".join([kind] if index is None else [kind, format(index, "d")])


def _set(items=()) -> set:
    return set(map(check_key, _checked(items)))


def _encode(text, encoding) -> bytes:
    if not isinstance(encoding, str) or encoding != "latin1":
        raise InputError(f"its pickle encodes text as {shown(encoding)}; {REFUSED}")
    return text.encode("latin1")


def _numpy_dtype(code, _align, _copy) -> np.dtype:
    if not isinstance(code, str) or not re.fullmatch(r"[biufc]\d{1,2}", code):
        raise InputError(f"its pickle holds a NumPy scalar of type {shown(code)}; {REFUSED}")
    return np.dtype(code)


def _numpy_scalar(dtype, data) -> np.generic:
    if not isinstance(dtype, np.dtype) or not isinstance(data, bytes):
        raise TypeError(f"a NumPy scalar of type {shown(dtype)} made of a {type(data).__name__}")
    if dtype.itemsize != len(data):
        raise TypeError(f"a NumPy scalar of type {dtype} in {len(data)} bytes")
    return np.frombuffer(data, dtype)[0]


def _checked(items) -> list | tuple:
    # A tensor can also be iterated, and with a stride of 0 it can have any length.
    if not isinstance(items, list | tuple):
        raise TypeError(f"a {type(items).__name__} where a list of items belongs")
    return items


ALLOWED: dict[str, Any] = {
    "argparse.Namespace": Namespace,
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
    # Old versions of Lightning key a callback's state by its class, which stays a text here.
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint": "ModelCheckpoint",
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
