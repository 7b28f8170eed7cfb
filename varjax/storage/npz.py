"""Reads .npz and .npy files of unknown origin without trusting the sizes that they state.

    archive = NpzArchive("samples.npz")
    shape, dtype = archive.header("arr_0")
    label_N = archive.read("labels")

Before memory is allocated, an array's shape is compared with the size of its member, and the
member's size with that of the file. Pickles are never read.
"""

import contextlib
import io
import math
import os
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from typing import IO, Any

import numpy as np

from varjax.errors import InputError, StorageError
from varjax.storage.read_errors import machine_errno
from varjax.storage.untrusted import check_name, check_shape, open_regular_file, reason, shown

# Deflate shrinks zeros to 1/1000 of their size, images of digits to 1/10, and real arrays to 1/2.
MAX_RATIO, SMALL_BYTES = 64, 2**20
MAX_DIRECTORY_BYTES = 2**20  # of the list of members, about 60 bytes each
MAX_HEADER_BYTES = 10_000  # NumPy's limit
KINDS = "biufc"  # of dtypes: booleans, integers, floats, complex numbers
CHUNK_BYTES = 2**20
NOT_READABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    NotImplementedError,  # an unknown compression method
    RuntimeError,  # an encrypted member
    ValueError,
    EOFError,
    OSError,  # an impossible position
)
# NumPy evaluates the header's text, and tokenizes what it cannot evaluate.
NO_HEADER = (
    ValueError,
    TypeError,
    SyntaxError,
    tokenize.TokenError,
    RecursionError,
    MemoryError,
)
AGAIN = "make or copy it again"
SHOWN_NAMES = 8


class NpzArchive:
    """Reads the arrays of an .npz file on a disk, which is opened for each call.

    Args:
        path: .npz file to read.

    Attributes:
        names: names of the arrays, without ".npy".

    Raises:
        InputError: the file is damaged, is not an .npz, or states sizes that do not fit its own.
            The methods may raise this, too.
        StorageError: the machine failed; the file may be intact.
    """

    def __init__(self, path: str | os.PathLike):
        self._path = path
        with self._opened() as archive:
            names = archive.namelist()
        self.names = [name.removesuffix(".npy") for name in names if name.endswith(".npy")]

    def header(self, name: str) -> tuple[tuple[int, ...], np.dtype]:
        """Returns the shape and dtype of an array, which fit the number of bytes in the file."""
        with self._opened() as archive, _member(archive, name) as (_, shape, dtype, _):
            return shape, dtype

    def read(self, name: str) -> np.ndarray:
        """Reads an array into memory; check its `header` first if it may be large."""
        with self._opened() as archive, _member(archive, name) as (member, shape, dtype, fortran):
            data_N = np.empty(math.prod(shape), dtype)
            view, position = data_N.view(np.uint8), 0
            while position < len(view) and (part := member.read(CHUNK_BYTES)):
                view[position : position + len(part)] = np.frombuffer(part, np.uint8)
                position += len(part)
            if position < len(view):
                raise InputError(f"{name} is truncated; {AGAIN}")
        return data_N.reshape(shape, order="F" if fortran else "C")

    def rows(self, name: str, parts: Sequence[range]) -> Iterator[np.ndarray]:
        """Yields parts of an array, with one part in memory at a time.

        Args:
            name: name of an array in C order.
            parts: ranges of rows, in order and without overlap.
        """
        with self._opened() as archive, _member(archive, name) as (member, shape, dtype, fortran):
            if fortran:
                raise InputError(f"{name} is in Fortran order; save it in C order")
            row_bytes, row = math.prod(shape[1:]) * dtype.itemsize, 0
            for part in parts:
                gap = (part.start - row) * row_bytes
                while gap > 0 and (skipped := len(member.read(min(gap, CHUNK_BYTES)))):
                    gap -= skipped
                data, row = member.read(len(part) * row_bytes), part.stop
                if len(data) < len(part) * row_bytes:
                    raise InputError(f"{name} is truncated; {AGAIN}")
                yield np.frombuffer(data, dtype).reshape(len(part), *shape[1:])

    @contextlib.contextmanager
    def _opened(self) -> Iterator[zipfile.ZipFile]:
        with (
            _errors_naming(self._path, "an .npz"),
            _ZipBytes(self._path, opener=open_regular_file) as file,
            zipfile.ZipFile(file) as archive,
        ):
            file.listing = False
            _check_members(archive.infolist(), os.fstat(file.fileno()).st_size)
            yield archive


def read_zip_text(file: IO[bytes], name: str) -> str:
    """Reads a text file in a zip file, which may be in a bucket.

    Raises InputError if it is missing or larger than 1 MiB, or the zip file is damaged.
    """
    with _errors_naming(name, "text of a zip file"), zipfile.ZipFile(file) as archive:
        if name not in archive.namelist():
            raise InputError("the zip file does not contain it")
        if (size := archive.getinfo(name).file_size) > SMALL_BYTES:
            raise InputError(f"it has {size} bytes; at most {SMALL_BYTES} are allowed")
        return archive.read(name).decode()


