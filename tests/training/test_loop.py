import dataclasses
import itertools
import json
import os
import time

import chex
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from tests.helpers import tiny
from tests.helpers.tiny import lines, weights
from varjax.analysis.runs import run_status
from varjax.checkpoints.weights import restore_weights
from varjax.errors import InputError
from varjax.storage import folders
from varjax.training import loop
from varjax.training import run_dir as checks
from varjax.training.checkpoint import Checkpoints
from varjax.training.experiment import Due
from varjax.training.fid_evaluation import FIDConfig
from varjax.training.loop_state import LoopState, parse_keep_best
from varjax.training.sharding import Prefetcher


@pytest.mark.slow
def test_a_run_learns_and_writes_its_files(whole):
    run_dir, metrics = whole
    losses = [line["loss"] for line in lines(run_dir) if "loss" in line]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    raw = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    assert all(line["images_per_second"] > 0 for line in raw if "loss" in line)  # the first one too
    assert metrics == {k: v for k, v in lines(run_dir)[-1].items() if k != "step"}
    assert {"eval/loss", "eval/accuracy", "eval_ema/loss", "eval_ema/accuracy"} == metrics.keys()
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["20", "30"]
    with Image.open(run_dir / "previews" / "step_00000020_inputs.png") as picture:
        assert picture.size == (552, 403)  # with a title
    assert list((run_dir / "tensorboard").iterdir())
    evaluations = {
        line["step"]: line["eval/loss"] for line in lines(run_dir) if "eval/loss" in line
    }
    best = min(evaluations, key=evaluations.get)
    assert [p.name for p in (run_dir / "best").iterdir()] == [str(best)]


@pytest.mark.slow
def test_metrics_count_only_valid_rows(whole):
    """The run's last batch has 35 valid rows of 64; the same 355 images are one full batch here."""
    run_dir, metrics = whole
    task = tiny.Tiny()
    state = task.init(jax.random.key(0)).replace(params=weights(run_dir)[1])
    data = tiny.Digits().source("held_out")
    batch = {
        "image_BHWC": data.images_NHWC,
        "label_B": data.labels_N.astype(np.int32),
        "valid_B": np.ones(len(data), bool),
    }
    found = task.eval_metrics(task.eval_step(state, {}, jax.device_put(batch)))
    np.testing.assert_allclose(found["loss"], metrics["eval/loss"], rtol=1e-5)
    np.testing.assert_allclose(found["accuracy"], metrics["eval/accuracy"], rtol=1e-5)


@pytest.mark.slow
def test_a_finished_run_says_so_and_compiles_nothing(whole, capsys, monkeypatch):
    run_dir, metrics = whole
    monkeypatch.setattr(tiny.Tiny, "train_step", None)
    assert loop.train(tiny.experiment(run_dir, keep_best="eval/loss", preview_every=20)) == metrics
    assert "is finished" in capsys.readouterr().err


@pytest.mark.slow
def test_other_settings_in_the_same_directory_are_refused(whole):
    run_dir, metrics = whole
    with pytest.raises(ValueError, match="(?s)steps: 30 in the run, 40.*task.width: 16 .* 17"):
        loop.train(tiny.experiment(run_dir, width=17, steps=40))
    assert loop.train(tiny.experiment(run_dir, log_every=1, keep=3)) == metrics


@pytest.mark.slow
def test_a_nonfinite_metric_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    experiment = tiny.experiment(tmp_path, explode_at=19)
    with pytest.raises(FloatingPointError, match="after step 20, .*checkpoint of step 10 is good"):
        loop.train(experiment)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["10"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(weights(tmp_path)[1]))


@pytest.mark.slow
def test_frozen_weights_are_read_once_and_kept_with_the_run(tmp_path):
    (tmp_path / "offset").write_text("0.5")
    changes = dict(offset_file=str(tmp_path / "offset"), steps=8)
    with pytest.raises(FloatingPointError):
        loop.train(tiny.experiment(tmp_path / "run", **changes, explode_at=0))
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"explode_at": 0', '"explode_at": -1'))
    whole = loop.train(tiny.experiment(tmp_path / "other", **changes))
    os.remove(tmp_path / "offset")
    assert loop.train(tiny.experiment(tmp_path / "run", **changes)) == whole


