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
import socket
import stat
import sys
import tempfile
import time
from collections.abc import Iterator

from varjax.errors import InputError, StorageError
from varjax.storage.buckets import in_bucket
from varjax.storage.untrusted import bytes_on_disk

COPIES = "buckets"  # folder of the copies
USERS, REMOVED = ".users", ".removed-"  # in that folder
COPY_DAYS, MAX_COPY_BYTES = 30, 200 * 10**9
_lists: dict[pathlib.Path, int] = {}  # open files that list the copies this process uses
_used: set[pathlib.Path] = set()


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
        with _pruning_blocked(folder.parent):
            folder.mkdir(exist_ok=True)
            if folder not in _used:
                _list_as_used(folder)
            os.utime(folder)  # time of the last use
    except OSError as error:
        if not folder.is_dir():  # or else the cache is read-only for this process
            raise StorageError(
                f"{folder} cannot be made ({error}); set VARJAX_CACHE to another folder"
            ) from error
    return folder


def prune_copies() -> None:
    """Removes copies from buckets that are too old or too many, except those in use."""
    root, removed = cache_folder() / COPIES, []
    with contextlib.suppress(OSError), _pruning_blocked(root) as locked:
        # They are only renamed under the lock, because other processes wait for it.
        for folder in _unneeded(root) if locked else ():
            removed.append(folder.rename(root / f"{REMOVED}{secrets.token_hex(8)}"))
        removed += root.glob(f"{REMOVED}*")  # also those of a killed process
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)


def _unneeded(root: pathlib.Path) -> list[pathlib.Path]:
    in_use, oldest, kept_bytes = _keys_in_use(root), time.time() - COPY_DAYS * 86400, 0
    copies = [path for path in root.iterdir() if not path.name.startswith(".")]
    unneeded = []
    for used, folder in sorted(((path.stat().st_mtime, path) for path in copies), reverse=True):
        size = bytes_on_disk(folder)
        if folder.name in in_use or used > oldest and kept_bytes + size <= MAX_COPY_BYTES:
            kept_bytes += size
        else:
            unneeded.append(folder)
    return unneeded


@contextlib.contextmanager
def _pruning_blocked(root: pathlib.Path) -> Iterator[bool]:
    """Makes other processes wait in `use_copy` and `prune_copies`; yields whether locks work."""
    (root / USERS).mkdir(parents=True, exist_ok=True)
    descriptor = os.open(root / USERS / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)


def _list_as_used(folder: pathlib.Path) -> None:
    """Adds a copy to this process's list, a file that stays locked until the process ends."""
    users = folder.parent / USERS
    if users not in _lists:
        path = users / f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        _lists[users] = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        with contextlib.suppress(OSError):  # without locks, nothing is ever removed
            fcntl.flock(_lists[users], fcntl.LOCK_EX)
    os.write(_lists[users], f"{folder.name}\n".encode())
    _used.add(folder)


def _keys_in_use(root: pathlib.Path) -> set[str]:
    """Reads the lists of all running processes, and removes the other lists."""
    keys: set[str] = set()
    for path in (root / USERS).iterdir():
        with open(path) as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                keys |= set(file.read().split())
            else:
                path.unlink(missing_ok=True)
    return keys
