import json

import numpy as np

from varjax.training.metrics import MetricWriter, flatten, grid


def test_arrays_become_one_number_a_name():
    flat = flatten({"loss": np.float32(2), "by_scale": np.array([1.0, 3.0])})
    assert flat == {"loss": 2.0, "by_scale/0": 1.0, "by_scale/1": 3.0}


def test_a_resumed_run_drops_later_and_cut_off_lines(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": float("nan") if step == 2 else 0.5})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    with MetricWriter(tmp_path, 2) as writer:
        writer.write(3, {"loss": 0.25})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": i + 1, "loss": x} for i, x in enumerate((0.5, None, 0.25))]


def test_an_inactive_writer_leaves_nothing(tmp_path):
    with MetricWriter(tmp_path, 0, active=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.images(1, "a", np.zeros((1, 8, 8, 3)))
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_a_grid_reads_row_by_row():
    images_NHWC = np.linspace(0, 1, 5)[:, None, None, None] * np.ones((1, 64, 64, 3))
    picture_HWC = grid(images_NHWC)
    assert picture_HWC.shape == (128, 192, 3)
    np.testing.assert_array_equal(picture_HWC[::64, ::64, 0], [[0, 64, 128], [191, 255, 0]])
