"""SIGINT and SIGTERM taken as a request to stop after the step."""

import itertools
import os
import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Numbers the questions whether to stop: by them JAX finds one that no process has asked yet.
SYNC_POINTS = itertools.count()


class PreemptionGuard:
    """Turns the first signal into a request to stop; a second one kills as usual.

        with PreemptionGuard() as preemption:
            while not preemption.should_stop():
                step()

    With several processes only SIGTERM is handled: JAX itself watches for it and lets all of them
    agree on a moment. SIGINT then kills as usual.

    Attributes:
        signum: the signal that asked to stop, None before.
    """

    def __init__(self):
        self.signum: int | None = None
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "PreemptionGuard":
        main_thread = threading.current_thread() is threading.main_thread()
        if main_thread and jax.process_count() == 1:
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def signalled(self) -> bool:
        """Returns whether to stop, as far as this process knows without asking the others."""
        return self.signum is not None

    def should_stop(self) -> bool:
        """Returns whether to stop: the same in all processes, which must ask equally often."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(
            next(SYNC_POINTS)
        ):
            self.signum = signal.SIGTERM
        return self.signalled()

    def _handle(self, signum: int, _: Any) -> None:
        self.signum = signum
        for number in SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        # not print: the signal may have come in the middle of one
        os.write(2, b"stopping after this step; once more kills at once\n")
