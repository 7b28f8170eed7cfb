"""Tests that a run trains and saves while its log writers hang or fail."""

import signal
import sys
import time

import pytest

from tests.helpers import forked, tiny
from tests.helpers.paths import ROOT
from varjax.checkpoints.saved_steps import SavedSteps
from varjax.data.loader import Loader
from varjax.errors import StorageError
from varjax.training import loop

pytestmark = pytest.mark.slow

# The service of Weights & Biases does not answer, TensorBoard's disk hangs, and neither previews
# nor traces can be written.
CHILD = """
import sys, time, types
wandb = types.ModuleType("wandb")
wandb.init = lambda **_: time.sleep(10**6)
sys.modules["wandb"] = wandb
from tests.helpers import tiny
from varjax.training import loop
from varjax.training.run_writers import TensorBoardWriter
TensorBoardWriter.scalars = lambda *_: time.sleep(10**6)
loop.train(
    tiny.experiment(
        sys.argv[1], steps=10**6, log_every=1, eval_every=0, preview_every=10, save_every=20,
        wandb="x",
    ),
    profile="2:3",
)
"""


def test_steps_continue_and_sigterm_saves_within_ten_seconds(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("previews", "profile"):
        (run / name).write_text("no folder")
    with open(tmp_path / "log", "w") as log:
        process = forked.Popen(
            [sys.executable, "-c", CHILD, str(run)], stderr=log, stdout=log, cwd=ROOT
        )
    begin = time.monotonic()
    while len(tiny.lines(run) if (run / "metrics.jsonl").exists() else ()) < 50:
        assert process.poll() is None and time.monotonic() - begin < 120
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    begin = time.monotonic()
    try:
        assert process.wait(60) == 128 + signal.SIGTERM
        assert time.monotonic() - begin < 10
    finally:
        process.kill()
    assert SavedSteps(run / "checkpoints").steps()[-1] == tiny.lines(run)[-1]["step"]
    said = (tmp_path / "log").read_text()
    assert said.count("previews failed") == 1 and said.count("no trace of the steps") == 1
    assert "Weights & Biases: " in said and "TensorBoard: " in said  # entries not written
    assert "Traceback" not in said


def test_a_preview_whose_images_cannot_be_read_is_skipped(whole, tmp_path, monkeypatch, capfd):
    def fail(*_):
        raise StorageError("the network is gone")

    monkeypatch.setattr(Loader, "held_out_spread", fail)
    assert loop.train(tiny.experiment(tmp_path, preview_every=10)) == whole[1]
    assert "note: no preview after step 20: the network is gone" in capfd.readouterr().err
    assert not (tmp_path / "previews").exists()
