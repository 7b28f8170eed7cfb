import dataclasses
import gc
import itertools
import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from PIL import Image

from tests import tiny
from varjax.training import evaluate, loop
from varjax.training.checkpoint import Checkpoints, restore_weights
from varjax.training.interrupt import Interrupt
from varjax.training.saved import Saved
from varjax.training.task import Plan

ROOT = pathlib.Path(__file__).parents[1]
TIMING = {"images_per_second", "step_seconds", "tflops_per_device", "peak_share"}
TIMING |= {"data_wait", "data_wait_share", "memory_gb", "memory_peak_gb"}


def lines(run_dir):
    """What metrics.jsonl says apart from time."""
    text = (pathlib.Path(run_dir) / "metrics.jsonl").read_text()
    parsed = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in parsed]


def weights(run_dir, ema=False, kind="checkpoints"):
    """The step and the parameters or their average of the newest checkpoint of a kind."""
    saved = Saved(pathlib.Path(run_dir) / kind)
    step = saved.steps()[-1]
    return step, saved.params(step, ema)


def same_run(a, b):
    for kind in ("checkpoints", "best"):
        for ema in (False, True):
            both = (weights(run_dir, ema, kind) for run_dir in (a, b))
            jax.tree.map(np.testing.assert_array_equal, *both)
    assert lines(a) == lines(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    metrics = loop.run(tiny.experiment(run_dir, keep_best="eval/loss", preview_every=20))
    return run_dir, metrics


def test_a_run_learns_and_leaves_its_files(whole):
    run_dir, metrics = whole
    losses = [line["loss"] for line in lines(run_dir) if "loss" in line]
    assert len(losses) == 6 and losses[-1] < 0.9 * losses[0]
    assert metrics == {k: v for k, v in lines(run_dir)[-1].items() if k != "step"}
    assert {"eval/loss", "eval/accuracy", "eval_ema/loss", "eval_ema/accuracy"} == metrics.keys()
    assert [p.name for p in sorted((run_dir / "checkpoints").iterdir())] == ["20", "30"]
    with Image.open(run_dir / "previews" / "step_00000020_inputs.png") as picture:
        assert picture.size == (195, 130)
    assert list((run_dir / "tensorboard").iterdir())
    evaluations = {
        line["step"]: line["eval/loss"] for line in lines(run_dir) if "eval/loss" in line
    }
    best = min(evaluations, key=evaluations.get)
    assert [p.name for p in (run_dir / "best").iterdir()] == [str(best)]


def test_metrics_are_over_the_valid_rows_only(whole):
    """355 held-out images: with a batch of 64 the last one holds 35, here as one batch all."""
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


def test_a_finished_run_says_so_and_compiles_nothing(whole, capsys, monkeypatch):
    run_dir, metrics = whole
    monkeypatch.setattr(tiny.Tiny, "train_step", None)
    assert loop.run(tiny.experiment(run_dir, keep_best="eval/loss", preview_every=20)) == metrics
    assert "is finished" in capsys.readouterr().err


def test_other_settings_in_the_same_directory_are_refused(whole):
    run_dir, metrics = whole
    with pytest.raises(ValueError, match="(?s)steps: 30 in the run, 40.*task.width: 16 .* 17"):
        loop.run(tiny.experiment(run_dir, width=17, steps=40))
    assert loop.run(tiny.experiment(run_dir, log_every=1, keep=3)) == metrics


@pytest.mark.parametrize(
    ("signum", "moment", "step"),
    [
        (signal.SIGINT, ("in step", 13), 13),
        (signal.SIGTERM, ("in step", 20), 20),  # due for evaluation, preview and save
        (signal.SIGTERM, ("at batch", 4), 10),  # of 6 in the first evaluation
        (signal.SIGINT, ("in step", 30), 30),
    ],
)
def test_a_signal_saves_at_once_and_the_run_continues_as_if_nothing_was(
    whole, tmp_path, capfd, monkeypatch, signum, moment, step
):
    experiment = tiny.experiment(tmp_path, keep_best="eval/loss", preview_every=20)
    with monkeypatch.context() as patch:
        raise_at(patch, signum, *moment)
        with pytest.raises(SystemExit) as stop:
            loop.run(experiment)
    assert stop.value.code == 128 + signum
    said = capfd.readouterr().err
    assert "stopping after this step" in said
    assert f"saved after step {step}; the same command continues" in said
    evaluated = [line["step"] for line in lines(tmp_path) if "eval/loss" in line]
    assert step not in evaluated and not list(tmp_path.glob(f"previews/*{step}_*"))
    loop.run(experiment)
    same_run(whole[0], tmp_path)
    assert len(list((tmp_path / "previews").iterdir())) == 1
    assert loop.run(experiment) == whole[1]
    assert lines(whole[0]) == lines(tmp_path)


def raise_at(patch, signum, place, number):
    """Has the signal come once, in the middle of a step or with a batch of the evaluation."""
    take, placed = loop.Feed.__next__, evaluate.place
    steps, batches = itertools.count(1), itertools.count()

    def at_step(feed):
        if place == "in step" and next(steps) == number:
            signal.raise_signal(signum)
        return take(feed)

    def at_batch(*args):
        if place == "at batch" and next(batches) == number:
            signal.raise_signal(signum)
        return placed(*args)

    patch.setattr(loop.Feed, "__next__", at_step)
    patch.setattr(evaluate, "place", at_batch)


def test_a_signal_may_come_while_something_is_printed(monkeypatch):
    """Printing again from the handler raises RuntimeError, for a stream is not reentrant."""

    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call")

    monkeypatch.setattr(sys, "stderr", Busy())
    with Interrupt() as interrupt:
        signal.raise_signal(signal.SIGINT)
        assert interrupt.noted()


OFTEN = dict(steps=150, save_every=7, eval_every=40, keep_best="eval/loss")
CHILD = """
import json, sys
from tests import tiny
from varjax.training import loop
loop.run(tiny.experiment(sys.argv[1], **json.loads(sys.argv[2])))
"""


def test_killed_at_any_moment_a_run_ends_with_the_same_bits(tmp_path):
    """Each process is killed up to 0.4 s after it wrote its first line; a last one finishes."""
    loop.run(tiny.experiment(tmp_path / "whole", **OFTEN))
    seed = random.randrange(10**6)
    rng, run_dir = random.Random(seed), tmp_path / "killed"
    path, reached = run_dir / "metrics.jsonl", 0
    command = [sys.executable, "-c", CHILD, str(run_dir), json.dumps(OFTEN)]
    for _ in range(2):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.wait()
        saved = [int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit()]
        reached = max(saved, default=0)
    final = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert final.returncode == 0, final.stderr
    assert (f"after step {reached}" in final.stderr) == (0 < reached < 150), (seed, final.stderr)
    same_run(tmp_path / "whole", run_dir)


def test_a_metric_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(tmp_path):
    experiment = tiny.experiment(tmp_path, explode_at=19)
    with pytest.raises(FloatingPointError, match="after step 20, .*checkpoint of step 10 is good"):
        loop.run(experiment)
    assert [p.name for p in (tmp_path / "checkpoints").iterdir()] == ["10"]
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(weights(tmp_path)[1]))


