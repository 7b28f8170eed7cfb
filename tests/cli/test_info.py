import json

import numpy as np
import pytest
from PIL import Image

from tests.helpers.fake_sampler import FakeSampler
from varjax.checkpoints.saved_steps import SavedSteps
from varjax.cli import info, sample
from varjax.storage import files, image_io
from varjax.storage.picture_text import command_text
from varjax.var.model import VARConfig


def said(capsys, location):
    assert info.main([str(location)]) == 0
    return capsys.readouterr().out


def facts(capsys, location):
    """Returns the values that the command prints, by name."""
    return dict(line.split(maxsplit=1) for line in said(capsys, location).splitlines())


def test_samples_show_how_they_were_made(monkeypatch, capsys):
    monkeypatch.setattr(sample, "load", lambda *_, **__: FakeSampler())
    monkeypatch.setattr(sample, "use_compilation_cache", lambda: None)
    asked = ["--weights=fake", "--labels=3,7", "--count=2", "--seed=5", "--batch_size=2"]
    for name in ("a.png", "a.npz", "images"):
        assert sample.main([*asked, f"--out={name}"]) == 0
    capsys.readouterr()
    names = "a.png", "a.npz", "images", "images/000002_label0007.png"
    grid, npz, folder, one = (facts(capsys, name) for name in names)
    for found in (grid, npz, folder, one):
        assert (found["labels"], found["count"], found["seed"]) == ("3,7", "2", "5")
    assert grid["command"] == f"varjax sample {' '.join(asked)} --out=a.png"
    assert npz["kind"] == "4 images of 8x8x3" and folder["kind"] == "folder of 4 samples"
    assert (one["kind"], one["image"], one["label"]) == ("PNG image, 8x8 pixels", "2", "7")


@pytest.fixture
def trained(tmp_path):
    """Writes the directory of a VAR run without checkpoints."""
    run = tmp_path / "run"
    model = {"depth": 2, "width": 8, "heads": 2, "classes": 10, "scales": [1, 2], "vocab": 16,
             "code_channels": 4}  # fmt: skip
    task = {"_type": "VARTask", "model": model, "tokenizer": {}, "tokenizer_weights": "runs/t"}
    files.write_json(
        run / "config.json", {"task": task, "batch_size": 64, "seed": 3, "plan": {"steps": 300}}
    )
    files.write_json(run / "data.json", {})
    (run / "metrics.jsonl").write_text('{"step": 200, "loss": 2.5}')
    return run


def test_a_run_shows_its_settings_and_progress(trained, capsys):
    lines = facts(capsys, trained)
    model = json.loads((trained / "config.json").read_text())["task"]["model"]
    assert lines["kind"] == "training run of VARTask"
    assert lines["state"] == "stopped at step 200 of 300"
    assert lines["tokenizer"] == "runs/t" and lines["seed"] == "3" and lines["loss"] == "2.5"
    config = VARConfig(**{**model, "scales": (1, 2)})
    assert lines["parameters"] == f"{info._parameters(info.abstract_params(config)):,}"
    assert "checkpoints" not in lines


def test_a_checkpoint_shows_its_losses(trained, capsys, monkeypatch):
    for name in ("checkpoints/100", "checkpoints/200", "best/100"):
        (trained / name).mkdir(parents=True)
    monkeypatch.setattr(SavedSteps, "meta", lambda self, step: {"keep_best": "eval/loss"})
    settings = files.read_json(trained / "config.json")
    files.write_json(trained / "config.json", settings | {"keep_best": "eval/loss"})
    (trained / "metrics.jsonl").write_text(
        '{"step": 50, "loss": 3.5}\n{"step": 100, "eval/loss": 3.25, "eval_ema/loss": 9}\n'
        '{"step": 150, "loss": 2.5}\n{"step": 200, "eval/loss": 3.75, "eval_ema/loss": 4}\n'
    )
    assert facts(capsys, trained)["checkpoints"] == "100, 200, best 100"
    early, best, late = (facts(capsys, f"{trained}@{step}") for step in (100, "best", 200))
    assert best["checkpoint"] == "step 100, the best by eval/loss"
    assert late["checkpoint"] == "step 200"
    # By default, the best step loads its raw weights (eval/loss), other steps the EMA weights.
    for found, losses in ((early, ("3.5", "3.25")), (best, ("3.5", "3.25")), (late, ("2.5", "4"))):
        assert (found["loss"], found["held-out"].split()[-1]) == losses
        assert found["kind"] == "training run of VARTask"
    assert info.main([f"{trained}@150"]) == 1
    assert "the run has checkpoints of steps [100, 200]" in capsys.readouterr().err
    assert info.main(["nowhere@best"]) == 1
    assert "nowhere@best does not exist" in capsys.readouterr().err
    files.write_json(trained / "config.json", settings | {"keep_best": "eval/accuracy"})
    assert info.main([f"{trained}@best"]) == 1  # sampling refuses this, too
    assert "no best checkpoint by the metric" in capsys.readouterr().err


def test_text_in_a_picture_cannot_control_the_terminal(tmp_path, capsys):
    text = command_text("varjax \x1b[31m", [], {}) | {"Settings": "[" * 9}
    image_io.write_png(tmp_path / "a.png", np.zeros((4, 4, 1), np.uint8), text)
    shown = said(capsys, tmp_path / "a.png")
    assert "\x1b" not in shown and "\\x1b[31m" in shown and "[[[[[[[[[" in shown


def test_other_files_are_refused_or_reported_as_unknown(tmp_path, capsys):
    Image.new("L", (4, 4)).save("photo.png")
    np.savez("x.npz", arr_0=np.zeros((2, 4, 4, 3), np.uint8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "prepared").mkdir()
    files.write_json(tmp_path / "prepared/request.json", {"quality": 95, "shards": 2})
    (tmp_path / "text").write_text(json.dumps({}))
    assert "unknown: it carries no text" in said(capsys, "photo.png")
    assert "unknown: it was not written by varjax sample" in said(capsys, "x.npz")
    for name, message in (
        ("none", "does not exist"),
        ("var_d16", "is a published model that this machine does not have; varjax models var_d16"),
        ("empty", "folder without"),
        ("prepared", "without a request.json of samples"),
        ("text", "is not an image"),
    ):
        assert info.main([name]) == 1
        assert message in capsys.readouterr().err
