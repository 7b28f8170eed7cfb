import errno
import os
import pathlib
import resource
import shutil

import chex
import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from jax.sharding import SingleDeviceSharding

from tests.helpers import tiny
from varjax.core import files
from varjax.core.errors import StorageError
from varjax.core.saved_steps import restore_weights
from varjax.training import checkpoint
from varjax.training.checkpoint import Checkpoints
from varjax.training.task import TrainState

TASK = tiny.Tiny(width=4)
ABSTRACT = jax.eval_shape(TASK.init, jax.random.key(0))
PLACEMENT = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), ABSTRACT)


def state(step):
    """A state in which every leaf depends on the step."""
    fill = lambda x: jnp.full(x.shape, step, x.dtype)  # noqa: E731
    return jax.tree.map(fill, ABSTRACT)


def saved(directory, *steps, keep=2, **meta):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"best": step / 2} | meta)
    return directory


def equal(a, b):
    chex.assert_trees_all_equal(a, b)


def test_the_last_steps_come_back_whole(tmp_path):
    with Checkpoints(saved(tmp_path, 1, 2, 3)) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.meta(2) == {"best": 1.0}
        read, meta = checkpoints.restore(ABSTRACT, PLACEMENT)
        equal(read, state(3))
        assert jax.tree.structure(read) == jax.tree.structure(state(3))
        assert meta == {"best": 1.5}
        equal(checkpoints.restore(ABSTRACT, PLACEMENT, step=2)[0], state(2))


def test_milestones_stay(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, state(step))
        assert checkpoints.steps() == [4, 7]


def test_nothing_saved_is_none_and_a_state_without_average_stays_without(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(ABSTRACT, PLACEMENT) is None
        checkpoints.save(1, state(1).replace(ema=None))
        checkpoints.wait()
        without = ABSTRACT.replace(ema=None)
        assert checkpoints.restore(without, PLACEMENT.replace(ema=None))[0].ema is None
        with pytest.raises(ValueError, match="missing:    down/kernel"):
            checkpoints.restore(ABSTRACT, PLACEMENT)


@pytest.mark.parametrize("damage", ["truncated", "no opt_state", "empty", "temporary"])
def test_a_damaged_last_step_falls_back_to_the_one_before(tmp_path, damage, capsys):
    last = saved(tmp_path / "checkpoints", 1, 2) / "2"
    if damage == "temporary":  # what a kill while saving leaves
        last.rename(last.with_name("2.orbax-checkpoint-tmp"))
    elif damage == "no opt_state":
        shutil.rmtree(last / "opt_state")
    for file in [f for f in last.rglob("*") if f.is_file()]:
        if damage == "truncated":
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
        elif damage == "empty":
            file.unlink()
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        equal(checkpoints.restore(ABSTRACT, PLACEMENT)[0], state(1))
        assert checkpoints.steps() == [1]
        checkpoints.save(2, state(2))
        checkpoints.wait()
        assert checkpoints.steps() == [1, 2]
    if damage != "temporary":
        assert "checkpoint 2 cannot be read" in capsys.readouterr().err
        assert (tmp_path / "unreadable" / "2").is_dir()


def failing(monkeypatch, times, *errors):
    """The next reads fail, so many times with each of the errors."""
    restore, left = ocp.Checkpointer.restore, [error for error in errors for _ in range(times)]

    def restore_or_fail(*arguments, **options):
        if left:
            raise left.pop(0)
        return restore(*arguments, **options)

    monkeypatch.setattr(ocp.Checkpointer, "restore", restore_or_fail)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_read_that_fails_once_is_tried_again(tmp_path, monkeypatch, code, capsys):
    saved(tmp_path / "checkpoints", 1, 2)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        failing(monkeypatch, 1, OSError(code, os.strerror(code)))
        equal(checkpoints.restore(ABSTRACT, PLACEMENT)[0], state(2))
        assert checkpoints.steps() == [1, 2] and not capsys.readouterr().err
        failing(monkeypatch, 1, OSError(code, os.strerror(code)))
        equal(restore_weights(tmp_path, ema=False), state(2).params)


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        ValueError("RESOURCE_EXHAUSTED: Failed to open: Too many open files [os_error_code='24']"),
    ],
)
def test_what_the_machine_lacks_costs_no_checkpoint(tmp_path, monkeypatch, error):
    saved(tmp_path / "checkpoints", 1, 2)
    wrapped = KeyError("in between")
    wrapped.__cause__ = error
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for raised in (error, wrapped):
            failing(monkeypatch, 2, raised)
            with pytest.raises(StorageError, match="checkpoints/2 cannot be read now: .*leave"):
                checkpoints.restore(ABSTRACT, PLACEMENT)
            failing(monkeypatch, 2, raised)
            with pytest.raises(StorageError, match="checkpoints/2 cannot be read now: .*leave"):
                restore_weights(tmp_path)
        assert checkpoints.steps() == [1, 2] and not (tmp_path / "unreadable").exists()
        equal(checkpoints.restore(ABSTRACT, PLACEMENT)[0], state(2))


def test_without_file_descriptors_no_checkpoint_is_lost(tmp_path):
    with Checkpoints(saved(tmp_path / "checkpoints", 1, 2)) as checkpoints:
        checkpoints.restore(ABSTRACT, PLACEMENT)
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            with pytest.raises(StorageError, match="Too many open files"):
                checkpoints.restore(ABSTRACT, PLACEMENT)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert checkpoints.steps() == [1, 2] and not (tmp_path / "unreadable").exists()


