"""Makes file operations of other processes fail, through a C library that they preload.

faults = Faults(folder, [folder / "run"])
process = subprocess.Popen(command, env=os.environ | faults.environment())
faults.arm({"write"}, errno.ENOSPC)  # the disk is full from now on
faults.disarm()                      # the disk has room again

This affects calls from any language, except those inside the C library (fread, fwrite) and reads
through memory maps.
"""

import ctypes
import mmap
import pathlib
import re
import shutil
import subprocess
from collections.abc import Iterable

CALLS = ("write", "fsync", "rename", "open", "create", "read", "stat", "mkdir", "unlink")
SOURCE = pathlib.Path(__file__).with_name("fault_shim.c")
COMPILER = shutil.which("cc")
FOR_GOOD = 2**31 - 1
# Parts of names that differ between runs; "#7 (deleted)" is a file without a name.
VOLATILE = re.compile(
    r"(?<![a-z])(?:[0-9a-f]{8,}|\d+)(?![a-z])|(?<=/tmp)[a-z0-9_]{8}|#\d+ \(deleted\)"
)


def path_pattern(path: str) -> str:
    """Returns a pattern for `Faults.arm` that matches the same file in any run."""
    return VOLATILE.sub("*", path)


class Control(ctypes.Structure):
    """Mirrors the struct `control` of the library."""

    _fields_ = [
        *(
            (name, ctypes.c_int32)
            for name in ("calls", "error", "first", "last", "every", "logging")
        ),
        *((name, ctypes.c_int32) for name in ("number", "shortened")),
        ("pattern", ctypes.c_char * 4000),
    ]


class Faults:
    """Switches faults on and off for all processes that were started with `environment`.

    Args:
        folder: existing folder for the library, the control file and the log.
        concerned: folders in which calls may fail.
    """

    def __init__(self, folder: pathlib.Path, concerned: Iterable[pathlib.Path]):
        assert COMPILER is not None
        self._library, self._path = folder / "faults.so", folder / "faults.control"
        self.log = folder / "faults.log"
        self._concerned = ":".join(str(path.absolute()) for path in concerned)
        if not self._library.exists():
            flags = ("-O1", "-shared", "-fPIC", "-o", str(self._library))
            subprocess.run([COMPILER, *flags, str(SOURCE), "-ldl"], check=True)
        if not self._path.exists():
            self._path.write_bytes(bytes(ctypes.sizeof(Control)))
        with open(self._path, "r+b") as file:
            self._control = Control.from_buffer(mmap.mmap(file.fileno(), 0))

    def environment(self) -> dict[str, str]:
        """Returns the environment variables that a process needs for faults."""
        return {
            "LD_PRELOAD": str(self._library),
            "FAULT_CONTROL": str(self._path),
            "FAULT_FOLDERS": self._concerned,
            "FAULT_LOG": str(self.log),
        }

    def arm(
        self,
        calls: Iterable[str],
        error: int,
        first: int = 0,
        count: int = FOR_GOOD,
        pattern: str = "",
        every: int = 1,
    ) -> None:
        """Makes calls `first` to `first + count - 1` fail, counted from 0, starting now.

        Args:
            calls: names of CALLS that are counted.
            error: errno of the failing calls; with ENOSPC, half of a write first succeeds.
            pattern: fnmatch pattern of the full paths to count; "*" matches no "/". "" for all.
            every: interval between failing calls; 3 for the first, fourth, …
        """
        self.disarm()
        self._control.error, self._control.pattern = error, pattern.encode()
        self._control.first, self._control.last = first, min(first + count, FOR_GOOD)
        self._control.every, self._control.number, self._control.shortened = every, 0, 0
        self._control.calls = sum(1 << CALLS.index(call) for call in calls)

    def disarm(self) -> None:
        """Makes all calls succeed again."""
        self._control.calls = 0

    def record(self, on: bool) -> None:
        """Logs all calls, or only those that fail."""
        self._control.logging = int(on)

    def clear_log(self) -> None:
        self.log.write_bytes(b"")  # processes hold it open, and append to it

    def logged(self, what: str) -> list[tuple[str, str]]:
        """Returns (call, path) of calls that "fail" or "pass" since the log was cleared."""
        text = self.log.read_text() if self.log.exists() else ""
        lines = (line.split(" ", 2) for line in text.splitlines())
        return [(call, path) for outcome, call, path in lines if outcome == what]
