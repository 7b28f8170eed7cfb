import json
import time

import jax
import pytest

from tests.helpers import tiny
from varjax.runtime import hardware
from varjax.training import loop
from varjax.training.goodput import KINDS, Goodput, ThroughputMeter, earlier_goodput
from varjax.training.sharding import Prefetcher


@pytest.fixture
def now(monkeypatch):
    """Returns a clock that only moves when a test sets it, as in now[0] += 5."""
    clock = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    return clock


def seconds(metrics):
    return {kind: x for kind in KINDS if (x := metrics[f"goodput/{kind}_seconds"])}


def test_every_moment_belongs_to_one_kind(now):
    goodput = Goodput()
    now[0] += 1
    goodput.begin("step")
    now[0] += 10
    with goodput.measure("evaluate"):
        now[0] += 100
        with pytest.raises(ZeroDivisionError), goodput.measure("compile"):
            now[0] += 1000
            raise ZeroDivisionError
        now[0] += 200
    now[0] += 20
    expected = {"compile": 1000, "restore": 1, "evaluate": 300, "step": 30}
    assert seconds(goodput.metrics()) == expected
    assert goodput.metrics()["goodput/fraction"] == 30 / 1331
    assert seconds(goodput.metrics()) == expected  # asking changes nothing


def line(step, step_seconds, **others):
    return {"step": step, "goodput/step_seconds": step_seconds} | {
        f"goodput/{name}": x for name, x in others.items()
    }


@pytest.mark.parametrize(
    ("start", "lost_seconds", "lost_steps"),
    [
        (60, 0, 0),  # a signal stopped the run after this step
        (50, 14, 10),  # 10 steps of 1.4 s
        (40, 14 + 10, 20),  # and half of the steps between the lines of 30 and 50
        (0, 64, 60),  # nothing was saved
    ],
)
def test_steps_after_the_last_checkpoint_are_lost(start, lost_seconds, lost_steps):
    lines = [line(30, 30.0), line(50, 50.0), {"step": 55, "eval/loss": 1.0}]
    lines.append(line(60, 64.0, save_seconds=5.0, steps_lost=3.0, lost_seconds=2.0))
    found = earlier_goodput(lines, start)
    assert found["goodput/lost_seconds"] == pytest.approx(2 + lost_seconds)
    assert found["goodput/step_seconds"] == pytest.approx(64 - lost_seconds)
    assert found["goodput/steps_lost"] == 3 + lost_steps
    assert found["goodput/save_seconds"] == 5


def test_logs_of_older_versions_have_no_goodput():
    assert earlier_goodput([{"step": 1, "loss": 1.0}], 0) == {}
    assert earlier_goodput([], 0) == {}


def test_a_killed_fork_loses_only_its_own_steps():
    """It forked from step 100, so its first line is about step 101."""
    found = earlier_goodput([line(101, 2.0), line(104, 8.0)], 100)
    assert found["goodput/lost_seconds"] == 8.0 and found["goodput/steps_lost"] == 4
    assert found["goodput/step_seconds"] == 0


def test_earlier_starts_are_added(now):
    goodput = Goodput()
    goodput.add(line(5, 7.0, compile_seconds=4.0, steps_lost=2.0))
    now[0] += 1
    metrics = goodput.metrics()
    assert seconds(metrics) == {"step": 7, "compile": 4, "restore": 1}
    assert metrics["goodput/steps_lost"] == 2 and metrics["goodput/fraction"] == 7 / 12


def all_lines(run_dir):
    return [json.loads(x) for x in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_goodput_of_a_killed_run_covers_all_starts(tmp_path, monkeypatch):
    """The run is killed after step 17; its last line is about step 15, its checkpoint about 10."""
    experiment = tiny.experiment(tmp_path)

    class Killed(BaseException):
        pass

    with monkeypatch.context() as patch:
        take = Prefetcher.__next__

        def take_until_killed(batches):
            batches.taken = getattr(batches, "taken", 0) + 1
            if batches.taken == 18:
                raise Killed
            time.sleep(0.02)
            return take(batches)

        patch.setattr(Prefetcher, "__next__", take_until_killed)
        begin = time.monotonic()
        with pytest.raises(Killed):
            loop.train(experiment)
        first_start = time.monotonic() - begin
    before = [x for x in all_lines(tmp_path) if "goodput/fraction" in x]
    assert [x["step"] for x in before if "loss" not in x and "eval/loss" not in x] == [1]
    last = before[-1]
    assert last["step"] == 15 and last["goodput/steps_lost"] == 0
    assert all(seconds(last)[kind] > 0 for kind in KINDS if kind != "lost")
    assert seconds(last)["data"] > 15 * 0.02
    assert sum(seconds(last).values()) < first_start

    loop.train(experiment)
    after = all_lines(tmp_path)
    resumed = next(x for x in after if x["step"] == 10 and "loss" not in x and "eval/loss" not in x)
    end = [x for x in after if "goodput/fraction" in x][-1]
    assert resumed["goodput/steps_lost"] == end["goodput/steps_lost"] == 5
    assert 0 < seconds(resumed)["lost"] < seconds(last)["step"]
    lasting = seconds(resumed)["lost"] + seconds(resumed)["step"]
    assert lasting == pytest.approx(seconds(last)["step"])
    for kind in KINDS:
        assert seconds(end)[kind] >= seconds(resumed)[kind] > 0
    share = seconds(end)["step"] / sum(seconds(end).values())
    assert end["goodput/fraction"] == pytest.approx(share) and 0 < share < 1


def test_rates_exclude_evaluations_saves_and_compilation(now, monkeypatch):
    monkeypatch.setattr(hardware, "peak_flops", lambda: 4e12)
    meter = ThroughputMeter(batch_size=8, parameters=5)
    meter.step_flops = 6_000_000_000_000 * jax.device_count()
    goodput = Goodput()
    now[0] += 50
    goodput.begin("step")
    now[0] += 20
    assert meter.measure(3, goodput).keys() <= {"memory_gb", "memory_peak_gb"}
    now[0] += 7.5
    for kind in ("evaluate", "save", "compile"):
        with goodput.measure(kind):
            now[0] += 1000
    with goodput.measure("data"):
        now[0] += 2.5
    figures = meter.measure(8, goodput)
    del figures["memory_peak_gb"]
    assert figures == {
        "images_per_second": 4.0,
        "step_seconds": 2.0,
        "tflops_per_device": 3.0,
        "mfu": 0.75,
        "step_tflop": 6.0 * jax.device_count(),
        "parameters": 5,
        "data_wait": 2.5,
        "data_wait_fraction": 0.25,
    }
