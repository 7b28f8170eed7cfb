import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors import safe_open
from safetensors.numpy import load_file

from varjax.core import safetensors_io
from varjax.core.safetensors_io import Lazy

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


def test_another_library_reads_what_is_written(tmp_path):
    path = tmp_path / "x.safetensors"
    safetensors_io.write(path, ARRAYS, {"from": "here"})
    with safe_open(path, "np") as file:
        assert file.metadata() == {"from": "here"}
    ours, metadata = safetensors_io.read(np.memmap(path, np.uint8, "r"))
    assert metadata == {"from": "here"} and ours.keys() == ARRAYS.keys()
    for read in (load_file(path), ours):
        for name, x in ARRAYS.items():
            assert (read[name].dtype, read[name].shape) == (x.dtype, x.shape)
            np.testing.assert_array_equal(read[name], x)
    # Whole lines lie on lines, so that a device on the host can use them where they are.
    for name in ("large", "next"):
        assert ours[name].ctypes.data % 64 == 0 and not ours[name].flags.writeable


def test_lazy_tensors_are_made_one_piece_at_a_time(tmp_path):
    alive = []

    def pieces():
        for i in range(3):
            alive.append(i)
            yield np.full((1, 2), i, np.float32)

    lazy = Lazy((3, 2), np.dtype(np.float32), pieces)
    x = np.array([[0, 0], [1, 1], [2, 2]], np.float32)
    safetensors_io.write(tmp_path / "x", {"x": lazy, "y": lazy}, {})
    assert alive == [0, 1, 2, 0, 1, 2] and lazy.nbytes == x.nbytes
    np.testing.assert_array_equal(load_file(tmp_path / "x")["y"], x)
    np.testing.assert_array_equal(np.asarray(lazy), x)
    with pytest.raises(AssertionError):  # fewer pieces than promised
        safetensors_io.write(tmp_path / "x", {"x": Lazy((4, 2), lazy.dtype, pieces)}, {})