@pytest.mark.slow
def test_patience_ends_a_run_and_a_larger_value_continues_it(tmp_path):
    optimizer = tiny.AdamW(base_lr=1e-30)
    changes = dict(optimizer=optimizer, steps=20, eval_every=2, keep_best="eval/loss", patience=3)
    loop.train(tiny.experiment(tmp_path, **changes))
    assert lines(tmp_path)[-1]["step"] == 8  # the best at step 2, then three evaluations
    loop.train(tiny.experiment(tmp_path, **changes))
    assert lines(tmp_path)[-1]["step"] == 8
    loop.train(tiny.experiment(tmp_path, **changes | {"patience": 5}))
    assert lines(tmp_path)[-1]["step"] == 12


@pytest.mark.slow
def test_another_keep_best_metric_starts_without_a_best_value(tmp_path):
    """All losses exceed the lowest accuracy, so none would be better than that number."""
    changes = dict(save_every=0, eval_every=5)
    loop.train(tiny.experiment(tmp_path, steps=10, **changes, keep_best="min:eval/accuracy"))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"steps": 10', '"steps": 20'))
    loop.train(tiny.experiment(tmp_path, steps=20, **changes, keep_best="eval_ema/loss"))
    step, average = weights(tmp_path, ema=True, kind="best")
    assert step > 10
    chex.assert_trees_all_equal(restore_weights(tmp_path), average)


class OtherHeldOut(tiny.Digits):
    """The digits with another held-out split."""

    def describe(self):
        return super().describe() | {"held_out": {"images": 3}}


@pytest.mark.parametrize(
    ("changes", "best"),
    [
        ({}, 1.5),
        ({"fid": FIDConfig(every=5, images=50)}, 1.5),
        ({"eval_images": 20}, None),
        ({"keep_best": "eval/fid"}, None),
    ],
)
def test_a_best_value_is_kept_only_if_later_ones_are_comparable(changes, best):
    first = tiny.experiment("run", keep_best="eval/loss", eval_images=10)
    state = LoopState(first.keep_best, measured_with=first.best_settings())
    assert state.update({"eval/loss": 1.5})
    now = tiny.experiment("run", **{"keep_best": "eval/loss", "eval_images": 10} | changes)
    found = LoopState.from_meta(state.to_meta(), now.keep_best, now.best_settings())
    assert found.best == best
    all_images = tiny.experiment("run", keep_best="eval/loss").best_settings()
    assert all_images and all_images != first.best_settings()
    others = dataclasses.replace(now, data=OtherHeldOut())
    assert LoopState.from_meta(state.to_meta(), "eval/loss", others.best_settings()).best is None
    older = state.to_meta() | {"measured_with": {"eval_images": 10}}  # without held-out images
    assert LoopState.from_meta(older, "eval/loss", first.best_settings()).best == 1.5
    older = {k: v for k, v in state.to_meta().items() if k != "measured_with"}
    assert LoopState.from_meta(older, "eval/loss", all_images).best == 1.5
    fid = FIDConfig(every=5, images=50)
    others = (dataclasses.replace(fid, **x) for x in ({}, {"images": 60}, {"reference": "a.npz"}))
    settings = [tiny.experiment("run", keep_best="eval/fid", fid=x).best_settings() for x in others]
    assert settings[0] not in settings[1:]


@pytest.mark.parametrize(
    ("keep_best", "best"),
    [
        ("eval/loss", 1.0),
        ("eval_ema/psnr", 3.0),
        ("eval/usage/2", 3.0),
        ("eval/perplexity/2", 3.0),  # of a tokenizer's codes
        ("eval/perplexity_at_scale/2", 1.0),  # of a transformer
        ("min:eval/accuracy", 1.0),
        ("max:eval/loss", 3.0),
    ],
)
def test_keep_best_knows_whether_lower_or_higher_is_better(keep_best, best):
    name, _ = parse_keep_best(keep_best)
    loop_state = LoopState(keep_best)
    values = (2.0, np.nan, best, 2.0, 2.0)
    assert [loop_state.update({name: x}) for x in values] == [True, False, True, False, False]
    assert loop_state.best == best and loop_state.evaluations_since_best == 2


@pytest.mark.slow
def test_the_weights_of_the_highest_accuracy_are_kept(whole, tmp_path):
    loop.train(tiny.experiment(tmp_path, eval_every=5, keep_best="eval/accuracy"))
    by_step = {x["step"]: x["eval/accuracy"] for x in lines(tmp_path) if "eval/accuracy" in x}
    assert len(set(by_step.values())) > 1
    assert weights(tmp_path, kind="best")[0] == max(by_step, key=by_step.get)


