"""How fast a run goes, how hard its devices work, and how long it waits for data."""

import contextlib
import time
from collections.abc import Iterator

import jax

from varjax.core import hardware


class Clock:
    """Speed since the last line, from the end of the first step on.

    It reads the host's clock and counters and never waits for a device.
    """

    def __init__(self, batch_size: int):
        self.step_flops = 0  # the model's FLOP of a step, by `Task.train_flops`
        self._batch_size = batch_size
        self._last: tuple[int, float, float] | None = None
        self._paused = 0.0
        self._peak = hardware.peak_flops()  # now: later, measuring would disturb the training

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count."""
        begin = time.monotonic()
        yield
        self._paused += time.monotonic() - begin

    def lap(self, step: int, waited: float) -> dict[str, float]:
        """Numbers about the steps since the last lap, given the seconds waited for data so far.

        tflops_per_device: the model's TFLOP/s; peak_share: that, as a part of what the device
        reaches at most (`hardware.peak_flops`). data_wait: seconds; data_wait_share: of all time.
        """
        now = time.monotonic() - self._paused
        before, self._last = self._last, (step, now, waited)
        if before is None:
            return hardware.memory()
        steps, seconds, wait = step - before[0], now - before[1], waited - before[2]
        flops = self.step_flops * steps / seconds / jax.device_count()
        return hardware.memory() | {
            "images_per_second": steps * self._batch_size / seconds,
            "step_seconds": seconds / steps,
            "tflops_per_device": flops / 1e12,
            "peak_share": flops / self._peak,
            "data_wait": wait,
            "data_wait_share": wait / seconds,
        }
