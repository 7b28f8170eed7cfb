import errno
import os
import pathlib
import resource
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import SingleDeviceSharding

from tests.helpers import tiny
from varjax.checkpoints import saved_steps
from varjax.checkpoints.saved_steps import STATE_TREES, SavedSteps
from varjax.checkpoints.weights import open_weights, restore_weights
from varjax.errors import DamagedFileError, InputError, StorageError
from varjax.runtime import distributed
from varjax.storage import checksums, files, untrusted
from varjax.training.checkpoint import Checkpoints, read_state
from varjax.training.task import TrainState

TASK = tiny.Tiny(width=4)
ABSTRACT = jax.eval_shape(TASK.init, jax.random.key(0))
PLACEMENT = jax.tree.map(lambda _: SingleDeviceSharding(jax.devices()[0]), ABSTRACT)


def state(step):
    """Returns a state with the step number in every element."""
    fill = lambda x: jnp.full(x.shape, step, x.dtype)  # noqa: E731
    return jax.tree.map(fill, ABSTRACT)


def saved(directory, *steps, keep=2, **meta):
    with Checkpoints(directory, keep) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step), {"best": step / 2} | meta)
    return directory


def equal(a, b):
    chex.assert_trees_all_equal(a, b)


def test_the_last_steps_are_restored(tmp_path):
    with Checkpoints(saved(tmp_path, 1, 2, 3)) as checkpoints:
        assert checkpoints.steps() == [2, 3]
        assert checkpoints.meta(2) == {"best": 1.0}
        read, meta = checkpoints.restore(ABSTRACT, PLACEMENT)
        equal(read, state(3))
        assert jax.tree.structure(read) == jax.tree.structure(state(3))
        assert meta == {"best": 1.5}
        read, meta = read_state(SavedSteps(tmp_path), 2, ABSTRACT, PLACEMENT)
        equal(read, state(2))
        assert meta == {"best": 1.0}


def test_milestones_are_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1, keep_every=4) as checkpoints:
        for step in range(1, 8):
            checkpoints.save(step, state(step))
        assert checkpoints.steps() == [4, 7]
    with Checkpoints(tmp_path, keep=1) as checkpoints:  # even if a later start sets no keep_every
        checkpoints.save(8, state(8))
        assert checkpoints.steps() == [4, 8]
    with Checkpoints(tmp_path, keep=1, keep_every=3) as checkpoints:
        for step in range(9, 11):
            checkpoints.save(step, state(step))
        assert checkpoints.steps() == [4, 9, 10]


