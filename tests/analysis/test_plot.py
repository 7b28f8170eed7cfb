import json
import re

import numpy as np
import pytest
from PIL import Image

from varjax.analysis import plot
from varjax.analysis.plot import _running_mean, main
from varjax.analysis.run_log import PUBLISHED_LOGS, read_run_log
from varjax.storage import files


def make(run_dir, text, batch_size=10):
    run_dir.mkdir()
    (run_dir / "config.json").write_text(json.dumps({"batch_size": batch_size, "task": {}}))
    if text is not None:
        (run_dir / "metrics.jsonl").write_text(text)
    return str(run_dir)


def log(steps, scales=2, evaluated=True):
    lines = []
    for step in range(1, steps + 1):
        loss = 8 / step
        by_scale = {f"loss_at_scale/{k}": loss + k for k in range(scales)}
        lines.append({"step": step, "loss": loss, "accuracy": 0.1} | by_scale)
        if evaluated:
            held_out = {f"eval/{name}": x for name, x in lines[-1].items() if name != "step"}
            lines.append({"step": step} | held_out)
    return "".join(json.dumps(line) + "\n" for line in lines)


def test_points_are_over_images_seen_and_skip_missing_values(tmp_path):
    text = '{"step": 1, "loss": 2.0}\n{"step": 2, "loss": null}\n{"step": 3, "eval/loss": 1.5}\n'
    run = read_run_log(make(tmp_path / "a", text + '{"step": 4, "lo'))
    images, losses = run.points("loss")
    assert (images.tolist(), losses.tolist()) == ([10], [2.0])
    assert run.points("eval/loss")[0].tolist() == [30]
    assert run.scales("loss_at_scale") == 0
    assert read_run_log(make(tmp_path / "b", log(1, scales=3))).scales("loss_at_scale") == 3


def test_a_running_mean_keeps_a_straight_line_and_averages_noise():
    line = np.linspace(3, 5, 50)
    np.testing.assert_allclose(_running_mean(line, 7)[:-7], line[:-7])
    noise = np.random.default_rng(0).normal(size=400)
    assert np.std(_running_mean(noise, 20)[20:-20]) < 0.3


@pytest.mark.slow
def test_runs_of_every_kind_are_drawn_into_one_picture(tmp_path, capsys):
    runs = [
        make(tmp_path / "long", log(130)),
        make(tmp_path / "other_scales", log(5, scales=7), batch_size=64),
        make(tmp_path / "not_evaluated", log(4, evaluated=False)),
        make(tmp_path / "nothing_yet", ""),
        make(tmp_path / "no_log", None),
        make(tmp_path / "being_written", log(3) + '{"step": 4, "loss": 1.'),
    ]
    assert main([*runs, "--out=all.png", "--reference=d16"]) == 0
    assert "all.png is written" in capsys.readouterr().out
    with Image.open("all.png") as picture:
        assert picture.format == "PNG" and picture.width > 1000
        all_size = picture.size
    assert main([runs[2], "--out=one.png"]) == 0
    with Image.open("one.png") as picture:
        assert picture.height < all_size[1]  # one row of scales, not two


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere does not exist"),
        ("folder", "folder is not a run: it has no config.json"),
        ("converted", "converted is not a training run"),
        ("empty", "nothing is logged yet in .*empty"),
    ],
)
def test_invalid_runs_give_an_error_and_no_picture(tmp_path, capsys, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "converted").mkdir()
    (tmp_path / "converted" / "config.json").write_text('{"sources": {}}')
    make(tmp_path / "empty", "")
    assert main([str(tmp_path / name), "--out=plot.png"]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error) and error.count("\n") == 1
    assert not (tmp_path / "plot.png").exists()


def test_a_folder_expands_to_its_runs(tmp_path):
    for name in ("b", "a"):
        make(tmp_path / name, "")
        (tmp_path / name / "data.json").write_text("{}")
    runs = [str(tmp_path / name) for name in ("a", "b")]
    assert plot._runs_at(str(tmp_path)) == runs and plot._runs_at(runs[0]) == runs[:1]


def test_the_reference_ends_after_200_epochs_of_imagenet():
    points = PUBLISHED_LOGS["d16"].points
    images_N, loss_N = points["loss"]
    assert images_N[-1] == 200 * 1_281_167 and loss_N[-1] == 6.046
    assert (np.diff(loss_N) < 0).all() and (np.diff(points["loss_at_scale/9"][1]) < 0).all()


@pytest.mark.parametrize("reference", PUBLISHED_LOGS)
def test_a_reference_has_a_value_for_each_of_its_points(reference):
    for images_N, values_N in PUBLISHED_LOGS[reference].points.values():
        assert images_N.shape == values_N.shape and (np.diff(images_N) > 0).all()


def test_the_mar_reference_is_drawn_next_to_a_run(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plot, "_reference", lambda panel, log, name: drawn.append((log.name, name)))
    lines = [{"step": step, "loss": 0.3, "eval_ema/fid": 9.0} for step in (10, 20)]
    run = make(tmp_path / "mar", "".join(json.dumps(line) + "\n" for line in lines))
    assert main([run, "--out=mar.png", "--reference=mar"]) == 0
    assert drawn == [(PUBLISHED_LOGS["mar"].name, name) for name in ("loss", "fid")]


