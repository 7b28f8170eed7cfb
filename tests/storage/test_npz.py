"""Tests that sizes stated in .npz and .npy files are checked before memory is allocated."""

import errno
import io
import os
import struct
import zipfile

import numpy as np
import pytest

from varjax.errors import InputError, StorageError
from varjax.storage import npz
from varjax.storage.npz import NpzArchive, read_zip_text

ARRAYS = {
    "arr_0": np.arange(60, dtype=np.uint8).reshape(5, 2, 2, 3),
    "sigma": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "nothing": np.zeros((0, 3), np.float32),
    "number": np.array(3, np.int64),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_arrays_are_read_as_they_were_saved(tmp_path, save):
    save(tmp_path / "x.npz", **ARRAYS)
    archive = NpzArchive(tmp_path / "x.npz")
    assert archive.names == list(ARRAYS)
    for name, array in ARRAYS.items():
        assert archive.header(name) == (array.shape, array.dtype)
        read = archive.read(name)
        np.testing.assert_array_equal(read, array)
        assert read.dtype == array.dtype
    parts = [range(1, 3), range(4, 5)]
    for part, rows in zip(parts, archive.rows("arr_0", parts), strict=True):
        np.testing.assert_array_equal(rows, ARRAYS["arr_0"][part.start : part.stop])
    with pytest.raises(InputError, match="x.npz: sigma is in Fortran order"):
        list(archive.rows("sigma", parts))
    with pytest.raises(InputError, match="it has no mu, only arr_0, sigma"):
        archive.read("mu")


def header(shape: str, descr="'|u1'", order="False", version=1) -> bytes:
    text = f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}\n".encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H", len(text)) + text


def archive_of(path, method=zipfile.ZIP_STORED, **members):
    with zipfile.ZipFile(path, "w", method) as file:
        for name, content in members.items():
            file.writestr(f"{name}.npy", content)


@pytest.mark.parametrize(
    "content, message",
    {
        "a shape of 2^40": (header(f"({2**40}, 1, 1, 3)"), "shape .1099511627776.*, but has 9"),
        "a shape beyond all": (header(f"({2**62}, {2**62})"), "size or stride|size"),
        "a negative shape": (header("(-1, 9)"), "non-negative"),
        "a shape of floats": (header("(9.0,)"), "invalid header"),
        "one byte less": (header("(8,)"), "8 bytes, but has 9"),
        "one byte more": (header("(10,)"), "10 bytes, but has 9"),
        "objects": (header("(9,)", "'|O'"), "only numbers are allowed"),
        "text": (header("(9,)", "'<U1'"), "only numbers are allowed"),
        "text of 2^30": (header("(9,)", "'<U1073741824'"), "invalid header"),
        "records": (header("(9,)", "[('a', '|u1')]"), "only numbers are allowed"),
        "no type": (header("(9,)", "'|q9'"), "invalid header"),
        "nested": (header("(" * 300 + ")" * 300), "invalid header"),
        "brackets that do not close": (header("(" * 300), "invalid header"),
        "a call": (header("__import__('os')"), "invalid header"),
        "version 9": (header("(9,)", version=9), "version .9, 0."),
        "a long header": (
            b"\x93NUMPY\x02\x00" + struct.pack("<I", 2**31) + b" " * 9,
            "truncated or too long",
        ),
        "no array": (b"no array", "does not start"),
    }.values(),
)
def test_headers_that_do_not_fit_the_data_are_refused(tmp_path, content, message):
    content += bytes(9)
    archive_of(tmp_path / "x.npz", arr_0=content)
    archive = NpzArchive(tmp_path / "x.npz")
    with pytest.raises(InputError, match=f"x.npz: .*{message}"):
        archive.header("arr_0")
    with pytest.raises(InputError, match=f"x.npz: .*{message}"):
        archive.read("arr_0")


def test_a_zip_bomb_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, arr_0=np.zeros((1000, 64, 64, 3), np.uint8))
    with pytest.raises(InputError, match="x.npz: it unpacks from .* save it with np.savez"):
        NpzArchive(path)
    np.savez_compressed(path, labels=np.arange(100_000) // 1000)  # compresses well, but is small
    assert NpzArchive(path).read("labels")[-1] == 99


@pytest.mark.parametrize("field, value", [(20, 2**31), (24, 2**20)])
def test_wrong_sizes_in_the_zip_directory_are_refused(tmp_path, field, value):
    """Changes the compressed (offset 20) or uncompressed size (24) in the zip file's directory."""
    path, shape = tmp_path / "x.npz", (2**20 - 128,)
    array = header(str(shape)).ljust(128, b" ")
    array = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118) + array[10:127] + b"\n"
    archive_of(path, zipfile.ZIP_DEFLATED, arr_0=array + bytes(9))
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\x01\x02") + field
    content[at : at + 4] = struct.pack("<I", value)
    path.write_bytes(content)
    with pytest.raises(InputError, match="x.npz"):
        NpzArchive(path).read("arr_0")


def test_long_lists_of_members_and_equal_names_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.npz"
    archive_of(path, a=b"", b=b"")
    path.write_bytes(path.read_bytes().replace(b"b.npy", b"a.npy"))
    with pytest.raises(InputError, match="same name"):
        NpzArchive(path)
    monkeypatch.setattr(npz, "MAX_DIRECTORY_BYTES", 2**12)
    archive_of(path, **{f"{i:09d}": b"" for i in range(1000)})
    with pytest.raises(InputError, match="x.npz: its list of members"):
        NpzArchive(path)


def test_a_failing_machine_is_not_reported_as_a_damaged_file(tmp_path, monkeypatch):
    np.savez(tmp_path / "x.npz", **ARRAYS)

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(npz._ZipBytes, "read", fail)
    with pytest.raises(StorageError, match="x.npz cannot be read now: Input/output error"):
        NpzArchive(tmp_path / "x.npz")


def test_a_pipe_is_refused_without_blocking(tmp_path):
    os.mkfifo(path := tmp_path / "x.npz")
    with pytest.raises(InputError, match="x.npz: it is not a regular file"):
        NpzArchive(path)


def test_only_short_text_is_read():
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("request.json", "{}")
        archive.writestr("long.json", bytes(2**24))
    assert read_zip_text(file, "request.json") == "{}"
    with pytest.raises(InputError, match="long.json: it has 16777216 bytes"):
        read_zip_text(file, "long.json")
    with pytest.raises(InputError, match="x.json: the zip file does not contain it"):
        read_zip_text(file, "x.json")
    with pytest.raises(InputError, match="request.json cannot be read as text of a zip file"):
        read_zip_text(io.BytesIO(b"no zip"), "request.json")
