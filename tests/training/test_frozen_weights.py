import threading

import numpy as np
import pytest

from tests.helpers import tiny
from varjax.errors import InputError
from varjax.storage import files
from varjax.training import initial_weights


class Weights(tiny.Tiny):
    """A task whose pretrained weights are `numbers`; None if they are gone."""

    numbers = np.arange(100, dtype=np.float32)

    def frozen(self):
        if self.numbers is None:
            raise InputError("the tokenizer does not exist")
        return {"a": {"kernel": self.numbers}}


def read(folder, numbers=Weights.numbers):
    Weights.numbers, before = numbers, Weights.numbers
    try:
        return initial_weights.frozen_weights(Weights().frozen, folder)["a"]["kernel"]
    finally:
        Weights.numbers = before


def damage(path, kind):
    content = bytearray(path.read_bytes())
    if kind == "removed":
        return path.unlink()
    if kind == "flipped":
        content[-100] ^= 1
    elif kind == "zeroed":
        content = bytes(len(content))
    elif kind == "halved":
        content = content[: len(content) // 2]
    path.write_bytes(content)


KINDS = ["removed", "flipped", "zeroed", "halved"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_copy_is_made_again_from_the_same_weights(tmp_path, kind, capsys):
    np.testing.assert_array_equal(read(tmp_path), Weights.numbers)
    np.testing.assert_array_equal(read(tmp_path, None), Weights.numbers)  # the copy is enough
    content = (tmp_path / "frozen.safetensors").read_bytes()
    damage(tmp_path / "frozen.safetensors", kind)
    np.testing.assert_array_equal(read(tmp_path), Weights.numbers)
    assert (tmp_path / "frozen.safetensors").read_bytes() == content
    assert ("copying these weights again" in capsys.readouterr().err) == (kind != "removed")


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_copy_is_not_replaced_by_other_weights(tmp_path, kind):
    read(tmp_path)
    damage(tmp_path / "frozen.safetensors", kind)
    with pytest.raises(InputError, match="frozen.safetensors.*different now: restore the file"):
        read(tmp_path, Weights.numbers + 1)
    with pytest.raises(InputError, match="frozen.safetensors.*does not exist; restore the file"):
        read(tmp_path, None)
    np.testing.assert_array_equal(read(tmp_path), Weights.numbers)
    damage(tmp_path / "frozen.safetensors", kind)
    (tmp_path / "frozen.json").unlink()
    if kind == "removed":  # as in a new run
        np.testing.assert_array_equal(read(tmp_path), Weights.numbers)
    else:
        with pytest.raises(InputError, match="not known to be the same: restore the file"):
            read(tmp_path)


def test_processes_wait_for_the_copy_of_the_first_process(tmp_path, monkeypatch):
    """A process that does not see the file yet would train without frozen weights."""
    path = tmp_path / "frozen.safetensors"
    write = lambda: files.write_tensors(path, {"offset": np.float32(3)}, {})  # noqa: E731
    monkeypatch.setattr(initial_weights, "on_first_process", lambda _: True)
    timer = threading.Timer(0.3, write)
    timer.start()
    assert initial_weights.frozen_weights(tiny.Tiny().frozen, tmp_path) == {"offset": 3}
    timer.join()
    monkeypatch.setattr(initial_weights, "on_first_process", lambda _: False)
    path.unlink()
    assert initial_weights.frozen_weights(tiny.Tiny().frozen, tmp_path) == {}