def test_frozen_weights_are_asked_for_once_and_kept_with_the_run(tmp_path):
    (tmp_path / "offset").write_text("0.5")
    changes = dict(offset_file=str(tmp_path / "offset"), steps=8)
    with pytest.raises(FloatingPointError):
        loop.run(tiny.experiment(tmp_path / "run", **changes, explode_at=0))
    config = tmp_path / "run" / "config.json"
    config.write_text(config.read_text().replace('"explode_at": 0', '"explode_at": -1'))
    whole = loop.run(tiny.experiment(tmp_path / "other", **changes))
    os.remove(tmp_path / "offset")
    assert loop.run(tiny.experiment(tmp_path / "run", **changes)) == whole


def test_patience_ends_a_run_that_no_longer_improves_and_more_of_it_continues(tmp_path):
    optimizer = tiny.AdamW(base_lr=1e-30)
    changes = dict(optimizer=optimizer, steps=20, eval_every=2, keep_best="eval/loss", patience=3)
    loop.run(tiny.experiment(tmp_path, **changes))
    assert lines(tmp_path)[-1]["step"] == 8  # the best at 2, then three evaluations
    loop.run(tiny.experiment(tmp_path, **changes))
    assert lines(tmp_path)[-1]["step"] == 8
    loop.run(tiny.experiment(tmp_path, **changes | {"patience": 5}))
    assert lines(tmp_path)[-1]["step"] == 12


