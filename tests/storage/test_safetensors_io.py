import json
import os
import signal
import struct
import subprocess
import sys
import weakref

import numpy as np
import pytest
from ml_dtypes import bfloat16, float8_e4m3fn
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from tests.helpers.paths import ROOT
from varjax.errors import DamagedFileError, InputError
from varjax.storage import safetensors_io
from varjax.storage.safetensors_io import (
    LazyArray,
    check_tensors,
    read_safetensors,
    write_safetensors,
)

RNG = np.random.default_rng(0)
ARRAYS = {
    "odd": RNG.standard_normal(3).astype(np.float32),
    "large": RNG.standard_normal((8, 16)).astype(np.float32).T,
    "half": np.ones(5, bfloat16),
    "levels": np.arange(7),
    "number": np.array(3, np.float16),
    "none": np.zeros((0, 4), np.float32),
    "next": RNG.standard_normal(16).astype(np.float32),
}
LAZY = LazyArray((2, 3), np.dtype(np.float32), lambda: iter(np.ones((2, 3), np.float32)))


def check_arrays(read):
    assert read.keys() == ARRAYS.keys()
    for name, x in ARRAYS.items():
        assert (read[name].dtype, read[name].shape) == (x.dtype, x.shape)
        np.testing.assert_array_equal(read[name], x)


def test_the_safetensors_library_reads_written_files(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, ARRAYS, {"from": "here"})
    ours, metadata = read_safetensors(path)
    with safe_open(path, "np") as file:
        assert file.metadata() == metadata
    check_arrays(load_file(path))
    assert json.loads(metadata.pop("xxh3_128")).keys() == {"__metadata__", *ARRAYS}
    assert metadata == {"from": "here"}
    check_arrays(ours)
    # Tensors whose size is a multiple of 64 bytes are aligned, so XLA on a CPU needs no copy.
    for name in ("large", "next"):
        assert ours[name].ctypes.data % 64 == 0 and not ours[name].flags.writeable


def test_each_flipped_bit_is_detected_or_changes_nothing(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, ARRAYS | {"lazy": LAZY}, {"from": "here"})
    content, detected = path.read_bytes(), 0
    for bit in range(0, 8 * len(content), 61):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        path.write_bytes(flipped)
        try:
            tensors, metadata = read_safetensors(path)
            check_tensors(path, tensors, metadata)
        except InputError:
            detected += 1
            continue
        np.testing.assert_array_equal(tensors.pop("lazy"), np.asarray(LAZY))
        check_arrays(tensors)
        assert metadata["from"] == "here"
    assert detected > 0.8 * 8 * len(content) / 61


def test_damage_is_reported_with_the_name_of_the_tensor(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, ARRAYS, {})
    content = bytearray(path.read_bytes())
    content[content.index(ARRAYS["next"].tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(DamagedFileError, match="x.safetensors is damaged: .* 1 of 7 .*'next'"):
        check_tensors(path, *read_safetensors(path))


def test_files_of_the_safetensors_library_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({name: np.array(x, order="C") for name, x in ARRAYS.items()}, path)
    read, metadata = read_safetensors(path)
    check_arrays(read)
    assert metadata == {}
    check_tensors(path, read, metadata)  # without checksums, nothing is compared


def test_empty_files_and_float8_round_trip(tmp_path):
    path = tmp_path / "x"
    for tensors in (
        {},
        {"none": np.zeros((0, 4), np.float32)},
        {"eighth": np.arange(4, dtype=np.float32).astype(float8_e4m3fn)},
    ):
        write_safetensors(path, tensors, {})
        read, _ = read_safetensors(path)
        assert read.keys() == tensors.keys()
        for name, x in tensors.items():
            assert (read[name].dtype, read[name].tobytes()) == (x.dtype, x.tobytes())


def test_reading_does_not_load_the_tensors_into_memory(tmp_path):
    path = tmp_path / "x"
    text = b'{"x":{"dtype":"F32","shape":[%d],"data_offsets":[0,%d]}}' % (2**34, 2**36)
    with open(path, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + 2**36)  # a sparse file of 64 GiB
    assert read_safetensors(path)[0]["x"][-3:].tolist() == [0, 0, 0]


def test_truncated_files_are_refused(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, ARRAYS, {})
    content = path.read_bytes()
    for size in (0, 3, 8, 50, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(InputError, match="x.safetensors: truncated .* download it again"):
            read_safetensors(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(InputError, match="x.safetensors: truncated or not"):
        read_safetensors(path)


def with_header(path, header: bytes, size=16):
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(size))
    return path


@pytest.mark.parametrize(
    "header",
    [
        b'{"x":{"dtype":"F32","shape":[4],"data_offsets":[0,12]}}',
        b'{"x":{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}',
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,16]}}',  # a gap
        b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}',  # unused bytes at the end
        b'{"x":{"dtype":"F32","shape":[-3],"data_offsets":[12,0]}}',
        b'{"x":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,16]}}',
        b'{"x":{"dtype":"F32"}}',
        b'{"x":{"dtype":"TEXT","shape":[4],"data_offsets":[0,16]}}',
        b'{"x":[[[',
        b'{"x":' + b"[" * 10**5,
    ],
)
def test_wrong_headers_are_refused(tmp_path, header):
    with pytest.raises(InputError, match="x: truncated or not a safetensors file"):
        read_safetensors(with_header(tmp_path / "x", header))