def of_task(run_dir, task, line, head=None, fid=None):
    """Writes a run of a task with one logged line, and returns its log."""
    make(run_dir, json.dumps({"step": 1} | line))
    settings = {"_type": task, "model": {"head": head and {"_type": head}}}
    config = {"batch_size": 10, "task": settings, "fid": fid or {}}
    (run_dir / "config.json").write_text(json.dumps(config))
    return read_run_log(run_dir)


def test_each_kind_of_a_metric_has_its_own_panel(tmp_path):
    pixels = {"features": "pixels", "reference": "held_out"}
    inception = {"features": "inception", "reference": "a/long/path/ref.npz"}
    logs = [
        of_task(tmp_path / "0", "VARTask", {"loss": 3, "accuracy": 1, "eval/fid": 0.2}, fid=pixels),
        of_task(tmp_path / "1", "VARTask", {"eval/loss": 3.5, "eval_ema/fid": 9.0}, fid=inception),
        of_task(tmp_path / "2", "VQTask", {"loss": 0.1, "psnr": 20.0}),
        of_task(tmp_path / "3", "KLTask", {"loss": 0.1, "psnr": 21.0}),
        of_task(tmp_path / "4", "MARTask", {"loss": 0.3}, "DiffusionHead"),
        of_task(tmp_path / "5", "MARTask", {"loss": 6.0, "accuracy": 0.2}, "CategoricalHead"),
        of_task(tmp_path / "6", "VARTask", {}),
    ]  # fmt: skip
    panels = [(panel.title, panel.runs) for panel in plot.large_panels(logs)]
    assert panels == [
        ("loss: VAR", (0, 1)),
        ("loss: VQ", (2,)),
        ("loss: KL", (3,)),
        ("loss: MAR, DiffusionHead", (4,)),
        ("loss: MAR, CategoricalHead", (5,)),
        ("accuracy: VAR", (0,)),
        ("accuracy: MAR, CategoricalHead", (5,)),
        ("PSNR in dB", (2, 3)),
        ("FID: pixels, held_out", (0,)),
        ("FID: inception, path/ref.npz", (1,)),
    ]
    others = [
        inception | {"reference": "an/other/long/path/ref.npz"},
        inception | {"images": 50_000},
        inception | {"images": 10_000},
    ]
    logs += [
        of_task(tmp_path / f"7{i}", "VARTask", {"eval/fid": 9.0}, fid=fid)
        for i, fid in enumerate(others)
    ]
    panels = [(panel.title, panel.runs) for panel in plot.large_panels(logs)]
    assert panels[-3:] == [
        ("FID: inception, path/ref.npz", (7,)),
        ("FID: inception, path/ref.npz, 50,000 images", (8,)),
        ("FID: inception, path/ref.npz, 10,000 images", (9,)),
    ]
    assert [panel.title for panel in plot.large_panels(logs[:1])] == ["loss", "accuracy", "FID"]


def test_a_published_log_is_drawn_only_next_to_comparable_runs(tmp_path):
    drawn = set()
    for task in ("VARTask", "MARTask"):
        for features in ("pixels", "inception"):
            run_dir = tmp_path / f"{task}_{features}"
            run = of_task(run_dir, task, {"loss": 0.3}, fid={"features": features})
            drawn |= {
                (task, features, metric)
                for metric in ("loss", "fid")
                if plot._comparable(PUBLISHED_LOGS["mar"], run, metric)
            }
    assert drawn == {
        ("MARTask", "pixels", "loss"),
        ("MARTask", "inception", "loss"),
        ("MARTask", "inception", "fid"),
    }


def test_a_published_log_of_another_task_is_refused(tmp_path, capsys):
    of_task(tmp_path / "mar", "MARTask", {"loss": 0.3})
    assert main([str(tmp_path / "mar"), "--reference=d16", "--out=a.png"]) == 1
    assert "is a log of VARTask, which none of these runs has trained" in capsys.readouterr().err


def test_a_damaged_run_in_a_folder_is_left_out(tmp_path, capsys):
    (tmp_path / "runs").mkdir()
    for name in ("good", "$bad$"):
        make(tmp_path / "runs" / name, log(3))
        files.write_json(tmp_path / "runs" / name / "data.json", {})
    assert main(["runs", "--out=both.png"]) == 0  # dollar signs are not read as a formula
    (tmp_path / "runs" / "$bad$" / "config.json").write_text("{")
    assert main(["runs", "--out=one.png"]) == 0
    assert "note: runs/$bad$ is left out: " in capsys.readouterr().err
    (tmp_path / "runs" / "good" / "config.json").write_text("{")
    for location in ("runs/$bad$", "runs"):  # no run is left to draw
        assert main([location, "--out=none.png"]) == 1
        assert "config.json is not valid JSON" in capsys.readouterr().err


def test_many_runs_have_different_colors():
    for runs in (1, 10, 11, 40):
        assert len({plot._color(i, runs) for i in range(runs)}) == runs


def test_by_scale_refuses_a_metric_that_no_run_has_by_scale(tmp_path, capsys):
    assert main([make(tmp_path / "a", log(3)), "--by_scale=nothing", "--out=a.png"]) == 1
    assert "by_scale=nothing: no run has logged it for each scale" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
