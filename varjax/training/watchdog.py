"""Ends a run that hangs, so that a scheduler can restart it."""

import contextlib
import faulthandler
import os
import pathlib
import sys
import threading
from collections.abc import Callable, Iterator
from tempfile import TemporaryFile
from typing import Any

STALLED_EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again later
TICKS = 100  # number of checks in the time without progress
WRITE_SECONDS = 10.0  # limit on writing the stacks, because the disk may be what hangs


class Watchdog:
    """Ends the process with STALLED_EXIT_CODE after some minutes without progress.

        with Watchdog(30, run_dir / "error.txt") as watchdog:
            for step in steps:
                train_step()
                watchdog.progress()

    First it writes the stacks of all threads to the report and to stderr. It counts from the first
    `progress` on, but not while the whole process is stopped (SIGSTOP). Native code that never
    releases the GIL also stops the watchdog.

    Args:
        minutes: minutes without progress before the process ends; 0 for no watchdog.
        report: file of the report.
    """

    def __init__(self, minutes: float, report: pathlib.Path):
        self._minutes, self._report = minutes, report
        self._idle_ticks, self._pauses = 0, 0
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: Any) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join()

    def progress(self) -> None:
        """Records progress: a step is done, a batch is evaluated, or a step is saved."""
        self._idle_ticks = 0
        if self._minutes and self._thread is None:
            self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self._thread.start()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Pauses the watchdog."""
        self._pauses += 1
        try:
            yield
        finally:
            self._idle_ticks = 0
            self._pauses -= 1

    def _watch(self) -> None:
        # Ticks, not a clock: while the whole process is stopped, at most one tick passes.
        while not self._ended.wait(self._minutes * 60 / TICKS):
            self._idle_ticks = 0 if self._pauses else self._idle_ticks + 1
            if self._idle_ticks > TICKS:
                self._end()

    def _end(self) -> None:
        text = (
            f"no progress for {self._minutes:g} minutes (stalled_minutes), so the process "
            f"ends with exit code {STALLED_EXIT_CODE}; the same command continues after the last "
            f"checkpoint. Stacks of its threads:\n\n{_stacks()}"
        )
        _try_for(WRITE_SECONDS, lambda: self._report.write_text(text))
        _try_for(WRITE_SECONDS, lambda: _write_to_stderr(text))
        os._exit(STALLED_EXIT_CODE)  # a regular exit would wait for what hangs


def _stacks() -> str:
    # faulthandler keeps the GIL while it writes, and a file on a disk could hang.
    in_memory = sys.platform == "linux"
    with open(os.memfd_create("stacks"), "w+b") if in_memory else TemporaryFile() as file:
        faulthandler.dump_traceback(file)
        file.seek(0)
        return file.read().decode(errors="replace")


def _write_to_stderr(text: str) -> None:
    data = text.encode()
    while data:  # not through sys.stderr, whose lock may be held
        data = data[os.write(2, data) :]


def _try_for(seconds: float, action: Callable[[], Any]) -> None:
    """Calls `action`, waits for it at most this long, and ignores its errors."""

    def attempt() -> None:
        with contextlib.suppress(Exception):
            action()

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(seconds)
