"""Tests reading files of PyTorch before 1.6, which are made by hand here.

The weights of VGG16 from 2017 were saved with Python 2, whose pickles differ from Python 3's.
"""

import numpy as np
import pytest

from tests.helpers.checkpoint_files import DATA, legacy_file, plain, refusal, stored, tensor
from varjax.convert.pth.read import MAGIC, read_checkpoint

HALF = np.arange(6, dtype=np.float16)


def short(text: str) -> bytes:
    """Pickles a string as Python 2 does."""
    return b"U" + bytes([len(text)]) + text.encode()


def old_stored(kind: str, key: str, count: int, part=b"N") -> bytes:
    location = short("cuda:0")
    start = b"(" + short("storage") + f"ctorch\n{kind}\n".encode()
    return start + short(key) + location + plain(count) + part + b"tQ"


def old_tensor(size, stride, storage) -> bytes:
    arguments = storage + plain(0) + plain(size) + plain(stride)
    return b"ctorch._utils\n_rebuild_tensor\n(" + arguments + b"tR"


def old_ordered_dict(values) -> bytes:
    """Pickles OrderedDict([[key, value], …]) with a module's versions, as Python 2 does."""
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


def test_state_dicts_of_python_2_are_read(tmp_path):
    (tmp_path / "x.pth").write_bytes(PYTHON_2)
    weights = read_checkpoint(tmp_path / "x.pth")
    assert list(weights) == ["features.0.weight", "features.0.bias"]
    np.testing.assert_array_equal(weights["features.0.weight"], DATA.reshape(4, 6))
    np.testing.assert_array_equal(weights["features.0.bias"], HALF)
    assert weights["features.0.bias"].dtype == np.float16


def test_state_dicts_of_python_3_may_share_storages(tmp_path):
    storage = stored()[:-2] + b"NtQ"
    content = b"}(" + plain("x") + tensor((4, 6), (6, 1), 0, storage)
    content += plain("t") + tensor((6, 4), (1, 6), 0, storage) + plain("epoch") + plain(3) + b"u"
    (tmp_path / "x.pth").write_bytes(legacy_file(content, ["0"], DATA))
    back = read_checkpoint(tmp_path / "x.pth")
    np.testing.assert_array_equal(back["t"], DATA.reshape(4, 6).T)
    assert np.shares_memory(back["x"], back["t"]) and back["epoch"] == 3
    assert not back["x"].flags.writeable


@pytest.mark.parametrize("end", [len(MAGIC) + 3, 120, 300, len(PYTHON_2) - 100, len(PYTHON_2) - 1])
def test_truncated_files_are_refused(tmp_path, end):
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
def test_inconsistent_files_are_refused(tmp_path, content, problem):
    (tmp_path / "x.pth").write_bytes(content)
    assert problem in refusal(tmp_path / "x.pth")
