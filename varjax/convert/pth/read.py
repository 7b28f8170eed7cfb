"""Reads PyTorch (.pth, .pt, .ckpt) and .safetensors files as memory-mapped NumPy arrays."""

import functools
import io
import os
import struct
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from varjax.convert.pth.allowed import Storage
from varjax.convert.pth.unpickle import pickle_size, unpickle
from varjax.errors import InputError, errors_naming
from varjax.storage import safetensors_io
from varjax.storage.untrusted import plausible_bytes, reason, shown

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # start of files from PyTorch before 1.6
VERSION = 1001
CUT = "the file is cut short or damaged; download it again"


def read_legacy(file: np.ndarray, max_pickle_bytes: int) -> Any:
    """Reads a file in the format of PyTorch before 1.6.

    Args:
        file: content of the file, 1-D uint8, usually a memory map.
        max_pickle_bytes: limit of the size of each pickle in it.

    Returns:
        The content, as `unpickle` returns it; tensors are views of `file`.

    Raises:
        InputError: the file is damaged, or holds anything but tensors and plain data.
    """
    position = len(MAGIC)

    def next_pickle() -> bytes:
        nonlocal position
        window = file[position : position + max_pickle_bytes].tobytes()
        size = pickle_size(window)
        position += size
        return window[:size]

    if (version := unpickle(next_pickle(), _none)) != VERSION:
        raise InputError(f"it has version {shown(version)} of an old format; known is {VERSION}")
    machine = unpickle(next_pickle(), _none)
    if not (isinstance(machine, dict) and machine.get("little_endian")):
        raise InputError("it was saved on a big-endian machine; save it on a little-endian one")
    content, keys = next_pickle(), unpickle(next_pickle(), _none)

    sizes: dict[str, tuple[int, int]] = {}  # (elements, bytes of each), stated only in the content

    def note(dtype: np.dtype, key: str, count: int) -> Storage:
        if count * dtype.itemsize > len(file):
            raise InputError(
                f"storage {shown(key)} should hold {count} elements of {dtype.name}, more than "
                f"the file has bytes: {CUT}"
            )
        sizes[key] = count, dtype.itemsize
        return Storage(file[: count * dtype.itemsize], dtype)  # a placeholder that is discarded

    unpickle(content, note, len(file))
    if not (
        isinstance(keys, list)
        and all(isinstance(key, str) for key in keys)
        and len(keys) == len(sizes)
        and set(keys) == sizes.keys()
    ):
        raise InputError(f"its storages do not match those that its tensors need: {CUT}")
    data: dict[str, np.ndarray] = {}
    for key in keys:
        count, itemsize = sizes[key]
        start, position = position + 8, position + 8 + count * itemsize
        data[key] = file[start:position]
        if file[start - 8 : start].tobytes() != count.to_bytes(8, "little") or position > len(file):
            raise InputError(f"storage {shown(key)} is not where it should be: {CUT}")
    return unpickle(content, lambda dtype, key, count: Storage(data[key], dtype), len(file))


def _none(dtype: np.dtype, key: str, count: int) -> Storage:
    raise InputError("it has a tensor where none belongs")


MAX_PICKLE_BYTES = 2**24  # a full trainer checkpoint of the largest VAR needs about 2**19
MAX_DIRECTORY_BYTES = 2**22  # of a zip file's list of members, about 100 bytes for each
# Errors that zipfile raises; OSError comes from a seek to an impossible position.
DAMAGED_ZIP = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    UnicodeDecodeError,
    OSError,
)
AGAIN = "download it again"
RESAVE = "re-save it in a recent PyTorch with torch.save(torch.load(path), new_path)"
NOT_WEIGHTS = {  # first bytes -> what the file is and what to do
    b"\x80": f"a bare pickle, not a checkpoint of a recent torch.save; {RESAVE}",
    b"version https://git-lfs": "a Git LFS pointer instead of the weights; run `git lfs pull`",
    b"<": "a web page instead of the weights; download the file itself",
}


def read_checkpoint(path: str | os.PathLike[str]) -> Any:
    """Reads a checkpoint in any of PyTorch's formats or in .safetensors, recognized by its content.

    Nothing in the file is ever executed.

    Returns:
        Nested dicts, lists, … with tensors as NumPy arrays: read-only views of one memory map
        (unless a zip member is compressed), so that nothing is read before it is used. Strides and
        shared storages are kept.

    Raises:
        InputError: the file is missing, damaged, not a checkpoint, or holds anything but tensors
            and plain data.
    """
    path = Path(path)
    try:
        return _read(path)
    except MemoryError as error:
        raise InputError(f"{path}: too little memory to read it") from error


