"""Builds checkpoint files opcode by opcode, for tests of their readers."""

import pickle
import zipfile

import numpy as np
import pytest

from varjax.convert.pth import write
from varjax.convert.pth.read import MAGIC, read_checkpoint

DATA = np.arange(24, dtype=np.float32)
MACHINE = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"long": 4}}


def plain(value) -> bytes:
    """Returns the opcodes of plain data, without the pickle's start and end."""
    return pickle.dumps(value, 2)[2:-1]


def stored(kind="FloatStorage", key="0", count=24) -> bytes:
    kind_opcodes = f"ctorch\n{kind}\n".encode()
    location = plain("cpu")
    return b"(" + plain("storage") + kind_opcodes + plain(key) + location + plain(count) + b"tQ"


def tensor(size, stride, offset=0, storage=None) -> bytes:
    arguments = (storage or stored()) + plain(offset) + plain(size) + plain(stride)
    hooks = b"ccollections\nOrderedDict\n)R"
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + arguments + b"\x89" + hooks + b"tR"


def mapping(values: dict[str, bytes]) -> bytes:
    return b"}(" + b"".join(plain(k) + v for k, v in values.items()) + b"u"


def entries(**values: bytes) -> bytes:
    return b"\x80\x02" + mapping(values) + b"."


def archive(path, pickled: bytes, data=DATA, method=zipfile.ZIP_STORED, byteorder="little"):
    with zipfile.ZipFile(path, "w", method) as file:
        file.writestr("net/data.pkl", pickled)
        file.writestr("net/byteorder", byteorder)
        file.writestr("net/data/0", data.tobytes())
    return path


def legacy_file(content: bytes, keys, *storages, machine=MACHINE) -> bytes:
    """Returns a file in the format before PyTorch 1.6, from opcodes and the storages' `keys`."""
    blobs = b"".join(len(x).to_bytes(8, "little") + x.tobytes() for x in storages)
    head = MAGIC + pickle.dumps(1001, 2) + pickle.dumps(machine, 2)
    return head + b"\x80\x02" + content + b"." + pickle.dumps(keys, 2) + blobs


def refusal(path) -> str:
    with pytest.raises(ValueError) as caught:
        read_checkpoint(path)
    assert str(caught.value).startswith(f"{path}: ")
    return str(caught.value)


def write_trainer(path, models) -> None:
    """Writes a checkpoint like the official trainer's: {"epoch": 3, "trainer": {model: dict}}."""
    write_nested(path, {"epoch": 3, "trainer": models})


def write_nested(path, tree) -> None:
    """Writes a checkpoint of nested dicts with arrays and plain data."""
    tensors = []

    def opcodes(value) -> bytes:
        if isinstance(value, dict):
            return mapping({name: opcodes(x) for name, x in value.items()})
        if isinstance(value, np.ndarray):
            tensors.append(value)
            return write._tensor(len(tensors) - 1, value.dtype, value.shape)
        return plain(value)

    with zipfile.ZipFile(path, "w") as file:
        file.writestr("ckpt/data.pkl", b"\x80\x02" + opcodes(tree) + b".")
        for i, x in enumerate(tensors):
            file.writestr(f"ckpt/data/{i}", np.ascontiguousarray(x).tobytes())
