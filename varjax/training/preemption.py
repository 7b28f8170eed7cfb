"""SIGINT and SIGTERM as a wish to stop after the step."""

import itertools
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ASKED = itertools.count()  # by this JAX finds a moment that all processes have yet to come to


class Interrupt:
    """While entered, the first signal is only noted; a second one kills as usual.

    With several processes only SIGTERM is handled: JAX itself watches for it and lets all of them
    agree on a moment. SIGINT then kills as usual.
    """

    def __init__(self):
        self.signum: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        main_thread = threading.current_thread() is threading.main_thread()
        if main_thread and jax.process_count() == 1:
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def noted(self) -> bool:
        """Whether to stop, as far as this process knows without asking the others."""
        return self.signum is not None

    def requested(self) -> bool:
        """Whether to stop. Several processes get the same answer and must ask equally often."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(next(ASKED)):
            self.signum = signal.SIGTERM
        return self.noted()

    def _note(self, signum: int, _: Any) -> None:
        self.signum = signum
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # not print: the signal may have come in the middle of one
        os.write(2, b"stopping after this step; once more kills at once\n")