@pytest.mark.slow
def test_error_txt_keeps_a_traceback_until_the_run_succeeds(tmp_path, monkeypatch):
    experiment, report = tiny.experiment(tmp_path, steps=1), tmp_path / "error.txt"
    with monkeypatch.context() as patch:
        patch.setattr(tiny.Tiny, "eval_metrics", lambda *_: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            loop.train(experiment)
    assert report.read_text().startswith("Traceback") and "eval_metrics" in report.read_text()

    def refused(*_):
        raise InputError("the held-out images are gone")

    with monkeypatch.context() as patch:
        patch.setattr(tiny.Tiny, "eval_metrics", refused)
        with pytest.raises(InputError):
            loop.train(experiment)
    assert report.exists()
    loop.train(experiment)
    assert not report.exists()


@pytest.mark.slow
def test_error_txt_is_removed_once_a_later_start_saves(tmp_path, monkeypatch):
    """A start that is killed later cannot remove the file at its end."""
    experiment, report = tiny.experiment(tmp_path, steps=4, save_every=2), tmp_path / "error.txt"
    report.write_text("Traceback")
    take, numbers = Prefetcher.__next__, itertools.count(1)

    def take_until_killed(batches):
        step = next(numbers)
        assert report.exists() == (step <= 2)
        if step == 4:
            raise KeyboardInterrupt
        return take(batches)

    monkeypatch.setattr(Prefetcher, "__next__", take_until_killed)
    with pytest.raises(KeyboardInterrupt):
        loop.train(experiment)
    assert not report.exists() and run_status(tmp_path).state == "stopped"


def test_error_txt_has_the_reason_of_a_refused_start(tmp_path):
    for bad in ("a", "b"):
        with pytest.raises(InputError, match=f"keep_best is '{bad}'") as caught:
            loop.train(tiny.experiment(tmp_path, keep_best=bad))
        assert (tmp_path / "error.txt").read_text() == f"InputError: {caught.value}\n"
    assert run_status(tmp_path).state == "failed start"


def test_the_next_save_removes_errors_of_former_processes(tmp_path):
    for name in ("error.txt", "error-3.txt", "error-mine.txt"):
        (tmp_path / name).write_text("OSError: node3 died")
    loop.train(tiny.experiment(tmp_path, steps=1, eval_every=0))
    assert [path.name for path in tmp_path.glob("error*")] == ["error-mine.txt"]


def test_an_unwritable_run_dir_is_an_input_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="file/run"):
        loop.train(tiny.experiment(tmp_path / "file" / "run"))


@pytest.mark.slow
def test_best_weights_are_on_disk_before_the_next_checkpoint(tmp_path, monkeypatch):
    events = []
    for name in ("save", "wait"):
        original = getattr(Checkpoints, name)

        def noted(self, *args, name=name, original=original):
            events.append((self.directory.name, name))
            return original(self, *args)

        monkeypatch.setattr(Checkpoints, name, noted)
    loop.train(tiny.experiment(tmp_path, steps=1, keep_best="eval/loss"))
    best, checkpoint = events.index(("best", "save")), events.index(("checkpoints", "save"))
    assert ("best", "wait") in events[best + 2 : checkpoint]  # best + 1 is the wait inside save


@pytest.mark.slow
def test_metrics_are_on_disk_before_each_checkpoint(tmp_path, monkeypatch):
    synced, checked, fsync, save = {}, [], os.fsync, Checkpoints.save
    path = tmp_path / "metrics.jsonl"

    def noted_fsync(descriptor):
        fsync(descriptor)
        synced[os.fstat(descriptor).st_ino] = os.fstat(descriptor).st_size

    def checked_save(self, step, *args):
        if self.directory.name == "checkpoints":
            last = json.loads(path.read_text().splitlines()[-1])
            assert last["step"] == step and synced.get(path.stat().st_ino) == path.stat().st_size
            checked.append(step)
        return save(self, step, *args)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(Checkpoints, "save", checked_save)
    loop.train(tiny.experiment(tmp_path, steps=4, log_every=1, save_every=2))
    assert checked == [2, 4]


