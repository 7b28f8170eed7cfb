"""How fast a run goes, how hard its devices work, and how long it waits for data."""

import contextlib
import time
from collections.abc import Iterator

import jax

from varjax.runtime import hardware


class ThroughputMeter:
    """Measures speed between two calls of `measure`, from the end of the first step on.

    It reads the host's clock and counters and never waits for a device.

    Attributes:
        step_flops: FLOP of the model in a step (`Task.train_flops`), to be set once it is known.
    """

    def __init__(self, batch_size: int):
        self.step_flops = 0
        self._batch_size = batch_size
        self._last: tuple[int, float, float] | None = None
        self._paused_seconds = 0.0
        # Measured now: later it would disturb the training.
        self._peak_flops = hardware.peak_flops()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of the measurement."""
        begin = time.monotonic()
        yield
        self._paused_seconds += time.monotonic() - begin

    def measure(self, step: int, waited: float) -> dict[str, float]:
        """Returns figures about the steps since the last call; at the first call memory only.

        Args:
            step: number of steps done so far.
            waited: seconds spent waiting for data so far.

        Returns:
            `hardware.memory_usage`, and images_per_second; step_seconds; tflops_per_device, the
            model's TFLOP/s; peak_share, that as a share of `hardware.peak_flops`; data_wait in
            seconds; data_wait_share, that as a share of all time.
        """
        now = time.monotonic() - self._paused_seconds
        before, self._last = self._last, (step, now, waited)
        if before is None:
            return hardware.memory_usage()
        steps, seconds, wait = step - before[0], now - before[1], waited - before[2]
        flops = self.step_flops * steps / seconds / jax.device_count()
        return hardware.memory_usage() | {
            "images_per_second": steps * self._batch_size / seconds,
            "step_seconds": seconds / steps,
            "tflops_per_device": flops / 1e12,
            "peak_share": flops / self._peak_flops,
            "data_wait": wait,
            "data_wait_share": wait / seconds,
        }
