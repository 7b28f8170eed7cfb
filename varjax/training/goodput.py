"""Measures a run's speed, and how it spends its time over all starts."""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax

from varjax.runtime import hardware

# restore: everything before the first step of a start; lost: steps that a later start repeats after
# a kill.
KINDS: tuple[str, ...] = ("compile", "restore", "data", "evaluate", "save", "step", "lost")
PREFIX = "goodput/"
STEPS_LOST = PREFIX + "steps_lost"


class Goodput:
    """Sorts the time of one start of a run into KINDS; each moment belongs to one of them.

        goodput = Goodput()  # time counts as "restore" from now on
        goodput.begin("step")
        with goodput.measure("save"):
            checkpoints.save(step, state)
        writer.write(step, goodput.metrics())

    A kill loses what is not written yet: at most the time since the last line.
    """

    def __init__(self):
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._steps_lost = 0.0
        self._kind, self._since = "restore", time.monotonic()

    def begin(self, kind: str) -> str:
        """Counts the time from now on as `kind`; returns the kind until now."""
        now, before = time.monotonic(), self._kind
        self._seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Counts the time inside as `kind`, not as the enclosing kind."""
        before = self.begin(kind)
        try:
            yield
        finally:
            self.begin(before)

    def seconds(self, *kinds: str) -> float:
        """Returns the time counted as these kinds so far."""
        self.begin(self._kind)
        return sum(self._seconds[kind] for kind in kinds)

    def add(self, earlier: Mapping[str, float]) -> None:
        """Adds the time of earlier starts, from `earlier_goodput`."""
        for kind in KINDS:
            self._seconds[kind] += earlier.get(_name(kind), 0.0)
        self._steps_lost += earlier.get(STEPS_LOST, 0.0)

    def metrics(self) -> dict[str, float]:
        """Returns sums so far: "goodput/KIND_seconds", "goodput/steps_lost", "goodput/fraction".

        The last is the fraction of the time spent in steps that were not lost, 0 … 1.
        """
        self.begin(self._kind)
        sums = {_name(kind): seconds for kind, seconds in self._seconds.items()}
        total = sum(self._seconds.values())
        fraction = self._seconds["step"] / total if total else 0.0
        return sums | {STEPS_LOST: self._steps_lost, PREFIX + "fraction": fraction}


def earlier_goodput(lines: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Returns the time of the earlier starts of a run, the last of which may have been killed.

    Args:
        lines: lines of metrics.jsonl after the last start, in order.
        step: step that the run continues from; time spent on later ones is "lost".

    Returns:
        Sums as in `Goodput.metrics`; {} if no line has any.
    """
    lines = [line for line in lines if isinstance(line.get(_name("step")), int | float)]
    if not lines:
        return {}
    last = lines[-1]
    sums = {name: x for name, x in last.items() if name.startswith(PREFIX)}
    lost_steps = last["step"] - step
    if lost_steps > 0:
        lost_seconds = last[_name("step")] - _step_seconds_at(step, lines)
        sums[_name("step")] -= lost_seconds
        sums[_name("lost")] = sums.get(_name("lost"), 0.0) + lost_seconds
        sums[STEPS_LOST] = sums.get(STEPS_LOST, 0.0) + lost_steps
    return sums


def _step_seconds_at(step: int, lines: Sequence[Mapping[str, Any]]) -> float:
    """Returns the seconds in steps until `step`, which is before the last line's step."""
    before, seconds = step, 0.0  # without an earlier line, the run began here
    for line in lines:
        after, seconds_after = line["step"], line[_name("step")]
        if after > step:
            return seconds + (seconds_after - seconds) * (step - before) / (after - before)
        before, seconds = after, seconds_after
    raise AssertionError


class ThroughputMeter:
    """Measures speed between two calls of `measure`, of which the first only starts the clock.

    It reads the host's clock and counters and never waits for a device. Time in
    evaluations, saves and compilation is left out.

    Args:
        batch_size: images in a step, over all devices.
        parameters: number of trained parameters, which is logged with the speed.

    Attributes:
        step_flops: FLOP of the model in a step (`Task.train_flops`), to be set once it is known.
    """

    def __init__(self, batch_size: int, parameters: int):
        self.step_flops, self.parameters = 0, parameters
        self._batch_size = batch_size
        self._last: tuple[int, float, float] | None = None
        # Measured now: later it would disturb the training.
        self._peak_flops = hardware.peak_flops()

    def measure(self, step: int, goodput: Goodput) -> dict[str, float]:
        """Returns figures about the steps since the last call; at the first call memory only.

        Args:
            step: number of steps done so far.
            goodput: what the time was spent on so far.

        Returns:
            `hardware.memory_usage`, and images_per_second; step_seconds; tflops_per_device, the
            model's TFLOP/s; mfu, their fraction of `hardware.peak_flops`; step_tflop, the model's
            TFLOP in a step; parameters; data_wait in seconds; data_wait_fraction, its fraction of
            the time.
        """
        now, waited = goodput.seconds("step", "data"), goodput.seconds("data")
        before, self._last = self._last, (step, now, waited)
        if before is None:
            return hardware.memory_usage()
        steps, seconds, wait = step - before[0], now - before[1], waited - before[2]
        flops = self.step_flops * steps / seconds / jax.device_count()
        return hardware.memory_usage() | {
            "images_per_second": steps * self._batch_size / seconds,
            "step_seconds": seconds / steps,
            "tflops_per_device": flops / 1e12,
            "mfu": flops / self._peak_flops,
            "step_tflop": self.step_flops / 1e12,
            "parameters": self.parameters,
            "data_wait": wait,
            "data_wait_fraction": wait / seconds,
        }


def _name(kind: str) -> str:
    return f"{PREFIX}{kind}_seconds"
