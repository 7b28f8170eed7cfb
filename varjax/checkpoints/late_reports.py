"""Keeps TensorStore from burying the error of a failed read under a thousand others."""

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from typing import Any

_lock, _new_event_loop = threading.Lock(), asyncio.new_event_loop
_readers = 0  # threads in `late_reports_ignored`


@contextlib.contextmanager
def late_reports_ignored() -> Iterator[None]:
    """Keeps event loops that are made here from printing errors that come after the first one.

    Orbax reads all arrays at the same time, in a new event loop, which it closes as soon as one
    read fails. TensorStore reports the others to the closed loop, and each report is an error that
    Python prints, in the middle of other lines. So is each failure that came before the loop was
    closed, but that nobody asked for.
    """
    global _readers
    with _lock:
        _readers += 1
        asyncio.new_event_loop = _tolerant_event_loop
    try:
        yield
    finally:
        with _lock:
            _readers -= 1
            if not _readers:
                asyncio.new_event_loop = _new_event_loop


def _tolerant_event_loop() -> asyncio.AbstractEventLoop:
    loop: Any = _new_event_loop()
    call_soon = loop.call_soon_threadsafe

    def call_soon_if_open(*arguments, **options):
        try:
            return call_soon(*arguments, **options)
        except RuntimeError:
            if not loop.is_closed():
                raise

    def handle(loop, context):
        if not isinstance(context.get("future"), asyncio.Task):
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)
    with contextlib.suppress(AttributeError):  # a loop of another package may allow no change
        loop.call_soon_threadsafe = call_soon_if_open
    return loop