def test_another_metric_to_keep_the_best_by_starts_without_a_best(tmp_path):
    """Every loss here is above the lowest accuracy, so that by its number none would be better."""
    changes = dict(save_every=0, eval_every=5)
    loop.run(tiny.experiment(tmp_path, steps=10, **changes, keep_best="eval/accuracy"))
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"steps": 10', '"steps": 20'))
    loop.run(tiny.experiment(tmp_path, steps=20, **changes, keep_best="eval_ema/loss"))
    step, average = weights(tmp_path, ema=True, kind="best")
    assert step > 10
    jax.tree.map(np.testing.assert_array_equal, restore_weights(tmp_path), average)


def test_a_best_is_on_the_disk_before_the_checkpoint_that_knows_of_it(tmp_path, monkeypatch):
    events = []
    for name in ("save", "wait"):
        original = getattr(Checkpoints, name)

        def noted(self, *args, name=name, original=original):
            events.append((self.directory.name, name))
            return original(self, *args)

        monkeypatch.setattr(Checkpoints, name, noted)
    loop.run(tiny.experiment(tmp_path, steps=1, keep_best="eval/loss"))
    best, checkpoint = events.index(("best", "save")), events.index(("checkpoints", "save"))
    assert ("best", "wait") in events[best + 2 : checkpoint]  # the first belongs to the save


# Of the writes that Orbax began together, it waits for the first to fail.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_disk_that_takes_no_more_ends_the_run_and_what_was_saved_stays(tmp_path, monkeypatch):
    """The system itself refuses: files may grow to 100 kB, but a step needs some of 1 MB."""
    big = tiny.experiment(tmp_path / "run", width=2**12, keep_best="eval/loss")
    _, hard = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    save = ocp.CheckpointManager.save

    def save_on_a_full_disk(manager, step, *arguments, **options):
        if step == 20:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
        return save(manager, step, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", save_on_a_full_disk)
        try:
            with pytest.raises(OSError, match=r"(?s)saving to .* failed.* good: \[10\].* room for"):
                loop.run(big)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    loop.run(big)
    loop.run(dataclasses.replace(big, run_dir=str(tmp_path / "whole")))
    same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2.0}, "steps is 30, epochs 2.0"),
        ({"steps": 0}, "steps is 0, epochs 0.0"),
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"run_dir": ""}, "run_dir is empty"),
        ({"run_dir": "gs://bucket/run"}, "run_dir is gs://bucket/run: an address; mount it"),
        ({"eval_every": 0, "keep_best": "eval/loss"}, "set eval_every above 0"),
        ({"eval_every": 1, "patience": 2}, "patience is 2, but keep_best names no metric"),
        ({"task": tiny.Tiny(plan=Plan(5))}, "task.plan is Plan.steps=5.*set steps, epochs"),
    ],
)
def test_settings_without_sense_are_refused(tmp_path, changes, message):
    experiment = dataclasses.replace(tiny.experiment(tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        loop.run(experiment)


def test_an_unknown_metric_to_keep_is_told_before_training(tmp_path):
    experiment = tiny.experiment(tmp_path, keep_best="loss", explode_at=0)
    with pytest.raises(ValueError, match="keep_best is 'loss', .*'eval_ema/loss'"):
        loop.run(experiment)


def test_epochs_count_passes_over_the_training_images():
    assert tiny.experiment("x", steps=0, epochs=2.0).plan(1442).steps == 46
