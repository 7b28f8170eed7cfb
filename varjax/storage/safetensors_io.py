"""Reads .safetensors files as memory-mapped arrays and writes them as a stream.

    write_safetensors("model.safetensors", {"kernel": np.zeros((8, 16), np.float32)}, {})
    tensors, metadata = read_safetensors("model.safetensors")

The safetensors library reads and checks the headers. Tensors are read by a memory map instead,
because the library copies each of them. A map leaves unused tensors on the disk, and XLA on a CPU
computes with the mapped pages. The library's writer needs all tensors in memory at once, so this
module writes the files, one chunk of one tensor at a time.

The metadata in the header contain a checksum of each tensor. Files without checksums are read
without a check.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from varjax.errors import DamagedFileError, InputError, errors_naming
from varjax.storage.checksums import array_checksum, contiguous_bytes
from varjax.storage.untrusted import check_name, check_shape, reason, shown

# The format allows headers of 100 MB. Models have headers of less than 1 MB, and the library needs
# up to 20 times a header's size in memory.
MAX_HEADER_BYTES, MAX_TENSORS = 2**23, 2**16
CHECKSUMS = "xxh3_128"  # entry of the metadata: JSON, by names of tensors
METADATA = "__metadata__"  # no tensor can have this name
ALIGNMENT = 64  # bytes; XLA uses memory with this alignment without a copy
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
        "C64": np.complex64,
    }.items()
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclasses.dataclass(frozen=True)
class LazyArray:
    """Describes an array that is computed in chunks while it is written.

        LazyArray((2, 3), np.dtype(np.float32), lambda: (row_3 for row_3 in rows_23))

    Attributes:
        shape: shape of the whole array.
        dtype: dtype of every chunk.
        chunks: function that returns the elements in C order, as arrays of any shape. Each use of
            the array calls it once.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __array__(self, dtype=None, copy=None) -> np.ndarray:
        array, position = np.empty(self.shape, self.dtype), 0
        for chunk in self.chunks():
            array.reshape(-1)[position : position + chunk.size] = chunk.reshape(-1)
            position += chunk.size
        assert position == array.size, (self.shape, position)
        return array if dtype is None else array.astype(dtype, copy=False)


Tensor = np.ndarray | LazyArray


def tensor_chunks(tensor: Tensor) -> Iterable[np.ndarray]:
    """Returns the chunks in which a tensor is written; a NumPy array is a single chunk."""
    return tensor.chunks() if isinstance(tensor, LazyArray) else (tensor,)


