"""Prints lines for people to stderr, without breaking a progress bar."""

import contextlib
import sys
from typing import Any

from tqdm import tqdm


class _LossyStderr:
    """Ignores errors of stderr, such as a full disk; equal to it, so that tqdm clears bars."""

    def __eq__(self, other: object) -> bool:
        return other is sys.stderr or isinstance(other, _LossyStderr)

    def __hash__(self) -> int:
        return hash(sys.stderr)

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)


STDERR: Any = _LossyStderr()


def say(text: str) -> None:
    """Prints a line to stderr without breaking a bar; errors of stderr are ignored."""
    tqdm.write(text, file=STDERR)


def hide_bars() -> None:
    """Removes all bars from the terminal; each comes back when it moves, or after the next line."""
    with tqdm.get_lock():
        for bar in list(tqdm._instances):  # pyright: ignore[reportAttributeAccessIssue]
            bar.clear(nolock=True)


def duration(seconds: float) -> str:
    """Formats a time for people: "45 s", "12 min", "3.5 h", "4.2 days"."""
    for unit, size, limit in (("s", 1, 100), ("min", 60, 100), ("h", 3600, 48)):
        if seconds < limit * size:
            digits = 1 if unit == "h" else 0
            return f"{seconds / size:.{digits}f} {unit}"
    return f"{seconds / 86400:.1f} days"
