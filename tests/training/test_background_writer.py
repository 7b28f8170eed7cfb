"""Tests that a run neither stops nor waits for log writers that fail, hang or are slow."""

import threading
import time

import numpy as np
import pytest

from varjax.training import background_writer
from varjax.training.background_writer import BackgroundWriter


class Recorder:
    """Records its calls; `broken` and `broken_open` make it fail, clearing `let_go` blocks it."""

    def __init__(self):
        self.steps, self.opened, self.closed = [], [], 0
        self.broken, self.broken_open = threading.Event(), threading.Event()
        self.let_go = threading.Event()
        self.let_go.set()

    def open(self, again):
        self.opened.append(again)
        if self.broken_open.is_set():
            raise OSError("no room")
        return self

    def scalars(self, step, metrics):
        self.let_go.wait()
        if self.broken.is_set():
            raise RuntimeError(f"broken at {step}")
        self.steps.append(step)

    def picture(self, step, name, picture_HWC):
        self.scalars(step, {})

    def close(self):
        self.closed += 1


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setattr(background_writer, "RETRY_SECONDS", 0.01)
    return Recorder()


def soon(seconds=5.0):
    return time.monotonic() + seconds


def wait_until(condition):
    deadline = soon()
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_entries_arrive_in_order_before_the_writer_is_closed(recorder):
    writer = BackgroundWriter("X", recorder.open)
    for step in range(500):
        writer.scalars(step, {"loss": 1.0})
    writer.picture(500, "a", np.zeros((2, 2, 3), np.uint8))
    writer.close(soon())
    assert recorder.steps == list(range(501)) and recorder.closed == 1
    assert recorder.opened == [False]


def test_entries_are_copied_when_they_are_queued(recorder):
    """The loop may change the dictionary afterwards."""
    seen = []
    recorder.scalars = lambda step, metrics: (recorder.let_go.wait(), seen.append(metrics))
    recorder.let_go.clear()
    writer, metrics = BackgroundWriter("X", recorder.open), {"loss": 1.0}
    writer.scalars(1, metrics)
    metrics["loss"] = 2.0
    recorder.let_go.set()
    writer.close(soon())
    assert seen == [{"loss": 1.0}]


def test_a_failed_writer_is_reopened_and_prints_two_messages(recorder, capfd):
    writer = BackgroundWriter("X", recorder.open)
    writer.scalars(0, {})
    writer.drain(soon())
    recorder.broken.set()
    for step in (1, 2, 3):
        writer.scalars(step, {})
    wait_until(lambda: writer._failures == 3)
    recorder.broken.clear()
    writer.scalars(4, {})
    wait_until(lambda: recorder.steps == [0, 4])
    writer.close(soon())
    first, second = capfd.readouterr().err.splitlines()
    assert "X failed" in first and "broken at 1" in first
    assert "works again" in second and "3 entries were lost" in second
    assert recorder.opened == [False, True, True, True] and recorder.closed == 4


def test_entries_stay_queued_while_the_writer_cannot_be_opened(recorder):
    """Each failed attempt loses one entry; the others stay in the queue."""
    recorder.broken_open.set()
    writer = BackgroundWriter("X", recorder.open)
    for step in range(20):
        writer.scalars(step, {})
    wait_until(lambda: writer._failures >= 2)
    recorder.broken_open.clear()
    wait_until(lambda: recorder.steps)
    writer.close(soon())
    lost = len(recorder.opened) - 1
    assert recorder.steps == list(range(lost, 20))
    assert not any(recorder.opened), "it was never open before"


def test_a_hanging_writer_does_not_block_and_loses_its_oldest_entries(recorder, monkeypatch, capfd):
    monkeypatch.setattr(background_writer, "QUEUED_ENTRIES", 3)
    recorder.let_go.clear()
    writer = BackgroundWriter("X", recorder.open)
    writer.scalars(0, {})
    wait_until(lambda: writer._busy)
    begin = time.monotonic()
    for step in range(1, 11):
        writer.scalars(step, {})
    writer.drain(soon(0.05))
    for _ in range(100):  # 5 s if each of them waited
        writer.drain(soon(0.05))
    assert time.monotonic() - begin < 2
    recorder.let_go.set()
    wait_until(lambda: not writer._is_behind())
    assert recorder.steps == [0, 8, 9, 10]
    writer.scalars(11, {})
    writer.drain(soon())
    assert recorder.steps[-1] == 11
    writer.close(soon())
    first, second = capfd.readouterr().err.splitlines()
    assert "cannot keep up" in first and "7 entries were lost" in second


def test_close_waits_for_a_hanging_writer_only_until_the_deadline(recorder, capfd):
    recorder.let_go.clear()
    writer = BackgroundWriter("X", recorder.open)
    for step in (1, 2, 3):
        writer.scalars(step, {})
    begin = time.monotonic()
    writer.close(soon(0.1))
    assert time.monotonic() - begin < 2
    assert "X: 3 entries were not written" in capfd.readouterr().err
    recorder.let_go.set()


def test_queued_pictures_have_a_size_limit(recorder, monkeypatch):
    monkeypatch.setattr(background_writer, "QUEUED_BYTES", 1000)
    recorder.let_go.clear()
    writer = BackgroundWriter("X", recorder.open)
    for step in range(10):
        writer.picture(step, "a", np.zeros((10, 10, 3), np.uint8))
        assert writer._queued_bytes <= 1000
    recorder.let_go.set()
    writer.close(soon())
    assert recorder.steps[-3:] == [7, 8, 9] and len(recorder.steps) <= 4
    assert writer._queued_bytes == 0


def test_a_writer_that_never_works_does_not_delay_the_end(recorder, monkeypatch, capfd):
    monkeypatch.setattr(background_writer, "RETRY_SECONDS", 60.0)
    recorder.broken_open.set()
    writer = BackgroundWriter("X", recorder.open)
    for step in (1, 2, 3):
        writer.scalars(step, {})
    wait_until(lambda: writer._failures == 1)
    begin = time.monotonic()
    writer.drain(soon(5))  # does not wait for a failed writer
    writer.close(soon(5))
    assert time.monotonic() - begin < 2
    assert "X: 3 entries were not written" in capfd.readouterr().err
