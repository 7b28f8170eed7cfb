import json

import numpy as np
import pytest

from varjax.data.sources import Digits
from varjax.evaluation import digits_report
from varjax.storage.captioned_grid import Captions, grid_layout


def test_real_digits_are_reported_as_good_and_noise_as_bad():
    held_out = Digits().source("held_out")
    table = digits_report.digits_report(held_out.images_NHWC, held_out.labels_N)
    assert table["samples"]["label accuracy"] == table["real held-out digits"]["label accuracy"]
    assert abs(table["samples"]["Fréchet distance"]) < 1e-3
    noise = np.random.default_rng(0).integers(0, 256, held_out.images_NHWC.shape, dtype=np.uint8)
    table = digits_report.digits_report(noise, held_out.labels_N)["samples"]
    assert table["label accuracy"] < 0.3 and table["Fréchet distance"] > 1
    assert table["copying"] == 0


def test_copying_fraction_and_class_diversity_have_known_values():
    train = Digits().source("train")
    x_NC = train.images_NHWC.reshape(len(train), -1) / 255.0
    assert digits_report.copying_fraction(x_NC, x_NC) == 1
    assert digits_report.class_diversity(np.ones((4, 3)), np.array([0, 0, 1, 1])) == 0
    np.testing.assert_allclose(
        digits_report.class_diversity(
            np.array([[0.0], [2.0], [0.0], [4.0]]), np.array([0, 0, 1, 1])
        ),
        3,
    )


def test_samples_are_drawn_left_of_real_digits():
    held_out = Digits().source("held_out")
    images_NHWC, label_N = held_out.images_NHWC, held_out.labels_N
    picture_HWC = digits_report.samples_and_real(images_NHWC, label_N, "samples of runs/digits")
    captions = Captions("samples", rows=[str(label) for label in range(10)])
    layout = grid_layout(100, (8, 8), captions, columns=10)
    left_HWC, right_HWC = np.split(picture_HWC, 2, axis=1)
    assert left_HWC.shape[:2] == layout.size
    top, below = layout.origin[0] - 4, slice(layout.origin[0], None)
    assert np.array_equal(left_HWC[below], right_HWC[below])
    assert not np.array_equal(left_HWC[:top], right_HWC[:top])  # the titles differ
    (y, x), (h, w) = layout.corner(30), layout.tile
    first_three = images_NHWC[label_N == 3][0].repeat(8, axis=0).repeat(8, axis=1)
    assert np.array_equal(left_HWC[y : y + h, x : x + w], first_three)


@pytest.mark.parametrize(
    ("label_N", "size", "message"),
    [
        (np.arange(90) % 10, 8, "has 9 to 9 samples of the classes 0 to 9"),
        (np.arange(110) % 11, 8, "and 10 of others"),
        (np.arange(100) % 10, 28, "images of 28x28 pixels; digits have 8x8"),
        (None, 8, "has no labels"),
    ],
)
def test_files_without_ten_digits_of_each_class_are_refused(
    label_N, size, message, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(digits_report, "digits_report", None)
    (tmp_path / "metrics.jsonl").touch()
    arrays = {} if label_N is None else {"labels": label_N}
    count = 100 if label_N is None else len(label_N)
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((count, size, size, 3), np.uint8), **arrays)
    flags = [f"--run={tmp_path}", f"--tokenizer={tmp_path}", f"--samples={tmp_path / 'x.npz'}"]
    assert digits_report.main(flags) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()


def test_several_files_are_reported_as_mean_and_standard_deviation(tmp_path, capsys, monkeypatch):
    def fake_report(images_NHWC, label_N):
        count = len(images_NHWC) / 100
        samples = {name: count * (i + 1.0) for i, name in enumerate(digits_report.MEANINGS)}
        return {"samples": samples, "real held-out digits": samples}

    monkeypatch.setattr(digits_report, "digits_report", fake_report)
    monkeypatch.setattr(digits_report, "read_run_log", lambda directory: None)
    monkeypatch.setattr(digits_report, "draw_curves", lambda logs, path: None)
    (tmp_path / "metrics.jsonl").touch()
    paths = []
    for count in (100, 200, 600):
        images_NHWC = np.zeros((count, 8, 8, 3), np.uint8)
        paths.append(tmp_path / f"{count}.npz")
        np.savez(paths[-1], arr_0=images_NHWC, labels=np.arange(count) % 10)
    flags = [f"--run={tmp_path}", f"--tokenizer={tmp_path}", "--samples", *map(str, paths)]
    assert digits_report.main(flags) == 0
    report, printed = json.loads((tmp_path / "report.json").read_text()), capsys.readouterr().out
    for i, name in enumerate(digits_report.MEANINGS):
        mean, spread = 3 * (i + 1), 7**0.5 * (i + 1)
        np.testing.assert_allclose(report["samples"][name], mean)
        np.testing.assert_allclose(report["standard deviation"][name], spread)
        assert f"{mean:.3f} ± {spread:.3f}" in printed
