"""Runs writers in threads, so that logs for watching a run cannot stop it."""

import collections
import contextlib
import threading
import time
from collections.abc import Callable, Mapping

import numpy as np

from varjax.runtime.messages import say
from varjax.training.run_writers import RunWriter

QUEUED_ENTRIES = 1000  # limit on entries that wait for a writer; their bytes: pictures are large
QUEUED_BYTES = 2**27
RETRY_SECONDS = 10.0  # until a writer that failed is opened again; doubles with each failure
MAX_RETRY_SECONDS = 600.0


class BackgroundWriter:
    """Passes a run's log entries to a writer in a thread. The caller never waits, nor sees errors.

        board = BackgroundWriter("TensorBoard", lambda _: TensorBoardWriter(run_dir, 1))
        board.scalars(50, {"loss": 1.5})
        board.close(time.monotonic() + 5)

    After an error the thread opens the writer again, later each time. Entries wait in a bounded
    queue, which drops the oldest when it is full. One line on stderr reports the first error, and
    another one that the writer works again.

    Args:
        name: name of the writer in messages.
        open_writer: function that makes the writer. Its argument says whether one was made before.
    """

    def __init__(self, name: str, open_writer: Callable[[bool], RunWriter]):
        self._name, self._open_writer = name, open_writer
        self._queue: collections.deque[tuple[Callable[[RunWriter], None], int]] = (
            collections.deque()
        )
        self._queued_bytes = 0
        self._lost = 0  # entries since the last line about them
        self._busy = False  # an entry is with the writer
        self._failures = 0  # in a row
        self._overdue = (
            False  # a drain reached its deadline, and the queue has not been empty since
        )
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name=f"write {name}", daemon=True)
        self._thread.start()

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Queues numbers by name."""
        copied = dict(metrics)
        self._put(lambda writer: writer.scalars(step, copied), 0)

    def picture(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        """Queues a uint8 picture."""
        self._put(lambda writer: writer.picture(step, name, picture_HWC), picture_HWC.nbytes)

    def drain(self, deadline: float) -> None:
        """Waits until everything is written, unless the writer fails or is already behind.

        Args:
            deadline: time at which the wait ends at the latest, by `time.monotonic`.
        """
        with self._changed:
            if not self._overdue:
                self._changed.wait_for(self._is_drained, max(0.0, deadline - time.monotonic()))
                self._overdue = self._is_behind()

    def begin_close(self) -> None:
        """Tells the thread to write what is queued, close the writer and end."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()

    def close(self, deadline: float) -> None:
        """Waits for the end of the thread, at most until `deadline` (`time.monotonic`)."""
        self.begin_close()
        self._thread.join(max(0.0, deadline - time.monotonic()))
        with self._changed:
            left = self._lost + len(self._queue) + self._busy
        if left:
            say(f"note: {self._name}: {left} entries were not written before the run ended")

    def _put(self, entry: Callable[[RunWriter], None], size: int) -> None:
        dropped = False
        with self._changed:
            self._queue.append((entry, size))
            self._queued_bytes += size
            while len(self._queue) > QUEUED_ENTRIES or (
                self._queued_bytes > QUEUED_BYTES and len(self._queue) > 1
            ):
                self._queued_bytes -= self._queue.popleft()[1]
                dropped = not (self._lost or self._failures)
                self._lost += 1
            self._changed.notify_all()
        if dropped:
            say(
                f"note: {self._name} cannot keep up; its oldest entries are dropped, "
                "training continues"
            )

    def _is_behind(self) -> bool:
        return bool(self._queue) or self._busy

    def _is_drained(self) -> bool:
        return not self._is_behind() or self._failures > 0 or not self._thread.is_alive()

    def _run(self) -> None:
        writer: RunWriter | None = None
        opened = False
        while (entry := self._next_entry(writer is None)) is not None:
            try:
                if writer is None:
                    writer, opened = self._open_writer(opened), True
                entry(writer)
            except Exception as error:  # of any kind: a writer must never stop the run
                if writer is not None:
                    with contextlib.suppress(Exception):
                        writer.close()
                writer = None
                self._failed(error)
            else:
                self._succeeded()
        try:
            if writer is not None:
                writer.close()
        except Exception as error:
            say(f"note: {self._name}: the last entries may be missing: {_describe(error)}")

    def _next_entry(self, closed: bool) -> Callable[[RunWriter], None] | None:
        """Waits for the next attempt if a writer failed, then for an entry; None to end.

        Args:
            closed: whether the writer must be opened first.
        """
        with self._changed:
            if closed and self._failures:
                pause = min(RETRY_SECONDS * 2.0 ** (self._failures - 1), MAX_RETRY_SECONDS)
                self._changed.wait_for(lambda: self._closing, pause)
                if self._closing and self._failures > 1:
                    return None
            self._changed.wait_for(lambda: self._queue or self._closing)
            if not self._queue:
                return None
            entry, size = self._queue.popleft()
            self._queued_bytes -= size
            self._busy = True
            return entry

    def _failed(self, error: Exception) -> None:
        with self._changed:
            self._busy, self._lost = False, self._lost + 1
            self._failures += 1
            first = self._failures == 1
            self._changed.notify_all()
        if first:
            say(
                f"note: {self._name} failed, training continues without it until it works again: "
                + _describe(error)
            )

    def _succeeded(self) -> None:
        with self._changed:
            self._busy = False
            lost, failed, caught_up = self._lost, self._failures, not self._queue
            self._failures = 0
            if failed or caught_up:
                self._lost = 0
            if caught_up:
                self._overdue = False
            self._changed.notify_all()
        if failed or (lost and caught_up):
            say(f"note: {self._name} works again; {lost} entries were lost")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]
