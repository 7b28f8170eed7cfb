"""Reads idx files of unknown origin, the format of MNIST, without trusting the sizes they state."""

import contextlib
import gzip
import math
import os
import pathlib
import zlib
from collections.abc import Iterator
from typing import IO, Literal

import numpy as np

from varjax.errors import DamagedFileError, InputError
from varjax.storage import files
from varjax.storage.read_errors import machine_errno, retry_read
from varjax.storage.untrusted import open_regular_file, reason

Kind = Literal["images", "labels"]
AXES: dict[Kind, int] = {"images": 3, "labels": 1}
BYTES = 0x08  # the type of all arrays here, before the number of axes
GZIP_MAGIC = b"\x1f\x8b"
# Deflate shrinks zeros to 1/1000 of their size, and images of digits to 1/5.
MAX_RATIO, SMALL_BYTES = 64, 2**20
AGAIN = "download it again"


def read_header(path: pathlib.Path, kind: Kind) -> tuple[int, ...]:
    """Returns the shape that an idx file states: (N, H, W) for "images", (N,) for "labels".

    Raises InputError as `read_idx` does, as far as the header shows it.
    """

    def read() -> tuple[int, ...]:
        with _opened(path) as (file, most_bytes):
            return _header(path, file, kind, most_bytes)

    return retry_read(read, path)


def read_idx(path: pathlib.Path, kind: Kind) -> np.ndarray:
    """Reads a file of images, uint8 (N, H, W), or of labels, uint8 (N,).

    Args:
        path: file on a disk or in a bucket, packed with gzip or not, whatever its name says.
        kind: "images" or "labels".

    Raises:
        InputError: the file is of another kind, or is damaged (DamagedFileError).
        StorageError: the machine failed; the file may be intact.
    """

    def read() -> np.ndarray:
        with _opened(path) as (file, most_bytes):
            shape = _header(path, file, kind, most_bytes)
            size = math.prod(shape)
            content = file.read(size + 1)
        if len(content) != size:
            actual = "more" if len(content) > size else f"{len(content):,}"
            raise DamagedFileError(
                f"{path} is damaged: {size:,} bytes should follow its header, but {actual} do; "
                f"{AGAIN}"
            )
        return np.frombuffer(content, np.uint8).reshape(shape)

    return retry_read(read, path)


@contextlib.contextmanager
def _opened(path: pathlib.Path) -> Iterator[tuple[IO[bytes] | gzip.GzipFile, int]]:
    """Yields the unpacked content, and the largest number of bytes that it can plausibly have."""
    try:
        with open(files.local_copy(path), "rb", opener=open_regular_file) as file:
            size = os.fstat(file.fileno()).st_size
            packed = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
            file.seek(0)
            if not packed:
                yield file, size
                return
            with gzip.open(file) as unpacked:
                yield unpacked, size * MAX_RATIO + SMALL_BYTES
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DamagedFileError(f"{path} is damaged: {reason(error)}; {AGAIN}") from error
    except OSError as error:
        if machine_errno(error) is not None or isinstance(error, InputError):
            raise
        raise InputError(f"{path} cannot be read: {reason(error)}") from error


def _header(
    path: pathlib.Path, file: IO[bytes] | gzip.GzipFile, kind: Kind, most_bytes: int
) -> tuple[int, ...]:
    """Reads the shape in the header, which must fit the largest plausible size of the content."""
    start = file.read(4)
    if start != _magic(kind):
        other: Kind = "labels" if kind == "images" else "images"
        actual = f"begins with {start.hex() or 'nothing'}; give an idx file of bytes"
        if start == _magic(other):
            actual = f"holds {other}; were the files swapped?"
        raise InputError(
            f"{path} should hold {kind} and begin with {_magic(kind).hex()}, but {actual}"
        )
    axes = file.read(4 * AXES[kind])
    if len(axes) < 4 * AXES[kind]:
        raise DamagedFileError(f"{path} is damaged: it ends in its header; {AGAIN}")
    shape = tuple(np.frombuffer(axes, ">u4").tolist())
    if math.prod(shape) > most_bytes:
        raise DamagedFileError(
            f"{path} is damaged: its header states {' x '.join(map(str, shape))} bytes, more than "
            f"the file can hold; {AGAIN}"
        )
    if kind == "images" and min(shape[1:]) < 1:
        raise DamagedFileError(f"{path} is damaged: its images have {shape[1:]} pixels")
    return shape


def _magic(kind: Kind) -> bytes:
    return bytes([0, 0, BYTES, AXES[kind]])