@pytest.mark.parametrize(
    "shape, end, problem",
    [
        ("1," * 79999 + "4", 16, "at most 64 integers"),
        ("1," * 64 + "4", 16, "at most 64 integers"),
        (f"0,{2**62}", 0, "non-negative integers"),
        (f"0,{2**47},{2**47}", 0, "larger than any memory"),
    ],
)
def test_shapes_that_numpy_does_not_support_are_refused(tmp_path, shape, end, problem):
    header = f'{{"x":{{"dtype":"F32","shape":[{shape}],"data_offsets":[0,{end}]}}}}'
    with pytest.raises(InputError, match=f"x: a tensor has size .*{problem}"):
        read_safetensors(with_header(tmp_path / "x", header.encode(), end))


def test_headers_are_limited_and_their_errors_are_short(tmp_path, monkeypatch):
    path = tmp_path / "x"
    one = '{"%s":{"dtype":"%s","shape":[4],"data_offsets":[0,16]}}'
    for name in ("x" * 600, "\\u001b[2J"):
        with pytest.raises(InputError, match="names have at most 512 printable characters"):
            read_safetensors(with_header(path, (one % (name, "F32")).encode()))
    for dtype in ("F" * 10**5, "\\u001b[2J"):
        with pytest.raises(InputError, match="x: truncated or not") as error:
            read_safetensors(with_header(path, (one % ("x", dtype)).encode()))
        assert len(str(error.value)) < 500 and str(error.value).isprintable()
    write_safetensors(path, ARRAYS, {})
    monkeypatch.setattr(safetensors_io, "MAX_TENSORS", len(ARRAYS) - 1)
    with pytest.raises(InputError, match="x: 7 tensors; at most 6 are allowed"):
        read_safetensors(path)
    monkeypatch.setattr(safetensors_io, "MAX_HEADER_BYTES", 100)
    with pytest.raises(InputError, match=r"x: truncated or not .*\(a header of \d+ bytes"):
        read_safetensors(path)


@pytest.mark.parametrize("dtype, count", [("F4", 32), ("F8_E8M0", 16)])
def test_unsupported_dtypes_are_named(tmp_path, dtype, count):
    header = f'{{"x":{{"dtype":"{dtype}","shape":[{count}],"data_offsets":[0,16]}}}}'
    with pytest.raises(InputError, match=f"x: has tensors of type {dtype}; allowed: F64, F32"):
        read_safetensors(with_header(tmp_path / "x", header.encode()))


def test_lazy_tensors_are_written_in_chunks(tmp_path):
    made = []

    def chunks():
        for i in range(3):
            assert sum(chunk() is not None for chunk in made) <= 1  # the one before
            chunk = np.full((1, 2), i, np.float32)
            made.append(weakref.ref(chunk))
            yield chunk

    lazy = LazyArray((3, 2), np.dtype(np.float32), chunks)
    x = np.array([[0, 0], [1, 1], [2, 2]], np.float32)
    write_safetensors(tmp_path / "x", {"x": lazy, "y": lazy}, {})
    assert len(made) == 6 and lazy.nbytes == x.nbytes
    np.testing.assert_array_equal(load_file(tmp_path / "x")["y"], x)
    np.testing.assert_array_equal(np.asarray(lazy), x)
    with pytest.raises(AssertionError):  # fewer chunks than the shape needs
        write_safetensors(tmp_path / "x", {"x": LazyArray((4, 2), lazy.dtype, chunks)}, {})


def test_a_file_that_changes_while_its_header_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.zeros(1000)}, {})
    memmap = np.memmap

    def replace_and_map(*arguments):
        (tmp_path / "other").write_bytes(path.read_bytes())
        os.replace(tmp_path / "other", path)
        return memmap(*arguments)

    monkeypatch.setattr(np, "memmap", replace_and_map)
    with pytest.raises(
        InputError, match="x.safetensors: was truncated or replaced while it was read"
    ):
        read_safetensors(path)


def test_truncating_a_mapped_file_ends_the_command_with_a_stack_trace(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": np.zeros(10**6)}, {})
    code = f"""
import os
from varjax.runtime.commands import run_command
from varjax.storage.safetensors_io import read_safetensors
def use_weights():
    tensors, _ = read_safetensors({str(path)!r})
    os.truncate({str(path)!r}, 4096)
    tensors["a"].sum()
run_command("x", use_weights)
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in done.stderr and "in use_weights" in done.stderr
