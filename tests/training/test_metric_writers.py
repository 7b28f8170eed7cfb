import json

import numpy as np

from varjax.training.metric_writers import MetricWriter, flatten_metrics


def test_arrays_become_one_number_a_name():
    flat = flatten_metrics({"loss": np.float32(2), "by_scale": np.array([1.0, 3.0])})
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


def test_an_evaluation_that_is_to_be_repeated_is_dropped(tmp_path):
    for evaluated, left in ((True, 3), (False, 2)):
        with MetricWriter(tmp_path, 0) as writer:
            writer.write(1, {"eval/loss": 0.5})
            writer.write(2, {"loss": 0.5})
            writer.write(2, {"eval_ema/loss": 0.5})
        with MetricWriter(tmp_path, 2, evaluated):
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == left


def test_an_inactive_writer_leaves_nothing(tmp_path):
    with MetricWriter(tmp_path, 0, active=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.images(1, "a", np.zeros((1, 8, 8, 3)))
        writer.sync()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]