def test_restoring_nothing_returns_none_and_the_ema_is_optional(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.restore(ABSTRACT, PLACEMENT) is None
        checkpoints.save(1, state(1).replace(ema=None))
        checkpoints.wait()
        without = ABSTRACT.replace(ema=None)
        assert checkpoints.restore(without, PLACEMENT.replace(ema=None))[0].ema is None
        with pytest.raises(ValueError, match="missing:    down/kernel"):
            checkpoints.restore(ABSTRACT, PLACEMENT)


@pytest.mark.parametrize("damage", ["truncated", "no opt_state", "empty", "temporary"])
def test_restore_falls_back_to_the_step_before_a_damaged_one(tmp_path, damage, capsys):
    last = saved(tmp_path / "checkpoints", 1, 2) / "2"
    if damage == "temporary":  # left by a process killed while saving
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


def replace_arrays(monkeypatch, change):
    """Makes Orbax return changed arrays, as flipped bits on the disk would."""
    restore = ocp.Checkpointer.restore

    def restore_changed(*arguments, **options):
        read = restore(*arguments, **options)
        return {name: change(arguments[1], name, read[name]) for name in read}

    monkeypatch.setattr(ocp.Checkpointer, "restore", restore_changed)


def flip_bit(tree):
    """Returns the tree with the lowest bit of one number flipped."""
    leaves, structure = jax.tree.flatten(tree)
    largest = max(range(len(leaves)), key=lambda i: leaves[i].size)
    bits = np.array(leaves[largest])
    bits.reshape(-1).view(np.uint8)[-4] ^= 1
    leaves[largest] = jnp.asarray(bits)
    return jax.tree.unflatten(structure, leaves)


@pytest.mark.parametrize("damaged", STATE_TREES)
def test_a_flipped_bit_is_detected(tmp_path, monkeypatch, damaged, capsys):
    def change(path, name, tree):
        return flip_bit(tree) if (path.name, name) == ("2", damaged) else tree

    saved(tmp_path / "checkpoints", 1, 2)
    replace_arrays(monkeypatch, change)
    if damaged != "opt_state":  # reading weights falls back to step 1, and moves nothing
        weights = restore_weights(tmp_path, ema=damaged == "ema")
        equal(weights, getattr(state(1), damaged))
        said = capsys.readouterr().err
        assert f"2/{damaged} is damaged: the checksums of 1 of 3 arrays do not match" in said
        assert said.endswith("; using 1\n")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        assert checkpoints.steps() == [1, 2]
        with pytest.raises(DamagedFileError, match=f"2/{damaged} is damaged: .* do not match"):
            read_state(SavedSteps(tmp_path / "checkpoints"), 2, ABSTRACT, PLACEMENT)
        read, meta = checkpoints.restore(ABSTRACT, PLACEMENT)
        equal(read, state(1))
        assert checkpoints.steps() == [1] and meta == {"best": 0.5}
    assert (tmp_path / "unreadable" / "2").is_dir()
    assert "checkpoint 2 cannot be read: " in capsys.readouterr().err


@pytest.mark.parametrize(
    "change", ["other", "without checksum", "of the step before", "another step's number"]
)
def test_changed_meta_is_detected_as_damage(tmp_path, change):
    saved(tmp_path / "checkpoints", 1, 2)
    path = tmp_path / "checkpoints" / "2" / "meta" / "metadata"
    record = files.read_json(path)
    if change == "other":
        files.write_json(path, record | {"meta": {"best": 7.0}})
    elif change == "without checksum":
        files.write_json(path, record["meta"])
    elif change == "another step's number":
        files.write_json(path, checksums.seal(checksums.unseal(record, path) | {"step": 1}))
    else:
        shutil.copy(tmp_path / "checkpoints" / "1" / "meta" / "metadata", path)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        with pytest.raises(DamagedFileError, match="meta"):
            checkpoints.meta(2)
        equal(checkpoints.restore(ABSTRACT, PLACEMENT)[0], state(1))
        checkpoints.save(2, state(2), {"best": 1.0})


def test_a_step_with_damaged_meta_is_saved_again(tmp_path):
    """After a restart, the same step may become the best one again."""
    saved(tmp_path, 1, 2)
    (tmp_path / "2" / "meta" / "metadata").write_text("")
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(2, state(3), {"best": 1.0})
        checkpoints.wait()
        equal(checkpoints.restore(ABSTRACT, PLACEMENT)[0].params, state(3).params)


def bare(cause):
    """Returns what Orbax raises if arrays cannot be read."""
    error = Exception("Failed to restore")
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        bare(ValueError("DATA_LOSS: Error decoding zstd")),
        bare(ValueError("NOT_FOUND: Error reading d/0 [os_error_code='2']")),
        bare(OSError(errno.EIO, "Input/output error")),
        OSError(errno.EIO, "Input/output error"),
    ],
)
def test_a_step_with_bad_sectors_or_bare_exceptions_is_skipped(tmp_path, monkeypatch, error):
    saved(tmp_path / "checkpoints", 1, 2)
    arrays_of_2 = lambda path, options: path.name == "2" and "meta" not in options["args"].keys()  # noqa: E731
    with monkeypatch.context() as patch:
        failing(patch, 2, error, where=arrays_of_2)
        equal(restore_weights(tmp_path, ema=False), state(1).params)
        failing(patch, 2, error, where=arrays_of_2)
        with Checkpoints(tmp_path / "checkpoints") as checkpoints:
            equal(checkpoints.restore(ABSTRACT, PLACEMENT)[0], state(1))
    files.move(tmp_path / "unreadable" / "2", tmp_path / "checkpoints" / "2")  # the disk works
    equal(restore_weights(tmp_path, ema=False), state(2).params)


