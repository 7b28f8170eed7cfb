"""Tests the README's commands on the shipped configs, for a few steps, as a user runs them."""

import json
import os
import pathlib
import re
import runpy
import sys

import numpy as np
import pytest

from tests.helpers import forked

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent


def run(script, *flags, code=0):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = forked.run(
        [sys.executable, str(ROOT / script), *flags],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture
def run_here(monkeypatch, capfd):
    """Returns a function like `run` that saves time by running the script in this process."""

    def runs_here(script, *flags, code=0):
        monkeypatch.setattr(sys, "argv", [script, *flags])
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(ROOT / script), run_name="__main__")
        said = capfd.readouterr().err
        assert ended.value.code == code, said
        return said

    return runs_here


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


def config(name, run_dir, *others):
    short = ["--config.steps=2", "--config.eval_every=1", "--config.preview_every=2"]
    flags = [*short, "--config.save_every=1", "--config.batch_size=8", *others]
    return [f"--config={ROOT / 'configs' / name}", f"--config.run_dir={run_dir}", *flags]


def test_digits_from_training_to_samples(folder, run_here):
    tokenizer, transformer = folder / "tokenizer", folder / "transformer"
    run("train.py", *config("digits_tokenizer.py", tokenizer))
    other = f"--config.task.tokenizer_weights={tokenizer}"
    flags = config("digits.py", transformer, other, "--config.task.model.depth=1")
    run_here("train.py", *flags)
    for path in (tokenizer, transformer):
        lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        assert {line["step"] for line in lines} == {1, 2}
        assert any("eval/loss" in line for line in lines)
        assert list((path / "previews").glob("*.png"))
        assert list((path / "tensorboard").iterdir())
    out = folder / "samples.npz"
    run("sample.py", f"--weights={transformer}", "--labels=7", "--count=3", f"--out={out}")
    with np.load(out) as file:
        assert file["arr_0"].shape == (3, 8, 8, 3) and file["labels"].tolist() == [7, 7, 7]

    assert "is finished" in run_here("train.py", *flags)
    changed = run_here("train.py", *flags, "--config.task.model.width=64", code=1)
    assert "task.model.width: 128 in the run, 64 in the config" in changed


@pytest.mark.parametrize(
    "code, flags, message",
    [
        (2, ["--config=configs/none.py"], "no config file"),
        (2, ["--config.steps=many"], "steps"),
        (2, ["--config.task.model.dept=3"], "dept.*depth"),
        (1, ["--config.task.tokenizer_weights=nowhere"], "nowhere"),
    ],
)
def test_a_user_error_prints_no_traceback(folder, run_here, code, flags, message):
    if not flags[0].startswith("--config="):
        flags = [*config("digits.py", folder / "mistake"), *flags]
    said = run_here("train.py", *flags, code=code)
    assert "Traceback" not in said
    assert re.search(message, said, re.DOTALL), said


def test_a_missing_run_prints_no_traceback():
    done = run("sample.py", "--weights=runs/none", code=1)
    assert "runs/none" in done.stderr and "Traceback" not in done.stderr
