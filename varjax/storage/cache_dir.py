"""The cache: a folder of files that can be made or downloaded again, such as copies from buckets.

Copies from buckets are removed if no process has used them for COPY_DAYS, and the least recently
used ones if all together exceed MAX_COPY_BYTES. Copies that a process is using are kept.
"""

import contextlib
import fcntl
import functools
import os
import pathlib
import secrets
import shutil
import stat
import sys
import tempfile
import time

from varjax.errors import InputError, StorageError
from varjax.storage.buckets import in_bucket
from varjax.storage.untrusted import bytes_on_disk

COPIES = "buckets"  # folder of the copies
LOCK, REMOVED = ".lock", ".removed-"  # in a copy; in the folder of the copies
COPY_DAYS, MAX_COPY_BYTES = 30, 200 * 10**9
_locks: dict[pathlib.Path, int] = {}  # open lock files of the copies that this process uses


def cache_folder() -> pathlib.Path:
    """Returns the local folder of the cache, $VARJAX_CACHE, which may not exist yet.

    Without that variable it is varjax in $XDG_CACHE_HOME or ~/.cache. If there is no home folder,
    as in a container with an unknown user, it is in the system's temporary folder.
    """
    if chosen := os.environ.get("VARJAX_CACHE"):
        if in_bucket(chosen):
            raise InputError(f"VARJAX_CACHE={chosen}: must be a folder on a disk")
        try:
            return pathlib.Path(chosen).expanduser()
        except RuntimeError as error:  # no home folder of this user
            raise InputError(f"VARJAX_CACHE={chosen}: {error} Write the whole path") from error
    try:
        general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
        return pathlib.Path(general).expanduser() / "varjax"
    except RuntimeError:
        return _temporary_cache()


@functools.cache
def _temporary_cache() -> pathlib.Path:
    """Returns a folder shared by this user's processes, or a new one if others may write to it."""
    folder = pathlib.Path(tempfile.gettempdir()) / f"varjax-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        about = folder.lstat()
        own = about.st_uid == os.getuid() and stat.S_ISDIR(about.st_mode)
        if not own or about.st_mode & 0o022:
            folder = pathlib.Path(tempfile.mkdtemp(prefix="varjax-"))
    except OSError:
        folder = pathlib.Path(tempfile.mkdtemp(prefix="varjax-"))
    print(
        f"note: there is no home folder, so the cache is {folder}, which the system may empty; set "
        "VARJAX_CACHE to a permanent folder",
        file=sys.stderr,
    )
    return folder


def use_copy(key: str) -> pathlib.Path:
    """Returns the folder of a copy, which is not removed while this process runs.

    Args:
        key: identifier of the bucket's objects and their versions, valid as a file name.

    Raises:
        StorageError: the folder does not exist and cannot be made.
    """
    folder = cache_folder() / COPIES / key
    try:
        if folder not in _locks or not folder.is_dir():
            _locks[folder] = _lock(folder, fcntl.LOCK_SH)
        os.utime(folder)  # time of the last use
    except OSError as error:
        if not folder.is_dir():  # or else the cache is read-only for this process, or has no locks
            raise StorageError(
                f"{folder} cannot be made ({error}); set VARJAX_CACHE to another folder"
            ) from error
    return folder


def prune_copies() -> None:
    """Removes copies from buckets that are too old or too many, except those in use."""
    root, oldest, kept_bytes = cache_folder() / COPIES, time.time() - COPY_DAYS * 86400, 0
    with contextlib.suppress(OSError):
        copies = [path for path in root.iterdir() if not path.name.startswith(".")]
        for used, folder in sorted(((path.stat().st_mtime, path) for path in copies), reverse=True):
            size = bytes_on_disk(folder)
            unneeded = used <= oldest or kept_bytes + size > MAX_COPY_BYTES
            if not (unneeded and _set_aside(folder)):
                kept_bytes += size
        for folder in root.glob(f"{REMOVED}*"):  # also those of a killed process
            shutil.rmtree(folder, ignore_errors=True)


def _set_aside(folder: pathlib.Path) -> bool:
    """Renames a copy for its removal; returns False if a process uses it, or locks do not work."""
    try:
        descriptor = _lock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    try:
        folder.rename(folder.parent / f"{REMOVED}{secrets.token_hex(8)}")
    finally:
        os.close(descriptor)
    return True


def _lock(folder: pathlib.Path, kind: int) -> int:
    """Locks a copy by a file in it, shared or alone, until the returned descriptor is closed."""
    while True:
        with contextlib.suppress(FileNotFoundError):  # another process removes the copy meanwhile
            folder.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, kind)
                if os.path.samestat(os.fstat(descriptor), os.stat(folder / LOCK)):
                    return descriptor
            except OSError:
                os.close(descriptor)
                raise
            os.close(descriptor)
