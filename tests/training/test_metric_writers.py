import errno
import json
import struct
import threading
import time

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import masked_crc32c

from varjax.errors import StorageError
from varjax.training import background_writer
from varjax.training.metric_writers import MetricWriter, flatten_metrics
from varjax.training.run_writers import TensorBoardWriter


def test_arrays_are_flattened_to_one_number_per_name():
    flat = flatten_metrics({"loss": np.float32(2), "by_scale": np.array([1.0, 3.0])})
    assert flat == {"loss": 2.0, "by_scale/0": 1.0, "by_scale/1": 3.0}


def test_a_resumed_run_drops_later_and_truncated_lines(tmp_path):
    with MetricWriter(tmp_path, 0) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": float("nan") if step == 2 else 0.5})
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text() + '{"step": 4, "lo')
    with MetricWriter(tmp_path, 2) as writer:
        writer.write(3, {"loss": 0.25})
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert lines == [{"step": i + 1, "loss": x} for i, x in enumerate((0.5, None, 0.25))]


def test_lines_of_an_evaluation_to_be_repeated_are_dropped(tmp_path):
    for evaluated, left in ((True, 3), (False, 2)):
        with MetricWriter(tmp_path, 0) as writer:
            writer.write(1, {"eval/loss": 0.5})
            writer.write(2, {"loss": 0.5})
            writer.write(2, {"eval_ema/loss": 0.5})
        with MetricWriter(tmp_path, 2, evaluated):
            assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == left


def test_an_inactive_writer_writes_nothing(tmp_path):
    with MetricWriter(tmp_path, 0, active=False) as writer:
        writer.write(1, {"loss": 1.0})
        writer.images(1, "a", np.zeros((1, 8, 8, 3)))
        writer.sync()
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def scalars_of_tensorboard(folder):
    """Reads (step, name, value) from all event files, oldest first, and their purge steps."""
    found, purged = [], []
    for path in sorted(folder.iterdir(), key=lambda path: path.stat().st_mtime_ns):
        data = path.read_bytes()
        while data:  # records: length, its checksum, event, its checksum
            (length,) = struct.unpack("<Q", data[:8])
            for part, end in ((data[:8], 12), (data[12 : 12 + length], 16 + length)):
                assert struct.unpack("<I", data[end - 4 : end]) == (masked_crc32c(part),)
            event = Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == SessionLog.START:
                purged.append(event.step)
            for value in event.summary.value:
                found.append((event.step, value.tag, value.simple_value))
    return found, purged


def test_tensorboard_gets_numbers_and_pictures_and_hides_repeated_steps(tmp_path):
    for step in (2, 1):
        with MetricWriter(tmp_path, step) as writer:
            writer.write(step + 1, {"loss": 0.5, "eval/nothing": float("nan")})
            writer.images(step + 1, "a/b", np.zeros((1, 8, 8, 3)))
    found, purged = scalars_of_tensorboard(tmp_path / "tensorboard")
    assert purged == [3, 2]
    assert [(step, name) for step, name, _ in found[3:]] == [
        (2, "loss"),
        (2, "eval/nothing"),
        (2, "a/b"),
    ]
    assert found[0] == (3, "loss", 0.5)
    assert (tmp_path / "previews" / "step_00000002_a_b.png").is_file()


def test_a_temporarily_full_disk_loses_only_some_tensorboard_entries(tmp_path, monkeypatch, capfd):
    """tensorboardX's own writer would lose its thread here, and block at the eleventh entry."""
    monkeypatch.setattr(background_writer, "RETRY_SECONDS", 0.05)
    full, write = threading.Event(), TensorBoardWriter._write

    def write_on_a_full_disk(board, event):
        if full.is_set():
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(board, event)

    monkeypatch.setattr(TensorBoardWriter, "_write", write_on_a_full_disk)
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": 1.0})
        writer.sync()
        full.set()
        for step in range(2, 40):
            writer.write(step, {"loss": 1.0})
            time.sleep(0.005)
        full.clear()
        time.sleep(0.5)
        writer.write(40, {"loss": 1.0})
    found, purged = scalars_of_tensorboard(tmp_path / "tensorboard")
    steps = [step for step, _, _ in found]
    assert purged == [1], "what was written before the error stays visible"
    assert {1, 40} <= set(steps) and len(steps) > 30
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 40
    first, second = capfd.readouterr().err.splitlines()
    assert "TensorBoard failed" in first and "TensorBoard works again" in second


def test_a_full_disk_for_metrics_raises_a_storage_error(tmp_path):
    """Metrics are part of the run. Closing the writer must not hide the error behind another."""
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="writing .*metrics.jsonl failed"):
        with MetricWriter(tmp_path, 0) as writer:
            writer.write(1, {"loss": 1.0})


@pytest.mark.parametrize("where", ["previews", "tensorboard"])
def test_unwritable_log_folders_do_not_end_a_run(tmp_path, where, capfd):
    (tmp_path / where).write_text("")
    with MetricWriter(tmp_path, 0) as writer:
        writer.write(1, {"loss": 1.0})
        writer.images(1, "a", np.zeros((1, 8, 8, 3)))
        writer.write(2, {"loss": 1.0})
        writer.images(2, "a", np.zeros((1, 8, 8, 3)))
        writer.images(1, "b", np.zeros((1, 8)))  # not images
        writer.sync()
    said = capfd.readouterr().err
    assert said.count("failed, training continues") == 1 and "no preview b of step 1" in said
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_lines_that_are_not_metrics_are_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'5\n[1]\n\xff\n{"step": "a"}\n{"step": 1}\n{}\n')
    with MetricWriter(tmp_path, 1):
        assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_preview_with_nan_is_reported_and_not_written(tmp_path, capfd):
    image_NHWC = np.full((1, 64, 64, 1), 0.5, np.float32)
    with MetricWriter(tmp_path, 0) as writer:
        writer.images(2, "samples", image_NHWC)
        image_NHWC[0, 0, 0, 0] = np.nan
        writer.images(3, "samples", image_NHWC)
    assert "no preview samples of step 3: the images contain NaN" in capfd.readouterr().err
    assert [path.name for path in (tmp_path / "previews").iterdir()] == [
        "step_00000002_samples.png"
    ]
