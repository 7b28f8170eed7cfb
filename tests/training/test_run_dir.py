import pytest

from tests.helpers import tiny
from varjax.errors import InputError
from varjax.storage import files
from varjax.training import initial_weights, loop
from varjax.training.run_dir import CHANGEABLE_FIELDS


class Stopped(Exception):
    """Ends a start before its first step."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts the run in `tmp_path`, up to its first step; returns its settings."""

    def stop(*_, **__):
        raise Stopped

    monkeypatch.setattr(loop, "start_run", stop)

    def start(**changes):
        with pytest.raises(Stopped):
            loop.train(tiny.experiment(tmp_path, **changes))
        return files.read_json(tmp_path / "config.json")

    return start


def write_outputs(run):
    names = "best/10/params", "frozen.safetensors", "frozen.json", "data.json", "metrics.jsonl"
    for name in (*names, "fid_reference/a.safetensors"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("{}")


def test_a_run_is_bound_to_its_settings_by_its_first_checkpoint(start, tmp_path):
    assert start()["task"]["width"] == 16
    assert start(width=4)["task"]["width"] == 4
    assert start(width=8, seed=3)["seed"] == 3
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    start(width=8, seed=3)
    with pytest.raises(InputError, match="task.width: 8 in the run, 16 in the config") as error:
        loop.train(tiny.experiment(tmp_path, seed=3))
    assert f"--config.fork_from={tmp_path}" in str(error.value)
    assert ", ".join(CHANGEABLE_FIELDS) in str(error.value)


def test_other_settings_keep_nothing_that_was_made_with_the_former_ones(start, tmp_path):
    start()
    write_outputs(tmp_path)
    start()
    assert (tmp_path / "frozen.safetensors").exists()
    start(width=4)
    for name in ("best", "frozen.safetensors", "metrics.jsonl", "fid_reference"):
        assert not (tmp_path / name).exists()
    (tmp_path / "config.json").write_text("{")  # cut off by a full disk
    assert start(width=8)["task"]["width"] == 8


def test_frozen_weights_are_copied_again_before_the_first_checkpoint(tmp_path):
    """A tokenizer may be trained further after a first try of the transformer."""
    offset, run = tmp_path / "offset", tmp_path / "run"
    task = tiny.Tiny(offset_file=str(offset))

    def read(number, bound):
        offset.write_text(number)
        return initial_weights.frozen_weights(task, run, bound)["offset"]

    assert [read("1", False), read("2", False), read("2", True)] == [1, 2, 2]
    offset.unlink()
    assert initial_weights.frozen_weights(task, run, bound=False)["offset"] == 2
    with pytest.raises(InputError, match="different now: restore the file"):
        (run / "frozen.safetensors").unlink()
        read("3", True)