def test_a_disk_that_fails_for_all_steps_is_not_damage(tmp_path, monkeypatch):
    saved(tmp_path / "checkpoints", 1, 2)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        failing(monkeypatch, 8, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(StorageError, match="Input/output error(.|\n)*Nothing was moved"):
            checkpoints.restore(ABSTRACT, PLACEMENT)
        with pytest.raises(StorageError, match="Start again when the disk works"):
            restore_weights(tmp_path)
        assert checkpoints.steps() == [1, 2] and not (tmp_path / "unreadable").exists()


def test_device_errors_are_raised_unchanged(tmp_path, monkeypatch):
    saved(tmp_path / "checkpoints", 1, 2)
    lost = jax.errors.JaxRuntimeError("INTERNAL: a peer has gone")
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for error in (lost, bare(lost)):
            failing(monkeypatch, 1, error)
            with pytest.raises(jax.errors.JaxRuntimeError, match="a peer has gone"):
                checkpoints.restore(ABSTRACT, PLACEMENT)
        assert checkpoints.steps() == [1, 2]


@pytest.mark.parametrize(
    ("owner", "name"),
    [
        (ocp.Checkpointer, "metadata"),
        (ocp.Checkpointer, "restore"),
        (untrusted, "bytes_on_disk"),
    ],
)
def test_weights_are_read_while_a_run_deletes_old_steps(tmp_path, monkeypatch, owner, name):
    """Twice, the listed step is deleted before it is read; then the newest one is read."""
    saved(tmp_path / "checkpoints", 1)
    whole, steps = getattr(owner, name), iter((2, 3))

    def late(*arguments, **options):
        if (step := next(steps, None)) is not None:
            with monkeypatch.context() as patch:
                patch.setattr(owner, name, whole)
                saved(tmp_path / "checkpoints", step, keep=1)
        return whole(*arguments, **options)

    monkeypatch.setattr(owner, name, late)
    equal(restore_weights(tmp_path, ema=False), state(3).params)


def failing(monkeypatch, times, *errors, where=lambda *_: True):
    """Makes the next reads raise each of the errors, `times` times."""
    restore, left = ocp.Checkpointer.restore, [error for error in errors for _ in range(times)]

    def restore_or_fail(*arguments, **options):
        if left and where(arguments[1], options):
            raise left.pop(0)
        return restore(*arguments, **options)

    monkeypatch.setattr(ocp.Checkpointer, "restore", restore_or_fail)


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE])
def test_a_read_that_fails_once_is_retried(tmp_path, monkeypatch, code, capsys):
    saved(tmp_path / "checkpoints", 1, 2)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        failing(monkeypatch, 1, OSError(code, os.strerror(code)))
        equal(checkpoints.restore(ABSTRACT, PLACEMENT)[0], state(2))
        assert checkpoints.steps() == [1, 2] and not capsys.readouterr().err
        failing(monkeypatch, 1, OSError(code, os.strerror(code)))
        equal(restore_weights(tmp_path, ema=False), state(2).params)


