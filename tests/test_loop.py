import dataclasses
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from PIL import Image

from tests import tiny
from varjax.training import loop
from varjax.training.checkpoint import restore_params

ROOT = pathlib.Path(__file__).parents[1]
TIMING = {"images_per_second", "data_wait"}


def lines(run_dir):
    """What metrics.jsonl says apart from time."""
    text = (pathlib.Path(run_dir) / "metrics.jsonl").read_text()
    parsed = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING} for line in parsed]


def same_run(a, b):
    for ema in (False, True):
        jax.tree.map(np.testing.assert_array_equal, *(restore_params(d, ema=ema) for d in (a, b)))
    assert lines(a) == lines(b)


@dataclasses.dataclass(frozen=True)
class Interrupted(tiny.Tiny):
    """Gets a signal during its first evaluation."""

    signum: int = signal.SIGINT

    def eval_metrics(self, sums):
        if signal.getsignal(self.signum) != signal.SIG_DFL:  # a second one would kill
            signal.raise_signal(self.signum)
        return super().eval_metrics(sums)


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
        assert picture.size == (192, 128)
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
    state = task.init(jax.random.key(0)).replace(params=restore_params(run_dir))
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


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_saves_and_the_run_continues_as_if_nothing_was(whole, tmp_path, capsys, signum):
    experiment = tiny.experiment(tmp_path, keep_best="eval/loss", preview_every=20)
    task = Interrupted(signum=signum)
    with pytest.raises(SystemExit) as stop:
        loop.run(dataclasses.replace(experiment, task=task))
    assert stop.value.code == 128 + signum
    assert "saved after step 11; the same command continues" in capsys.readouterr().err
    config = json.loads((tmp_path / "config.json").read_text())
    config["task"] = json.loads((whole[0] / "config.json").read_text())["task"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    loop.run(experiment)
    same_run(whole[0], tmp_path)


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
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(restore_params(tmp_path)))


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


def test_patience_ends_a_run_that_no_longer_improves(tmp_path):
    optimizer = tiny.AdamW(base_lr=0.0)
    changes = dict(optimizer=optimizer, eval_every=2, keep_best="eval/loss", patience=3)
    loop.run(tiny.experiment(tmp_path, **changes))
    assert lines(tmp_path)[-1]["step"] == 8  # the best at 2, then three evaluations
    with loop.Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert loop.finished(checkpoints) is not None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 2.0}, "steps is 30, epochs 2.0"),
        ({"steps": 0}, "steps is 0, epochs 0.0"),
        ({"batch_size": 0}, "batch_size is 0, but must be at least 1"),
        ({"log_every": 0}, "log_every is 0"),
        ({"run_dir": ""}, "run_dir is empty"),
        ({"eval_every": 0, "keep_best": "eval/loss"}, "set eval_every above 0"),
        ({"patience": 2}, "patience is 2, but keep_best names no metric"),
    ],
)
def test_settings_without_sense_are_refused(tmp_path, changes, message):
    experiment = dataclasses.replace(tiny.experiment(tmp_path), **changes)
    with pytest.raises(ValueError, match=message):
        loop.run(experiment)


def test_an_unknown_metric_to_keep_lists_those_there_are(tmp_path):
    with pytest.raises(ValueError, match="keep_best is 'loss', .*eval/loss"):
        loop.run(tiny.experiment(tmp_path, keep_best="loss"))


def test_epochs_count_passes_over_the_training_images():
    plan = tiny.experiment("x", steps=0, epochs=2.0).plan(1442)
    assert (plan.steps, plan.steps_per_epoch) == (46, 23)
