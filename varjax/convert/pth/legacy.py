"""Reads checkpoints of PyTorch before 1.6: a few pickles in a row, then the bytes of storages."""

from typing import Any

import numpy as np

from varjax.convert.pth.allowed import Storage
from varjax.convert.pth.unpickle import pickle_size, unpickle
from varjax.errors import InputError
from varjax.storage.untrusted import shown

MAGIC = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."  # how each such file starts
VERSION = 1001
CUT = "the file is cut short or damaged; download it again"


def read_legacy(file: np.ndarray, max_pickle_bytes: int) -> Any:
    """Reads such a file.

    Args:
        file: content of the file, 1-D uint8, usually a memory map.
        max_pickle_bytes: size that each pickle in it must be below.

    Returns:
        Its content, as `unpickle` gives it; the tensors are views of `file`.

    Raises:
        InputError: it is damaged, or holds anything but tensors and plain data.
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

    sizes: dict[str, tuple[int, int]] = {}  # elements and their bytes: only the content knows

    def note(dtype: np.dtype, key: str, count: int) -> Storage:
        if count * dtype.itemsize > len(file):
            raise InputError(
                f"storage {shown(key)} should hold {count} elements of {dtype.name}, more than "
                f"the file has bytes: {CUT}"
            )
        sizes[key] = count, dtype.itemsize
        return Storage(file[: count * dtype.itemsize], dtype)  # any numbers: it is thrown away

    unpickle(content, note, len(file))
    if not (
        isinstance(keys, list)
        and all(isinstance(key, str) for key in keys)
        and len(keys) == len(sizes)
        and set(keys) == sizes.keys()
    ):
        raise InputError(f"its storages are not those that its tensors need: {CUT}")
    data: dict[str, np.ndarray] = {}
    for key in keys:
        count, itemsize = sizes[key]
        start, position = position + 8, position + 8 + count * itemsize
        data[key] = file[start:position]
        if file[start - 8 : start].tobytes() != count.to_bytes(8, "little") or position > len(file):
            raise InputError(f"storage {shown(key)} is not where it should be: {CUT}")
    return unpickle(content, lambda dtype, key, count: Storage(data[key], dtype), len(file))


def _none(dtype: np.dtype, key: str, count: int) -> Storage:
    raise InputError("a tensor stands where none belongs")
