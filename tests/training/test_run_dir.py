import dataclasses
import shutil

import pytest

from tests.helpers import tiny
from varjax.errors import InputError
from varjax.storage import files
from varjax.training import initial_weights, loop
from varjax.training.dry_run import dry_run
from varjax.training.run_dir import CHANGEABLE_FIELDS, check_config, write_config


class Stopped(Exception):
    """Ends a start before its first step."""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Returns a function that starts a run, stops before its first step and reads config.json."""

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
    outputs = "fid_reference/a.safetensors", "wandb.json", "previews/a.png", "tensorboard/events"
    for name in (*names, *outputs):
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


def test_changed_settings_remove_what_was_made_with_the_former_ones(start, tmp_path):
    start()
    write_outputs(tmp_path)
    start()
    assert (tmp_path / "frozen.safetensors").exists()
    start(width=4)
    left = {path.name for path in tmp_path.iterdir()} - {"error.txt", "checkpoints", ".lock"}
    assert left == {"config.json", "data.json"}
    (tmp_path / "config.json").write_text("{")  # truncated by a full disk
    assert start(width=8)["task"]["width"] == 8


def test_a_fork_without_a_checkpoint_keeps_no_metrics(start, tmp_path):
    """Its source may have trained further, so the next start may fork from a later step."""
    start(fork_from="runs/source")
    write_outputs(tmp_path)
    start(fork_from="runs/source")
    assert not (tmp_path / "metrics.jsonl").exists()


def test_frozen_weights_are_copied_again_before_the_first_checkpoint(tmp_path):
    """A tokenizer may be trained further after the first try of a transformer."""
    offset, run = tmp_path / "offset", tmp_path / "run"
    task = tiny.Tiny(offset_file=str(offset))

    def read(number, bound):
        offset.write_text(number)
        return initial_weights.frozen_weights(task.frozen, run, bound)["offset"]

    assert [read("1", False), read("2", False), read("2", True)] == [1, 2, 2]
    offset.unlink()
    assert initial_weights.frozen_weights(task.frozen, run, bound=False)["offset"] == 2
    with pytest.raises(InputError, match="different now: restore the file"):
        (run / "frozen.safetensors").unlink()
        read("3", True)


def test_a_directory_without_a_run_is_refused_and_left_alone(start, tmp_path):
    """Converted weights or a classifier must not be lost."""
    write_outputs(tmp_path)
    files.write_json(tmp_path / "config.json", {"var": {"depth": 16}, "license": "MIT"})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for refusing in (loop.train, dry_run):
        with pytest.raises(InputError, match=f"run_dir={tmp_path}: holds no run, but something"):
            refusing(tiny.experiment(tmp_path))
    assert {path: path.read_bytes() for path in before} == before


def test_a_run_keeps_its_origin(start, tmp_path):
    """Later starts do not use it, but the license of its weights is found through it."""
    files.write_json(tmp_path / "free" / "config.json", {"sources": {}, "license": "MIT"})
    assert start(init_from="published")["init_from"] == "published"
    free = start(init_from=str(tmp_path / "free"))  # nothing was saved yet
    assert (free["init_from"], free["license"]) == (str(tmp_path / "free"), "MIT")
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    shutil.rmtree(tmp_path / "free")
    later = tiny.experiment(tmp_path, log_every=3)
    check_config(later)
    write_config(later)
    free.pop("plan")
    assert files.read_json(tmp_path / "config.json") == free | {"log_every": 3}


@pytest.mark.slow
def test_a_refused_start_does_not_change_the_run(whole, tmp_path):
    """With another `keep_best` in config.json, samples would come from other weights."""
    run = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(run / "checkpoints" / "30")
    before = (run / "config.json").read_bytes()
    with pytest.raises(InputError, match="keep_best is 'eval/los'.*did you mean 'eval/loss'"):
        loop.train(tiny.experiment(run, keep_best="eval/los", preview_every=20))
    assert (run / "config.json").read_bytes() == before
    changed = tiny.experiment(run, keep_best="eval/accuracy", preview_every=20)
    loop.train(changed)
    assert files.read_json(run / "config.json")["keep_best"] == "eval/accuracy"
    # A finished run also checks and writes its settings, and restores a lost config.json.
    with pytest.raises(InputError, match="keep_best is 'eval/los'"):
        loop.train(dataclasses.replace(changed, keep_best="eval/los"))
    loop.train(dataclasses.replace(changed, patience=3))
    assert files.read_json(run / "config.json")["patience"] == 3
    (run / "config.json").unlink()
    loop.train(changed)
    assert files.read_json(run / "config.json")["keep_best"] == "eval/accuracy"


@pytest.mark.slow
def test_a_fork_has_the_frozen_weights_of_its_source(tmp_path):
    """The tokenizer that they come from may have been retrained or deleted."""
    offset = tmp_path / "offset"
    offset.write_text("1.5")
    settings = dict(offset_file=str(offset), steps=2, save_every=1, eval_every=0)
    loop.train(tiny.experiment(tmp_path / "a", **settings))
    offset.write_text("7")
    fork = settings | {"steps": 4, "fork_from": str(tmp_path / "a")}
    loop.train(tiny.experiment(tmp_path / "b", **fork))
    offset.unlink()
    dry_run(tiny.experiment(tmp_path / "c", **fork), lambda line: None)
    loop.train(tiny.experiment(tmp_path / "c", **fork))
    digests = {files.read_json(tmp_path / name / "frozen.json")["digest"] for name in "abc"}
    assert len(digests) == 1
    # If the settings name other weights, the fork uses those.
    named = {"tokenizer_weights": "a"}, {"tokenizer_weights": "b"}
    assert initial_weights._frozen_settings(named[0]) != initial_weights._frozen_settings(named[1])
