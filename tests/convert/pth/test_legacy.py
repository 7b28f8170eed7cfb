"""Files of PyTorch before 1.6, made by hand as Python 3 and, like VGG16 of 2017, Python 2 did."""

import numpy as np
import pytest

from tests.helpers.checkpoint_files import DATA, legacy_file, plain, refusal, stored, tensor
from varjax.convert.pth.read import MAGIC, read_checkpoint

HALF = np.arange(6, dtype=np.float16)


def short(text: str) -> bytes:
    """A string of Python 2."""
    return b"U" + bytes([len(text)]) + text.encode()


def old_stored(kind: str, key: str, count: int, part=b"N") -> bytes:
    location = short("cuda:0")
    start = b"(" + short("storage") + f"ctorch\n{kind}\n".encode()
    return start + short(key) + location + plain(count) + part + b"tQ"


def old_tensor(size, stride, storage) -> bytes:
    arguments = storage + plain(0) + plain(size) + plain(stride)
    return b"ctorch._utils\n_rebuild_tensor\n(" + arguments + b"tR"


def old_ordered_dict(values) -> bytes:
    """OrderedDict([[key, value], …]), as Python 2 saves it, with a module's versions."""
    pairs = b"".join(b"](" + short(key) + value + b"e" for key, value in values.items())
    versions = b"}" + short("_metadata") + b"}sb"
    return b"ccollections\nOrderedDict\n](" + pairs + b"e\x85R" + versions


PYTHON_2 = legacy_file(
    old_ordered_dict(
        {
            "features.0.weight": old_tensor((4, 6), (6, 1), old_stored("FloatStorage", "94", 24)),
            "features.0.bias": old_tensor((6,), (1,), old_stored("HalfStorage", "12", 6)),
        }
    ),
    ["12", "94"],
    HALF,
    DATA,
)


def test_python_2_s_state_dicts(tmp_path):
    (tmp_path / "x.pth").write_bytes(PYTHON_2)
    weights = read_checkpoint(tmp_path / "x.pth")
    assert list(weights) == ["features.0.weight", "features.0.bias"]
    np.testing.assert_array_equal(weights["features.0.weight"], DATA.reshape(4, 6))
    np.testing.assert_array_equal(weights["features.0.bias"], HALF)
    assert weights["features.0.bias"].dtype == np.float16


def test_python_3_s_state_dicts_and_shared_storages(tmp_path):
    storage = stored()[:-2] + b"NtQ"
    content = b"}(" + plain("x") + tensor((4, 6), (6, 1), 0, storage)
    content += plain("t") + tensor((6, 4), (1, 6), 0, storage) + plain("epoch") + plain(3) + b"u"
    (tmp_path / "x.pth").write_bytes(legacy_file(content, ["0"], DATA))
    back = read_checkpoint(tmp_path / "x.pth")
    np.testing.assert_array_equal(back["t"], DATA.reshape(4, 6).T)
    assert np.shares_memory(back["x"], back["t"]) and back["epoch"] == 3
    assert not back["x"].flags.writeable


@pytest.mark.parametrize("end", [len(MAGIC) + 3, 120, 300, len(PYTHON_2) - 100, len(PYTHON_2) - 1])
def test_cut_files_are_refused(tmp_path, end):
    (tmp_path / "x.pth").write_bytes(PYTHON_2[:end])
    assert "damaged" in refusal(tmp_path / "x.pth")


@pytest.mark.parametrize(
    "content, problem",
    [
        (legacy_file(plain({}), ["7"]), "its storages do not match those"),
        (legacy_file(plain({}), "7"), "its storages do not match those"),
        (legacy_file(plain({}), [], machine={}), "big-endian"),
        (legacy_file(plain({}), [], machine=3), "big-endian"),
        (
            legacy_file(old_tensor((2,), (1,), old_stored("FloatStorage", "1", 2)), [1], DATA),
            "do not match those",
        ),
        (
            legacy_file(old_tensor((2,), (1,), old_stored("FloatStorage", "1", 2)), ["1"], DATA),
            "storage '1' is not where it should be",
        ),
        (
            legacy_file(old_tensor((25,), (1,), old_stored("FloatStorage", "1", 24)), ["1"], DATA),
            "needs 25 elements",
        ),
        (
            legacy_file(
                old_tensor((2,), (1,), old_stored("FloatStorage", "1", 24, plain(("2", 0, 2)))),
                ["1"],
                DATA,
            ),
            "share storages in an old way",
        ),
        (
            legacy_file(old_tensor((2,), (1,), old_stored("FloatStorage", "1", 2**70)), ["1"]),
            "has about 10^21 elements",
        ),
        (
            legacy_file(old_tensor((2,), (1,), old_stored("FloatStorage", "1", 2**62)), ["1"]),
            "more than the file has bytes",
        ),
        (
            legacy_file(old_tensor((2,), (1,), old_stored("FloatStorage", "1", 2)), ["1", "1"]),
            "its storages do not match those",
        ),
        (legacy_file(b"cos\nsystem\n" + plain("true") + b"\x85R", []), "asks for 'os.system'"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path, content, problem):
    (tmp_path / "x.pth").write_bytes(content)
    assert problem in refusal(tmp_path / "x.pth")