def write_safetensors(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> None:
    """Writes a .safetensors file with one chunk of one tensor in memory at a time.

    Args:
        path: file to write in place; `files.write_tensors` writes atomically.
        tensors: arrays by name, of the dtypes in DTYPES.
        metadata: text by name, stored in the header.
    """
    assert CHECKSUMS not in metadata
    # Tensors whose size is a multiple of ALIGNMENT come first, so that each of them is aligned.
    names = sorted(
        tensors,
        key=lambda name: (
            tensors[name].nbytes % ALIGNMENT > 0,
            -tensors[name].dtype.itemsize,
            name,
        ),
    )
    header: dict[str, object] = {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    # The checksums are known only once all tensors are written; until then, they are zeros.
    checksums = {METADATA: _metadata_checksum(metadata)} | dict.fromkeys(names, "0" * 32)
    with open(path, "wb") as file:
        text = _header_text(header, metadata, checksums)
        file.write(text)
        for name in names:
            tensor, before = tensors[name], file.tell()

            def written(chunks: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
                for chunk in chunks:
                    file.write(contiguous_bytes(chunk))
                    yield chunk

            chunks = written(tensor_chunks(tensor))
            checksums[name] = array_checksum(tensor.dtype, tensor.shape, chunks)
            assert file.tell() - before == tensor.nbytes, name
        file.seek(0)
        assert len(final := _header_text(header, metadata, checksums)) == len(text)
        file.write(final)


def _header_text(
    header: Mapping[str, object], metadata: Mapping[str, str], checksums: Mapping[str, str]
) -> bytes:
    """Returns the start of a file, padded so that the first tensor is aligned."""
    entries = {**metadata, CHECKSUMS: json.dumps(checksums, separators=(",", ":"))}
    text = json.dumps({METADATA: entries, **header}).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _metadata_checksum(metadata: Mapping[str, str]) -> str:
    others = sorted((name, text) for name, text in metadata.items() if name != CHECKSUMS)
    return array_checksum(
        np.dtype(np.uint8), (), (np.frombuffer(json.dumps(others).encode(), "u1"),)
    )


def read_safetensors(
    path: str | os.PathLike[str],
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Reads the header of a .safetensors file and maps its tensors, which are read when used.

    A file must not be truncated while it is mapped. This function raises an error if that happens
    during the call. Later, access to a missing part raises SIGBUS, which ends the process; commands
    then print the Python stack (`runtime.commands.run_command`). A file that `files.atomic_path`
    replaces stays mapped unchanged.

    Checksums are compared by `check_tensors`, which reads the whole file.

    Returns:
        ({name: read-only view of the file}, {name: text of the metadata}).

    Raises:
        InputError: the file is damaged, truncated, or has a type that NumPy lacks.
    """
    with open(path, "rb") as file:
        before = os.fstat(file.fileno())
        header_bytes = int.from_bytes(file.read(8), "little")
    try:
        if header_bytes > MAX_HEADER_BYTES:
            raise SafetensorError(
                f"a header of {header_bytes} bytes; at most {MAX_HEADER_BYTES} are allowed"
            )
        with safe_open(path, framework="numpy") as file:
            # The library has checked that the tensors fill the file in this order, without gaps.
            names = file.offset_keys()
            if len(names) > MAX_TENSORS:
                raise InputError(f"{path}: {len(names)} tensors; at most {MAX_TENSORS} are allowed")
            slices = {name: file.get_slice(name) for name in names}
            kinds = {name: (x.get_dtype(), x.get_shape()) for name, x in slices.items()}
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise InputError(
            f"{path}: truncated or not a safetensors file ({reason(error)}); "
            "write or download it again"
        ) from error
    if foreign := sorted({dtype for dtype, _ in kinds.values()} - DTYPES.keys()):
        raise InputError(
            f"{path}: has tensors of type {', '.join(foreign)}; allowed: {', '.join(DTYPES)}. "
            "Save them as one of these"
        )
    file = np.memmap(path, np.uint8, "r")
    start = 8 + header_bytes
    tensors = {}
    with errors_naming(path):
        for name, (dtype, shape) in kinds.items():
            shape = check_shape(shape, DTYPES[dtype].itemsize)
            tensors[check_name(name)] = np.ndarray(shape, DTYPES[dtype], file, start)
            start += tensors[name].nbytes
    if start != len(file) or _identity(before) != _identity(os.stat(path)):
        raise InputError(f"{path}: was truncated or replaced while it was read; try again")
    return tensors, metadata


def check_tensors(
    path: str | os.PathLike[str], tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """Reads all tensors and compares their checksums, if the file has any.

    Args:
        path: name of the file, for the message.
        tensors: tensors returned by `read_safetensors`.
        metadata: metadata returned by `read_safetensors`.

    Raises:
        DamagedFileError: some tensors have changed.
    """
    if CHECKSUMS not in metadata:
        return
    try:
        expected = dict(json.loads(metadata[CHECKSUMS]))
    except (ValueError, TypeError, RecursionError):
        expected = {}
    changed = (tensors.keys() | {METADATA}) ^ expected.keys()
    if expected.get(METADATA) != _metadata_checksum(metadata):
        changed.add(METADATA)
    for name in tensors.keys() - changed:
        array = tensors[name]
        if array_checksum(array.dtype, array.shape, (array,)) != expected[name]:
            changed.add(name)
    if changed:
        raise DamagedFileError(
            f"{path} is damaged: the checksums of {len(changed)} of {len(tensors)} tensors do not "
            f"match, among them {shown(min(changed))}; write or download it again"
        )


def _identity(about: os.stat_result) -> tuple[int, ...]:
    return about.st_ino, about.st_size, about.st_mtime_ns
