"""The commands of the README on the shipped configs, a few steps long, as a user runs them."""

import json
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parent.parent


def run(script, *flags, code=0):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, str(ROOT / script), *flags],
        capture_output=True, text=True, env=environment, timeout=300,
    )  # fmt: skip
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("digits")


def config(name, run_dir, *others):
    short = ["--config.steps=2", "--config.eval_every=1", "--config.preview_every=2"]
    flags = [*short, "--config.save_every=1", "--config.batch_size=8", *others]
    return [f"--config={ROOT / 'configs' / name}", f"--config.run_dir={run_dir}", *flags]


def test_digits_from_images_to_images(folder):
    tokenizer, transformer = folder / "tokenizer", folder / "transformer"
    run("train.py", *config("digits_tokenizer.py", tokenizer))
    other = f"--config.task.tokenizer_weights={tokenizer}"
    flags = config("digits.py", transformer, other, "--config.task.model.depth=1")
    run("train.py", *flags)
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

    again = run("train.py", *flags)
    assert "is finished" in again.stderr
    changed = run("train.py", *flags, "--config.task.model.width=64", code=1)
    assert "task.model.width: 128 in the run, 64 in the config" in changed.stderr


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--config=configs/none.py"], "no config file"),
        (["--config.steps=many"], "steps"),
        (["--config.task.model.dept=3"], "dept.*depth"),
        (["--config.task.tokenizer_weights=nowhere"], "nowhere"),
    ],
)
def test_a_user_s_mistake_is_one_line(folder, flags, message):
    if not flags[0].startswith("--config="):
        flags = [*config("digits.py", folder / "mistake"), *flags]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *flags],
        capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    assert re.search(message, done.stderr, re.DOTALL), done.stderr


def test_a_missing_run_is_one_line_too():
    done = run("sample.py", "--weights=runs/none", code=1)
    assert "runs/none" in done.stderr and "Traceback" not in done.stderr