@pytest.mark.parametrize("name", ["meta/metadata", "params/manifest.ocdbt"])
def test_a_pipe_in_a_checkpoint_is_damage_and_does_not_block(tmp_path, capsys, name):
    saved(tmp_path / "checkpoints", 1, 2)
    file = tmp_path / "checkpoints" / "2" / name
    file.unlink()
    os.mkfifo(file)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        equal(restore_weights(tmp_path, ema=False), state(1).params)
        equal(checkpoints.restore(ABSTRACT, PLACEMENT)[0], state(1))
    assert capsys.readouterr().err.count("is not a regular file") == 2


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.EACCES, "Permission denied"),
        OSError(errno.EHOSTDOWN, "Host is down"),  # CIFS while it reconnects
        OSError(errno.ESHUTDOWN, "Cannot send after transport endpoint shutdown"),  # Lustre
        ValueError("RESOURCE_EXHAUSTED: Failed to open: Too many open files [os_error_code='24']"),
    ],
)
def test_errors_of_the_machine_move_no_checkpoint_aside(tmp_path, monkeypatch, error):
    saved(tmp_path / "checkpoints", 1, 2)
    wrapped = KeyError("in between")
    wrapped.__cause__ = error
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        for raised in (error, wrapped):
            failing(monkeypatch, 2, raised)
            with pytest.raises(StorageError, match="checkpoints/2 cannot be read now: .*keep"):
                checkpoints.restore(ABSTRACT, PLACEMENT)
            failing(monkeypatch, 2, raised)
            with pytest.raises(StorageError, match="checkpoints/2 cannot be read now: .*keep"):
                restore_weights(tmp_path)
        assert checkpoints.steps() == [1, 2] and not (tmp_path / "unreadable").exists()
        equal(checkpoints.restore(ABSTRACT, PLACEMENT)[0], state(2))


def test_running_out_of_file_descriptors_loses_no_checkpoint(tmp_path):
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


def test_a_failed_last_save_is_reported_with_the_good_steps(tmp_path, monkeypatch):
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


def with_another_process(monkeypatch, outcome):
    """Imitates a second process, whose reads have this outcome."""

    def on_both(action):
        mine = distributed._outcome(action)
        with monkeypatch.context() as patch:
            patch.setattr(distributed, "gather_json", lambda _: [mine, outcome])
            patch.setattr(jax, "process_count", lambda: 2)
            return distributed.on_all_processes(lambda: None)

    monkeypatch.setattr(saved_steps, "on_all_processes", on_both)


def test_a_storage_error_in_one_process_is_raised_in_all(tmp_path, monkeypatch):
    with Checkpoints(saved(tmp_path / "checkpoints", 1, 2)) as checkpoints:
        lacks = {"kind": "StorageError", "error": "2 cannot be read now"}
        with_another_process(monkeypatch, lacks)
        with pytest.raises(StorageError, match="process 1: 2 cannot be read now"):
            checkpoints.restore(ABSTRACT, PLACEMENT)
        assert checkpoints.steps() == [1, 2]


def test_damage_seen_by_one_process_is_damage_for_all(tmp_path, monkeypatch):
    with Checkpoints(saved(tmp_path / "checkpoints", 1, 2)) as checkpoints:
        with_another_process(monkeypatch, {"kind": "DamagedFileError", "error": "a bit"})
        with pytest.raises(InputError, match=r"no checkpoint of \[1, 2\] (.|\n)*process 1: a bit"):
            checkpoints.restore(ABSTRACT, PLACEMENT)
        assert checkpoints.steps() == [1, 2]


def test_nothing_is_moved_if_no_step_can_be_read(tmp_path):
    for file in pathlib.Path(saved(tmp_path, 1)).rglob("_METADATA"):
        file.unlink()
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match=r"no checkpoint of \[1\] .* can be read"):
            checkpoints.restore(ABSTRACT, PLACEMENT)
        assert checkpoints.steps() == [1]


def test_many_damaged_steps_are_passed_over_and_deleted_ones_are_not_read_forever(tmp_path, capsys):
    kept, read = tmp_path / "checkpoints", []
    for step in range(1, 31):
        (kept / str(step)).mkdir(parents=True)

    def read_step(step):
        read.append(step)
        if step > 1:
            raise DamagedFileError(f"{step} is damaged")
        return "state"

    assert SavedSteps(kept).newest(read_step) == "state" and read == [*range(30, 0, -1)]
    assert capsys.readouterr().err.count("is damaged; using 1\n") == 29
    with pytest.raises(InputError, match="can be read"):  # a run that saves faster than this reads
        SavedSteps(kept).newest(read_step, lambda: [1000 + len(read)])
    assert len(read) < 100