def _read(path: Path) -> Any:
    if not path.is_file():
        problem = "is a folder; give the file in it" if path.is_dir() else "does not exist"
        raise InputError(f"{path}: {problem}")
    if path.stat().st_size == 0:
        raise InputError(f"{path}: is empty; {AGAIN}")
    try:
        file = np.memmap(path, np.uint8, "r")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error})") from error
    head = file[:512].tobytes()
    header_bytes = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header_bytes < 2**32:  # read_safetensors checks the header's size
        return safetensors_io.read_safetensors(path)[0]
    with errors_naming(path):
        if head.startswith(b"PK\x03\x04"):
            return _read_zip(path, file)
        if head.startswith(MAGIC):
            return read_legacy(file, MAX_PICKLE_BYTES)
        for start, problem in NOT_WEIGHTS.items():
            if head.lstrip().startswith(start):
                raise InputError(f"this is {problem}")
        if head[257:262] == b"ustar":
            raise InputError(f"this is a tar file, as PyTorch wrote before 0.1.10; {RESAVE}")
        raise InputError(
            f"this is not a PyTorch or safetensors file (it starts with {shown(head[:16])}); "
            f"{AGAIN}"
        )


class _DirectoryFile(io.FileIO):
    """Limits how much zipfile reads for its list of members, which takes 10 times that memory."""

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size > MAX_DIRECTORY_BYTES:
            raise InputError(f"its list of members has {size} bytes; is it a checkpoint?")
        return super().read(MAX_DIRECTORY_BYTES if size is None or size < 0 else size)


def _read_zip(path: Path, file: np.ndarray) -> Any:
    try:
        with _DirectoryFile(path) as directory, zipfile.ZipFile(directory) as archive:
            return _read_members(archive.infolist(), file)
    except DAMAGED_ZIP as error:
        problem = f"cut short or damaged ({reason(error)})"
        raise InputError(f"the zip file is {problem}; {AGAIN}") from error


def _read_members(listed: list[zipfile.ZipInfo], file: np.ndarray) -> Any:
    members = {member.filename: member for member in listed}
    if len(members) < len(listed):
        raise InputError(f"two members of the zip file have the same name; {AGAIN}")
    _check_compression(listed, len(file))
    pickles = [name for name in members if name.endswith("/data.pkl") and name.count("/") == 1]
    if len(pickles) != 1:
        raise InputError("this zip file was not written by torch.save: it has no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if members[pickles[0]].file_size > MAX_PICKLE_BYTES:
        raise InputError(
            f"its pickle has {members[pickles[0]].file_size} bytes; is it a checkpoint?"
        )
    order = members.get(root + "byteorder")
    if order and (order.file_size > 6 or _content(order, file).tobytes() != b"little"):
        raise InputError("it was saved on a big-endian machine; save it on a little-endian one")

    @functools.cache  # tied tensors share their storage, compressed or not
    def content(name: str) -> np.ndarray:
        return _content(members[name], file)

    def storage(dtype: np.dtype, key: str, count: int) -> Storage:
        name = f"{root}data/{key}"
        if name not in members:
            raise InputError(f"a tensor refers to {shown(name)}, which the file lacks; {AGAIN}")
        if members[name].file_size != count * dtype.itemsize:
            raise InputError(
                f"{shown(name)} should hold {count} elements of {dtype.name} but has "
                f"{members[name].file_size} bytes; {AGAIN}"
            )
        return Storage(content(name), dtype)

    pickle = _content(members[pickles[0]], file).tobytes()
    if zlib.crc32(pickle) != members[pickles[0]].CRC:
        raise zipfile.BadZipFile("Bad CRC-32 of its pickle")
    return unpickle(pickle, storage, len(file))


def _check_compression(members: list[zipfile.ZipInfo], file_bytes: int) -> None:
    compressed = [m for m in members if m.compress_type != zipfile.ZIP_STORED]
    if any(m.flag_bits & 1 for m in members):
        raise InputError("the zip file is encrypted; unpack it and zip it without a password")
    if any(m.compress_type != zipfile.ZIP_DEFLATED for m in compressed):
        raise InputError(f"the zip file is compressed by a method other than deflate; {RESAVE}")
    unpacked = sum(m.file_size for m in compressed)
    if unpacked > plausible_bytes(file_bytes):  # compressed members are unpacked in memory
        raise InputError(
            f"the zip file unpacks from {file_bytes} to {unpacked} bytes, more than weights can; "
            f"if you trust it, {RESAVE}"
        )


def _content(member: zipfile.ZipInfo, file: np.ndarray) -> np.ndarray:
    """Returns the bytes of a member: a view of the file if it is not compressed."""
    name = shown(member.filename)
    # The central directory points to the local header, whose two lengths tell where content starts.
    header = file[member.header_offset : member.header_offset + 30].tobytes()
    if member.header_offset < 0 or len(header) < 30 or not header.startswith(b"PK\x03\x04"):
        raise InputError(f"the zip file is damaged at {name}; {AGAIN}")
    lengths = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
    start = member.header_offset + 30 + lengths
    stored = member.compress_type == zipfile.ZIP_STORED
    size = member.file_size if stored else member.compress_size
    if start + size > len(file):
        raise InputError(f"the file ends inside {name}; {AGAIN}")
    packed = file[start : start + size]
    if stored:
        return packed
    # Asking for one byte more than declared is enough to detect excess data.
    unpacked = zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed.data, member.file_size + 1)
    if len(unpacked) != member.file_size or zlib.crc32(unpacked) != member.CRC:
        raise zipfile.BadZipFile(f"{name} does not unpack to the data that was packed")
    return np.frombuffer(unpacked, np.uint8)
