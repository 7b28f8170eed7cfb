"""Writes weights as a file that `torch.load` reads, without PyTorch."""

import math
import os
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from varjax.convert.pth.allowed import STORAGES
from varjax.errors import InputError
from varjax.storage import files
from varjax.storage.safetensors_io import Tensor

ALIGNMENT = 64  # as in torch.save, so that tensors are aligned when the file is memory-mapped
ZIP64_BYTES = 2**30  # members above this get 64-bit sizes, well before zip's limit of 2**32
ZIP64_FIELD = 20  # bytes that zipfile then appends to the local header
STORAGE_NAMES = {dtype: name for name, dtype in STORAGES.items()}
ORDERED_DICT = b"ccollections\nOrderedDict\n)R"


def write_pth(path: str | os.PathLike[str], state_dict: Mapping[str, Tensor]) -> None:
    """Writes a state dict such that `torch.load(path, weights_only=True)` reads it.

    The file appears complete or not at all, with one array in memory at a time.

    Args:
        path: file to write, in an existing folder.
        state_dict: arrays by name, lazy or not.

    Raises:
        InputError: a name is not a string, a type has no PyTorch storage class, or the folder does
            not exist.
        StorageError: the file cannot be written.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise InputError(f"{path}: the folder {path.parent} does not exist; create it first")
    for name, x in state_dict.items():
        if not isinstance(name, str):
            raise InputError(f"{path}: the name {name!r} is a {type(name).__name__}, not a string")
        if np.dtype(x.dtype) not in STORAGE_NAMES:
            allowed = ", ".join(dtype.name for dtype in STORAGE_NAMES)
            raise InputError(f"{path}: {name} has type {x.dtype}; convert it to one of {allowed}")
    with files.atomic_path(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        _write(archive, "data.pkl", _pickle(state_dict))
        _write(archive, "byteorder", b"little")
        for index, x in enumerate(state_dict.values()):
            # The bytes get no name, so that each tensor is freed before the next one is made.
            _write(archive, f"data/{index}", _bytes(x))
        _write(archive, "version", b"3\n")


def _write(archive: zipfile.ZipFile, name: str, content: bytes | memoryview) -> None:
    member = zipfile.ZipInfo(f"archive/{name}")  # dated 1980, so equal weights give equal files
    zip64 = len(content) > ZIP64_BYTES
    file = archive.fp
    assert file is not None
    before = file.tell() + 30 + len(member.filename) + 4 + ZIP64_FIELD * zip64
    padding = -before % ALIGNMENT
    member.extra = struct.pack("<2sH", b"FB", padding) + b"Z" * padding
    with archive.open(member, "w", force_zip64=zip64) as target:
        assert file.tell() % ALIGNMENT == 0, f"{name} starts at {file.tell()}"
        target.write(content)


def _bytes(x: Tensor) -> memoryview:
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8).data


def _pickle(state_dict: Mapping[str, Tensor]) -> bytes:
    """Pickles an OrderedDict of name -> torch._utils._rebuild_tensor_v2(…) by protocol 2."""
    tensors = (
        _text(name) + _tensor(index, np.dtype(x.dtype), x.shape)
        for index, (name, x) in enumerate(state_dict.items())
    )
    return b"\x80\x02" + ORDERED_DICT + b"(" + b"".join(tensors) + b"u."


def _tensor(index: int, dtype: np.dtype, shape: tuple[int, ...]) -> bytes:
    strides = (math.prod(shape[axis + 1 :]) for axis in range(len(shape)))
    kind = f"ctorch\n{STORAGE_NAMES[dtype]}\n".encode()
    count = math.prod(shape)
    storage = _tuple(_text("storage"), kind, _text(str(index)), _text("cpu"), _int(count)) + b"Q"
    size, stride = _tuple(*map(_int, shape)), _tuple(*map(_int, strides))
    no_grad = b"\x89"
    arguments = _tuple(storage, _int(0), size, stride, no_grad, ORDERED_DICT)
    return b"ctorch._utils\n_rebuild_tensor_v2\n" + arguments + b"R"


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"


def _text(text: str) -> bytes:
    encoded = text.encode()
    return b"X" + struct.pack("<I", len(encoded)) + encoded


def _int(value: int) -> bytes:
    if value < 2**31:
        return b"J" + struct.pack("<i", value)
    return b"\x8a\x08" + struct.pack("<q", value)
