"""Tests that a run continues exactly after a signal, a kill or a full disk."""

import dataclasses
import gc
import itertools
import json
import random
import re
import resource
import signal
import subprocess
import sys
import time

import orbax.checkpoint as ocp
import pytest

from tests.helpers import forked, tiny
from tests.helpers.paths import ROOT
from tests.helpers.tiny import assert_same_run, lines
from varjax.training import evaluator, loop
from varjax.training.preemption import PreemptionGuard
from varjax.training.sharding import Prefetcher

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("signum", "moment", "step"),
    [
        (signal.SIGINT, ("in step", 13), 13),
        (signal.SIGTERM, ("in step", 20), 20),  # due for evaluation, preview and save
        (signal.SIGTERM, ("at batch", 4), 10),  # the 4th of 6 in the first evaluation
        (signal.SIGINT, ("in step", 30), 30),
    ],
)
def test_a_signal_saves_at_once_and_the_run_continues_exactly(
    whole, tmp_path, capfd, monkeypatch, signum, moment, step
):
    experiment = tiny.experiment(tmp_path, keep_best="eval/loss", preview_every=20)
    with monkeypatch.context() as patch:
        raise_at(patch, signum, *moment)
        with pytest.raises(SystemExit) as stop:
            loop.train(experiment)
    assert stop.value.code == 128 + signum
    said = capfd.readouterr().err
    assert "stopping after this step" in said
    assert f"saved after step {step}; the same command continues" in said
    evaluated = [line["step"] for line in lines(tmp_path) if "eval/loss" in line]
    assert step not in evaluated and not list(tmp_path.glob(f"previews/*{step}_*"))
    loop.train(experiment)
    assert_same_run(whole[0], tmp_path)
    assert len(list((tmp_path / "previews").iterdir())) == 1
    assert loop.train(experiment) == whole[1]
    assert lines(whole[0]) == lines(tmp_path)


def test_a_postponed_evaluation_is_made_only_once(whole, tmp_path, monkeypatch):
    experiment = tiny.experiment(tmp_path, keep_best="eval/loss", preview_every=20)
    with monkeypatch.context() as patch:
        raise_at(patch, signal.SIGTERM, "in step", 30)
        with pytest.raises(SystemExit):
            loop.train(experiment)
    assert loop.train(experiment) == whole[1]
    monkeypatch.setattr(loop, "take_steps", None)  # a finished run does not need it
    assert loop.train(experiment) == whole[1]


def raise_at(patch, signum, place, number):
    """Raises the signal once, at the training step or evaluation batch of this number."""
    take, placed = Prefetcher.__next__, evaluator.put_batch
    steps, batches = itertools.count(1), itertools.count()

    def at_step(feed):
        if place == "in step" and next(steps) == number:
            signal.raise_signal(signum)
        return take(feed)

    def at_batch(*args):
        if place == "at batch" and next(batches) == number:
            signal.raise_signal(signum)
        return placed(*args)

    patch.setattr(Prefetcher, "__next__", at_step)
    patch.setattr(evaluator, "put_batch", at_batch)


def test_a_signal_may_arrive_during_a_print(monkeypatch):
    """A print from the handler would raise RuntimeError, because streams are not reentrant."""

    class Busy:
        def write(self, text):
            raise RuntimeError("reentrant call")

    monkeypatch.setattr(sys, "stderr", Busy())
    with PreemptionGuard() as preemption:
        signal.raise_signal(signal.SIGINT)
        assert preemption.signalled()


OFTEN = dict(steps=150, save_every=7, eval_every=40, keep_best="eval/loss")
CHILD = """
import json, sys
from tests.helpers import tiny
from varjax.training import loop
loop.train(tiny.experiment(sys.argv[1], **json.loads(sys.argv[2])))
"""


def test_a_run_killed_at_any_moment_ends_bit_identically(tmp_path):
    """Two processes are killed up to 0.4 s after their first line; a third one finishes the run."""
    loop.train(tiny.experiment(tmp_path / "whole", **OFTEN))
    seed = random.randrange(10**6)
    rng, run_dir = random.Random(seed), tmp_path / "killed"
    path, reached = run_dir / "metrics.jsonl", 0
    command = [sys.executable, "-c", CHILD, str(run_dir), json.dumps(OFTEN)]
    for _ in range(2):
        before = path.stat().st_mtime_ns if path.exists() else 0
        process = forked.Popen(command, stderr=subprocess.DEVNULL, cwd=ROOT)
        while process.poll() is None and (not path.exists() or path.stat().st_mtime_ns == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.4))
        process.kill()
        process.wait()
        saved = [int(p.name) for p in (run_dir / "checkpoints").iterdir() if p.name.isdigit()]
        reached = max(saved, default=0)
    final = forked.run(command, capture_output=True, text=True, timeout=400, cwd=ROOT)
    assert final.returncode == 0, final.stderr
    assert (f"after step {reached}" in final.stderr) == (0 < reached < 150), (seed, final.stderr)
    assert_same_run(tmp_path / "whole", run_dir)


FAILING_SAVE = """
import errno, os, sys
from tests.helpers import tiny
from varjax.runtime.distributed import run_on_processes
from varjax.training import loop

def makedirs(path, *arguments, make=os.makedirs, **options):
    if str(path).endswith("20.orbax-checkpoint-tmp"):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))
    make(path, *arguments, **options)

os.makedirs = makedirs
sys.exit(run_on_processes("train", lambda: loop.train(tiny.experiment(sys.argv[1]))))
"""


def test_an_unwritable_folder_ends_the_process_with_a_message(tmp_path):
    """The process must end at once, although Orbax's threads wait ten minutes for the folder."""
    command = [sys.executable, "-c", FAILING_SAVE, str(tmp_path / "run")]
    ended = forked.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr
    assert re.search(r"train: saving to .* failed: .*Permission denied", ended.stderr)
    assert "are good: [10]" in ended.stderr


# Orbax awaits only the first of its parallel writes that fails; the others then warn.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_full_disk_ends_the_run_and_keeps_the_saved_steps(tmp_path, monkeypatch):
    """The system limits files to 100 kB, but a checkpoint needs files of 1 MB."""
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
                loop.train(big)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    loop.train(big)
    loop.train(dataclasses.replace(big, run_dir=str(tmp_path / "whole")))
    assert_same_run(tmp_path / "run", tmp_path / "whole")
