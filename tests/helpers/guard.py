"""Installs an audit hook for reading untrusted files; it lasts until the process ends."""

import os
import pathlib
import sys
import tracemalloc  # noqa: F401  (the module warnings imports it to show one, at any moment)

EXECUTION = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pty.spawn"}
EXECUTION |= {"socket.connect", "ctypes.dlopen"}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
CHANGES = {f"os.{name}" for name in ("rename", "remove", "rmdir", "mkdir", "link", "symlink")}
CHANGES |= {"os.truncate", "os.chmod", "os.chown", "os.utime"}
NO_FOLDER = {"os.truncate"}


class ForbiddenError(BaseException):
    """Reports a forbidden action; not an Exception, because readers may catch those."""


class Guard:
    """Forbids actions that no reader needs: running programs, importing more code, writing files.

    Args:
        target: folder that may be written to.

    Attributes:
        complete: whether everything that reading needs is imported, so that imports are forbidden.
        broken: forbidden actions that were attempted, even if the reader caught the exception.
    """

    def __init__(self, target: pathlib.Path):
        self._target = os.path.realpath(target)
        self.complete, self.broken = False, []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple) -> None:
        forbidden = event in EXECUTION or event == "import" and self.complete
        if event == "open":
            path, _, flags = arguments
            forbidden = flags & WRITING and not isinstance(path, int) and not self._allows(path)
        elif event in CHANGES:
            paths = [x for x in arguments if isinstance(x, str | bytes | os.PathLike)]
            base = arguments[-1] if event not in NO_FOLDER else -1  # paths are relative to it
            forbidden = not all(self._allows(path, base) for path in paths)
        if forbidden:
            self.broken.append(f"{event} {arguments}"[:300])
            raise ForbiddenError(self.broken[-1])

    def _allows(self, path: str | bytes | os.PathLike, base: int = -1) -> bool:
        folder = os.readlink(f"/proc/self/fd/{base}") if base >= 0 else ""
        path = os.path.realpath(os.path.join(folder, os.fsdecode(path)))
        return path in (os.devnull, self._target) or path.startswith(self._target + os.sep)