def test_a_last_save_that_fails_is_said_with_what_is_good(tmp_path, monkeypatch):
    rename = os.rename

    def refuse(source, target):
        if pathlib.Path(target).name == "2":
            raise OSError(errno.EIO, "Input/output error", str(target))
        rename(source, target)

    with pytest.raises(StorageError, match=r"saving to .*Input/output error.*\n.* are good: \[1\]"):
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, state(1))
            checkpoints.wait()
            monkeypatch.setattr(os, "rename", refuse)
            checkpoints.save(2, state(2))


def test_what_another_process_lacks_ends_all_of_them(tmp_path, monkeypatch):
    with Checkpoints(saved(tmp_path / "checkpoints", 1, 2)) as checkpoints:
        there = ["StorageError", "2 cannot be read now"]
        monkeypatch.setattr(checkpoint, "gather_json", lambda mine: [mine, there])
        with pytest.raises(StorageError, match="2 cannot be read now"):
            checkpoints.restore(ABSTRACT, PLACEMENT)
        assert checkpoints.steps() == [1, 2]


def test_when_no_step_can_be_read_nothing_is_thrown_away(tmp_path):
    for file in pathlib.Path(saved(tmp_path, 1)).rglob("_METADATA"):
        file.unlink()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"no checkpoint of \[1\] .* can be read"):
            checkpoints.restore(ABSTRACT, PLACEMENT)
        assert checkpoints.steps() == [1]


def test_another_model_is_refused_with_all_that_differs(tmp_path):
    other = jax.eval_shape(tiny.Tiny(width=5).init, jax.random.key(0))
    with Checkpoints(saved(tmp_path, 1)) as checkpoints:
        with pytest.raises(ValueError, match=r"misshapen:  up/kernel is \(64, 4\) float32"):
            checkpoints.restore(other, PLACEMENT)


def configured(directory, keep_best):
    """The settings of a run, as far as they tell which weights it is used with."""
    files.write_json(directory / "config.json", {"keep_best": keep_best})


def test_weights_alone_need_no_knowledge_of_the_model(tmp_path):
    saved(tmp_path / "checkpoints", 1, 3)
    equal(restore_weights(tmp_path), state(3).ema)
    saved(tmp_path / "best", 2, keep=1, keep_best="eval_ema/loss")
    configured(tmp_path, "eval_ema/loss")
    equal(restore_weights(tmp_path), state(2).ema)
    equal(restore_weights(tmp_path, ema=False), state(2).params)
    with pytest.raises(ValueError, match="holds no checkpoint yet"):
        restore_weights(tmp_path / "checkpoints")


@pytest.mark.parametrize("now", ["", "eval_ema/accuracy"])
def test_a_best_by_another_setting_than_the_run_s_is_not_used(tmp_path, now):
    saved(tmp_path / "checkpoints", 3)
    saved(tmp_path / "best", 2, keep=1, keep_best="eval_ema/loss")
    configured(tmp_path, now)
    equal(restore_weights(tmp_path), state(3).ema)


def test_meta_is_rewritten_and_the_arrays_stay(tmp_path):
    with Checkpoints(saved(tmp_path, 1, 2)) as checkpoints:
        checkpoints.rewrite_meta(2, {"best": 7.0})
        assert checkpoints.meta(2) == {"best": 7.0}
    with Checkpoints(tmp_path) as checkpoints:
        read, meta = checkpoints.restore(ABSTRACT, PLACEMENT)
        equal(read, state(2))
        assert meta == {"best": 7.0} and checkpoints.meta(1) == {"best": 0.5}


@pytest.mark.parametrize(
    ("metric", "name"),
    [("eval/loss", "params"), ("max:eval/loss", "params"), ("eval_ema/loss", "ema")],
)
def test_the_best_is_loaded_as_it_was_chosen(tmp_path, metric, name):
    weights = {"params": {"w": jnp.zeros(1)}, "ema": {"w": jnp.ones(1)}}
    with Checkpoints(tmp_path / "best", keep=1) as best:
        best.save(1, TrainState(jnp.int32(1), **weights, opt_state=None), {"keep_best": metric})
    configured(tmp_path, metric)
    equal(restore_weights(tmp_path), weights[name])
    equal(restore_weights(tmp_path, ema=True), weights["ema"])
    assert not (tmp_path / "best" / "1" / "opt_state").exists()


def test_a_step_saved_again_is_left_alone_unless_its_meta_changed(tmp_path):
    saved(tmp_path, 2, 4)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(4, state(5), {"best": 2.0})
        checkpoints.wait()
        equal(checkpoints.restore(ABSTRACT, PLACEMENT)[0].params, state(4).params)
        checkpoints.save(4, state(5), {"best": 9.0})
        checkpoints.wait()
        equal(checkpoints.restore(ABSTRACT, PLACEMENT)[0].params, state(5).params)
        checkpoints.save(3, state(3))
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def test_reading_does_not_disturb_a_run_that_is_saving(tmp_path):
    saving = saved(tmp_path / "checkpoints", 1) / "2.orbax-checkpoint-tmp"
    saving.mkdir()
    equal(restore_weights(tmp_path, ema=False), state(1).params)
    assert saving.is_dir()


def test_a_run_without_average_gives_its_parameters(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state(1).replace(ema=None))
    equal(restore_weights(tmp_path), state(1).params)
    with pytest.raises(ValueError, match="keeps no average"):
        restore_weights(tmp_path, ema=True)
