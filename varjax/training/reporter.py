"""Reports the steps of a run, each one step late, and stops a run that diverged."""

import math
import time
from collections.abc import Callable, Mapping, Sequence

import jax

from varjax.errors import InputError
from varjax.training.checkpoint import Checkpoints
from varjax.training.goodput import Goodput, ThroughputMeter
from varjax.training.loop_state import LoopState
from varjax.training.metric_writers import MetricWriter, flatten_metrics
from varjax.training.progress import ProgressReporter
from varjax.training.train_step import SKIPPED, Metrics
from varjax.training.watchdog import Watchdog

RATE_STEPS = 10  # steps after the first one, from which on the time left is known well enough


class NonFiniteMetricError(InputError, FloatingPointError):
    """Reports that training diverged; other settings may help."""


class StepReporter:
    """Checks, writes and shows the metrics of each step once the next step was dispatched.

        state, metrics = train_step(state, frozen, next(batches), key)
        reporter.push(step, metrics)  # reports the step before
        ...
        reporter.flush()  # raises before a state that is not finite can be saved

    JAX dispatches a step and returns at once; only reading its metrics waits for the devices. They
    are read when the next step is already queued, so that the devices never wait for the host.

    Args:
        start: step that the run continues from.
        steps: length of the run in updates.
        log_every: steps between two lines of metrics.
        skip_nonfinite: number of steps in a row that may be skipped.
        loop_state: counts skipped steps.
        checkpoints: checkpoints, whose writes in the background are checked at each step.
        writer: writer of the lines.
        progress: progress on the terminal.
        throughput: meter of the speed.
        goodput: measures what the time is spent on.
        watchdog: watchdog, which is notified of progress.

    Attributes:
        last_loss: loss of the last step that was reported; NaN before the first.
    """

    def __init__(
        self,
        *,
        start: int,
        steps: int,
        log_every: int,
        skip_nonfinite: int,
        loop_state: LoopState,
        checkpoints: Checkpoints,
        writer: MetricWriter,
        progress: ProgressReporter,
        throughput: ThroughputMeter,
        goodput: Goodput,
        watchdog: Watchdog,
    ):
        self._first, self._last, self._log_every = start + 1, steps, log_every
        self._skip_nonfinite, self._loop_state = skip_nonfinite, loop_state
        self._checkpoints, self._writer, self._progress = checkpoints, writer, progress
        self._throughput, self._goodput, self._watchdog = throughput, goodput, watchdog
        self._pending: tuple[int, Metrics] | None = None
        self._since: tuple[float, float] | None = None  # time and compile time after the first step
        self.last_loss = math.nan

    def push(self, step: int, metrics: Metrics) -> None:
        """Takes the metrics of a step that was just dispatched; reports the step before."""
        self.flush()
        self._pending = step, metrics

    def flush(self) -> None:
        """Waits for the last step and reports it.

        Raises:
            NonFiniteMetricError: one of its metrics is not finite.
            StorageError: it cannot be logged, or an earlier save has failed.
        """
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        numbers = flatten_metrics(jax.device_get(metrics))
        self._watchdog.progress()
        self._checkpoints.check()
        self._loop_state.count_step(skipped=numbers.pop(SKIPPED, 0.0) > 0)
        skipped_in_row = self._loop_state.skipped_in_row
        if skipped_in_row == 1:
            self._progress.say(f"step {step} is skipped, because its gradient is not finite")
        if not 0 < skipped_in_row <= self._skip_nonfinite:
            check_finite(step, numbers, self._checkpoints.steps)
        if self._skip_nonfinite:
            numbers["skipped_steps"] = self._loop_state.skipped_steps
        self.last_loss = numbers.get("loss", math.nan)
        if self._since is None:
            self._since = time.monotonic(), self._goodput.seconds("compile")
        if step % self._log_every == 0 or step == self._last:
            numbers |= self._throughput.measure(step, self._goodput)
            self._writer.write(step, numbers | self._goodput.metrics())
        elif step == self._first:
            # The speed counts from here on, and is in the first line. How long the start took is
            # recorded, in case of a kill soon after.
            self._throughput.measure(step, self._goodput)
            self._writer.write(step, self._goodput.metrics())
        shown = (self._first, self._first + RATE_STEPS, self._last)
        if step % self._log_every == 0 or step in shown:
            self._progress.show(step, numbers, self._seconds_left(step))

    def _seconds_left(self, step: int) -> float:
        """Extrapolates the time since the first step: evaluations and saves too, no compilation."""
        if self._since is None or not self._first < step < self._last:
            return math.nan
        begin, compiled = self._since
        seconds = time.monotonic() - begin - (self._goodput.seconds("compile") - compiled)
        return seconds / (step - self._first) * (self._last - step)


def check_finite(
    step: int, numbers: Mapping[str, float], saved_steps: Callable[[], Sequence[int]] = tuple
) -> None:
    """Checks the metrics of a step.

    Args:
        step: number of the step, from 1.
        numbers: metrics of the step, by name.
        saved_steps: function that lists the steps of the run's checkpoints.

    Raises:
        NonFiniteMetricError: one of the metrics is not finite.
    """
    bad = [name for name, number in numbers.items() if not math.isfinite(number)]
    if not bad:
        return
    saved = saved_steps()
    last = f"the checkpoint of step {saved[-1]} is good" if saved else "nothing was saved yet"
    raise NonFiniteMetricError(
        f"after step {step}, {bad} are not finite; {last}. "
        "Try a lower learning rate, a longer warm-up or stronger clipping in a new run_dir; "
        "if only single steps do this, skip_nonfinite skips them, but not the first of a run"
    )
