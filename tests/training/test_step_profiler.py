import time

import jax
import jax.numpy as jnp
import pytest

from varjax.errors import InputError
from varjax.training import step_profiler
from varjax.training.step_profiler import StepProfiler


@pytest.mark.slow
@pytest.mark.parametrize("stop_early", [False, True])
def test_the_requested_steps_are_traced(tmp_path, stop_early):
    with StepProfiler("2:3", tmp_path) as profiler:
        for step in range(1, 3 if stop_early else 6):
            profiler.begin_step()
            assert (tmp_path / "profile").exists() == (step > 3)
            profiler.end_step(jnp.ones(3) * step)
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_no_steps_give_no_trace(tmp_path):
    with StepProfiler("", tmp_path) as profiler:
        profiler.begin_step()
        profiler.end_step(jnp.ones(3))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("steps", ["3", "0:2", "5:4", "a:b", "1:2:3"])
def test_anything_but_two_steps_in_order_is_refused(steps, tmp_path):
    with pytest.raises(InputError, match=f"profile={steps}: must be START:STOP"):
        StepProfiler(steps, tmp_path)


@pytest.mark.parametrize("broken", ["start_trace", "stop_trace"])
def test_a_failing_trace_does_not_end_the_run(tmp_path, monkeypatch, broken, capfd):
    def fail(*_):
        raise OSError(28, "No space left on device")

    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, fail if name == broken else lambda *_: None)
    with StepProfiler("1:2", tmp_path) as profiler:
        for _ in range(3):
            profiler.begin_step()
            profiler.end_step(jnp.ones(3))
    (line,) = capfd.readouterr().err.splitlines()
    assert "no trace of the steps" in line and "No space left" in line


def test_a_slow_upload_of_a_trace_does_not_delay_the_end(tmp_path, monkeypatch):
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *_: None)
    monkeypatch.setattr(step_profiler, "CLOSE_SECONDS", 0.05)
    monkeypatch.setattr(step_profiler.LocalMirror, "close", lambda _: time.sleep(3))
    begin = time.monotonic()
    with StepProfiler("1:1", tmp_path) as profiler:
        profiler.begin_step()
        profiler.end_step(jnp.ones(3))
    assert time.monotonic() - begin < 2