class _ZipBytes(io.FileIO):
    """Limits the size of a zip file's list of members, because zipfile needs 10 times its size."""

    listing = True

    def read(self, size: int | None = -1) -> bytes:
        if self.listing and size is not None and size > MAX_DIRECTORY_BYTES:
            raise InputError(f"its list of members has {size} bytes; {AGAIN}")
        if self.listing and (size is None or size < 0):
            size = MAX_DIRECTORY_BYTES
        return super().read(-1 if size is None else size)


@contextlib.contextmanager
def _errors_naming(path: str | os.PathLike, kind: str) -> Iterator[None]:
    try:
        yield
    except StorageError:
        raise
    except InputError as error:
        raise InputError(f"{os.fspath(path)}: {error}") from error
    except NOT_READABLE as error:
        if code := machine_errno(error):
            raise StorageError(f"{path} cannot be read now: {os.strerror(code)}") from error
        raise InputError(f"{path} cannot be read as {kind} ({reason(error)}); {AGAIN}") from error


def _check_members(members: list[zipfile.ZipInfo], file_bytes: int) -> None:
    if len({member.filename for member in members}) < len(members):
        raise InputError(f"two of its members have the same name; {AGAIN}")
    for member in members:
        check_name(member.filename)
        known = member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
        if member.flag_bits & 1 or not known:
            raise InputError(
                f"{member.filename} is encrypted, or not compressed with deflate; save it with "
                "np.savez"
            )
    packed, unpacked = (
        sum(getattr(member, size) for member in members) for size in ("compress_size", "file_size")
    )
    if packed > file_bytes:
        raise InputError(f"its members have {packed} bytes, but the file {file_bytes}; {AGAIN}")
    if unpacked > max(SMALL_BYTES, MAX_RATIO * file_bytes):
        raise InputError(
            f"it unpacks from {file_bytes} to {unpacked} bytes, more than real arrays do; if you "
            "trust it, save it with np.savez, which does not compress"
        )


@contextlib.contextmanager
def _member(
    archive: zipfile.ZipFile, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype, bool]]:
    """Opens an array at its first number; yields (file, shape, dtype, Fortran order)."""
    if (file_name := f"{name}.npy") not in archive.namelist():
        names = [n.removesuffix(".npy") for n in archive.namelist()[:SHOWN_NAMES]]
        raise InputError(f"it has no {name}, only {', '.join(names) or 'nothing'}")
    with archive.open(file_name) as member:
        start, shape, fortran, dtype = _read_header(member, name)
        size = archive.getinfo(file_name).file_size - start
        yield member, *_checked(name, size, shape, fortran, dtype)


def _read_header(file: IO[bytes], name: str) -> tuple[int, Any, bool, np.dtype]:
    """Returns (bytes of the header, shape, Fortran order, dtype), unchecked."""
    start = file.read(8)
    if len(start) < 8 or start[:6] != np.lib.format.MAGIC_PREFIX:
        raise InputError(f"{name} does not start as an array does; {AGAIN}")
    version = start[6], start[7]
    if version not in ((1, 0), (2, 0)):  # 3.0 is for non-Latin names of fields
        raise InputError(f"{name} has the unknown version {version} of the .npy format")
    width = 2 if version == (1, 0) else 4
    length = file.read(width)
    if len(length) < width or (count := int.from_bytes(length, "little")) > MAX_HEADER_BYTES:
        raise InputError(f"{name} has a header that is truncated or too long; {AGAIN}")
    read = {
        (1, 0): np.lib.format.read_array_header_1_0,
        (2, 0): np.lib.format.read_array_header_2_0,
    }[version]
    try:
        shape, fortran, dtype = read(io.BytesIO(length + file.read(count)))
    except NO_HEADER as error:
        raise InputError(f"{name} has an invalid header ({reason(error)}); {AGAIN}") from error
    return 8 + width + count, shape, fortran, dtype


def _checked(
    name: str, size: int, shape: Any, fortran: bool, dtype: np.dtype
) -> tuple[tuple[int, ...], np.dtype, bool]:
    if dtype.kind not in KINDS:
        raise InputError(f"{name} has type {shown(str(dtype))}; only numbers are allowed")
    shape = check_shape(shape, dtype.itemsize)
    if (claimed := math.prod(shape) * dtype.itemsize) != size:
        raise InputError(
            f"{name} is {dtype} of shape {shown(shape)}, {shown(claimed)} bytes, but has "
            f"{size}; {AGAIN}"
        )
    return shape, dtype, fortran