def test_another_model_is_refused_with_the_differences(tmp_path):
    other = jax.eval_shape(tiny.Tiny(width=5).init, jax.random.key(0))
    with Checkpoints(saved(tmp_path, 1)) as checkpoints:
        with pytest.raises(ValueError, match=r"misshapen:  up/kernel is \(64, 4\) float32"):
            checkpoints.restore(other, PLACEMENT)


def configured(directory, keep_best):
    """Writes a config.json with only the setting that decides which weights are read."""
    files.write_json(directory / "config.json", {"keep_best": keep_best})


def test_weights_are_read_without_a_config_of_the_model(tmp_path):
    saved(tmp_path / "checkpoints", 1, 3)
    equal(restore_weights(tmp_path), state(3).ema)
    saved(tmp_path / "best", 2, keep=1, keep_best="eval_ema/loss")
    configured(tmp_path, "eval_ema/loss")
    equal(restore_weights(tmp_path), state(2).ema)
    equal(restore_weights(tmp_path, ema=False), state(2).params)
    with pytest.raises(ValueError, match="has no checkpoint yet"):
        restore_weights(tmp_path / "checkpoints")


def test_a_location_can_name_a_checkpoint_of_a_run(tmp_path):
    run = tmp_path / "run"
    saved(run / "checkpoints", 1, 3)
    settings = {"task": {"_type": "Tiny"}, "keep_best": "eval_ema/loss"}
    files.write_json(run / "config.json", settings)
    equal(open_weights(run).restore(), state(3).ema)
    with pytest.raises(InputError, match="run@best: the run has kept no best checkpoint"):
        open_weights(f"{run}@best").restore()
    saved(run / "best", 2, keep=1, keep_best="eval_ema/loss")
    for name, step in {"run": 2, "run@best": 2, "run@1": 1, "run@2": 2, "run@3": 3}.items():
        equal(open_weights(tmp_path / name).restore(), state(step).ema)
        equal(open_weights(f"{tmp_path}/{name}").restore(False), state(step).params)
    with pytest.raises(InputError, match=r"run@4: the run has checkpoints of steps \[1, 2, 3\]"):
        open_weights(f"{run}@4").restore()
    run.rename(tmp_path / "run@4")  # a directory whose name contains @
    equal(open_weights(tmp_path / "run@4").restore(), state(2).ema)
    equal(open_weights(tmp_path / "run@4@1").restore(), state(1).ema)


@pytest.mark.parametrize("now", ["", "eval_ema/accuracy"])
def test_a_best_step_chosen_by_another_keep_best_is_not_used(tmp_path, now):
    saved(tmp_path / "checkpoints", 3)
    saved(tmp_path / "best", 2, keep=1, keep_best="eval_ema/loss")
    configured(tmp_path, now)
    equal(restore_weights(tmp_path), state(3).ema)


def test_rewriting_meta_keeps_the_arrays(tmp_path):
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
def test_the_best_step_returns_the_weights_that_were_measured(tmp_path, metric, name):
    weights = {"params": {"w": jnp.zeros(1)}, "ema": {"w": jnp.ones(1)}}
    with Checkpoints(tmp_path / "best", keep=1) as best:
        best.save(1, TrainState(jnp.int32(1), **weights, opt_state=None), {"keep_best": metric})
    configured(tmp_path, metric)
    equal(restore_weights(tmp_path), weights[name])
    equal(restore_weights(tmp_path, ema=True), weights["ema"])
    assert not (tmp_path / "best" / "1" / "opt_state").exists()


def test_saving_a_step_again_changes_nothing_unless_meta_differs(tmp_path):
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


def test_weights_of_a_run_without_ema_are_its_parameters(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(1, state(1).replace(ema=None))
    equal(restore_weights(tmp_path), state(1).params)
    with pytest.raises(ValueError, match="has no EMA weights"):
        restore_weights(tmp_path, ema=True)