def test_a_run_is_not_touched_while_another_process_trains_it(tmp_path):
    with folders.lock_folder(tmp_path):
        with pytest.raises(InputError, match="another process .* is using"):
            loop.train(tiny.experiment(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]


def test_processes_that_see_different_data_are_refused_before_writing(tmp_path, monkeypatch):
    def one_image_less_there(mine):
        there = json.loads(json.dumps(mine))
        there["seen"]["train"] = {"digest": "another", "images": 1441}
        there["seen"]["held_out"]["digest"] = "another"
        return [mine, json.loads(json.dumps(mine)), there | {"host": "node2"}]

    monkeypatch.setattr(jax, "process_count", lambda: 3)
    monkeypatch.setattr(checks, "gather_json", one_image_less_there)
    with pytest.raises(
        InputError, match="process 2 on node2: train has 1441 images instead of 1442"
    ):
        loop.train(tiny.experiment(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    monkeypatch.setattr(checks, "gather_json", lambda mine: [mine, mine])
    checks.check_same_data(tiny.experiment(tmp_path), 1442)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": "30"}, "steps must be int, not '30'"),
        ({"epochs": 2.0}, "steps is 30, epochs 2.0"),
        ({"steps": 0}, "steps is 0, epochs 0.0"),
        ({"batch_size": 0}, "batch_size=0: must be 1 or more"),
        ({"log_every": 0}, "log_every=0: must be 1 or more"),
        ({"keep": 2**31}, "keep=2147483648: must be at most 2147483647"),
        ({"seed": 2**32}, "^seed must be .* 4294967295, not 4294967296"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"steps": 2**31}, "steps=2147483648: must be at most 2147483647"),
        ({"steps": 0, "epochs": 1e12}, "steps=.*: must be at most"),
        ({"fid": FIDConfig(seed=2**32)}, "fid.seed must be .* 4294967295, not 4294967296"),
        ({"fid": FIDConfig(images=1)}, "fid.images=1: must be 2 or more"),
        ({"run_dir": ""}, "run_dir is empty"),
        ({"run_dir": "s3://bucket/run"}, "run_dir is s3://bucket/run: .* mount the bucket"),
        ({"eval_every": 0, "keep_best": "eval/loss"}, "set eval_every above 0"),
        ({"eval_every": 1, "patience": 2}, "patience is 2, but keep_best names no metric"),
        ({"task": tiny.Tiny(accumulate=3)}, "a batch of 64 cannot be split into 3 equal"),
        ({"task": tiny.Tiny(accumulate=0)}, "a batch of 64 cannot be split into 0 equal"),
    ],
)
def test_invalid_settings_are_refused(tmp_path, changes, message):
    experiment = dataclasses.replace(tiny.experiment(tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        loop.train(experiment)


def test_an_unknown_keep_best_is_refused_before_training(tmp_path):
    experiment = tiny.experiment(tmp_path, keep_best="loss", explode_at=0)
    with pytest.raises(ValueError, match="keep_best is 'loss', .*'eval_ema/loss'"):
        loop.train(experiment)


def test_epochs_count_passes_over_the_training_images():
    assert tiny.experiment("x", steps=0, epochs=2.0).plan(1442).steps == 46


def test_what_is_due_after_each_step():
    intervals = dict(eval_every=3, preview_every=2, save_every=4, keep_every=6)
    experiment = tiny.experiment("x", fid=FIDConfig(every=5), **intervals)
    none = Due(metrics=False, fid=False, preview=False, save=False)
    assert {step: experiment.due(step, 7) for step in range(1, 8)} == {
        1: none,
        2: none._replace(preview=True),
        3: none._replace(metrics=True),
        4: none._replace(preview=True, save=True),
        5: none._replace(fid=True),
        6: Due(metrics=True, fid=False, preview=True, save=True),
        7: none._replace(metrics=True, fid=True),  # the end of the run
    }
    assert [experiment.due(step, 7).evaluation for step in (1, 2, 3, 5)] == [
        False,
        True,
        True,
        True,
    ]


def test_an_interval_of_zero_evaluates_only_at_the_end():
    experiment = tiny.experiment("x", eval_every=0, save_every=0)
    assert not any(any(experiment.due(step, 3)) for step in (0, 1, 2))
    assert experiment.due(3, 3) == Due(metrics=True, fid=False, preview=False, save=False)


def test_writes_of_orbax_do_not_overlap(tmp_path, monkeypatch):
    managers, overlapping, save, rename = set(), [], ocp.CheckpointManager.save, os.rename

    def note_save(manager, step, **options):
        managers.add(manager)
        overlapping.extend((step, x.directory) for x in managers if x.is_saving_in_progress())
        return save(manager, step, **options)

    def rename_slowly(source, target):
        time.sleep(0.5)
        rename(source, target)

    monkeypatch.setattr(ocp.CheckpointManager, "save", note_save)
    monkeypatch.setattr(os, "rename", rename_slowly)
    loop.train(tiny.experiment(tmp_path / "run", steps=20, keep_best="eval/loss"))
    assert len(managers) == 2 and not overlapping
