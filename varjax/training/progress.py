"""Shows a run's progress and notes on the terminal."""

import math
import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from varjax.runtime.messages import STDERR, duration, say

PLAIN_LINE_SECONDS = 10.0  # between two lines of progress where there is no terminal


class ProgressReporter:
    """Shows a bar on a terminal; elsewhere, prints a line about every ten seconds.

        with ProgressReporter(0, steps) as progress:
            progress.show(1, {"loss": 1.5})
            progress.say("a line for the user")

    Args:
        step: step that the run continues from.
        steps: length of the run in updates.
        active: False for a process that shows nothing.
    """

    def __init__(self, step: int, steps: int, active: bool = True):
        self._active, self._watched = active, sys.stderr.isatty()
        self._bar = tqdm(
            initial=step,
            total=steps,
            disable=not self.watched,
            file=STDERR,
            bar_format="step {n_fmt}/{total_fmt} |{bar}| {postfix}",
        )
        self._steps, self._said = steps, -math.inf

    @property
    def watched(self) -> bool:
        """Returns whether there is a bar."""
        return self._active and self._watched

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def show(self, step: int, metrics: Mapping[str, float], seconds_left: float = math.nan) -> None:
        """Shows that `step` is done.

        Args:
            step: number of updates done.
            metrics: numbers by name, of which the loss and the speed are shown.
            seconds_left: estimated time to the end of the run; NaN if it is unknown.
        """
        parts = [f"loss {metrics['loss']:.4g}"] if "loss" in metrics else []
        if "images_per_second" in metrics:
            parts.append(f"{metrics['images_per_second']:,.4g} images/s")
        if not math.isnan(seconds_left):
            parts.append(f"{duration(seconds_left)} left")
        text = ", ".join(parts)
        if self.watched:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._said > PLAIN_LINE_SECONDS or step == self._steps:
            self._said = time.monotonic()
            self.say(f"step {step:,}/{self._steps:,}: {text}")

    def say(self, text: str) -> None:
        """Prints a line, unless this process shows nothing."""
        if self._active:
            say(text)
