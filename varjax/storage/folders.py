"""Locks folders that several processes may write to, and checks folders before long work."""

import contextlib
import errno
import fcntl
import functools
import json
import os
import pathlib
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from typing import Any

from varjax.errors import InputError, StorageError
from varjax.storage import buckets, untrusted
from varjax.storage.buckets import as_path, in_bucket
from varjax.storage.files import (
    create_json,
    exists,
    probe_writable,
    read_json,
    read_tensors,
    remove,
)

# Twenty folders with two links to the next have a million paths.
MAX_VISITS = 64
LOCK_FILE = ".lock"
LISTING_SECONDS = 5.0  # until a network disk lists files of another machine


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike, wait: bool = False) -> Iterator[None]:
    """Locks a folder against other processes until the context or this process ends.

    Buckets and some file systems have no locks; a line on stderr says so.

    Args:
        folder: folder to lock, created if it is missing. An empty file .lock is left in it.
        wait: whether to wait for another process that holds the lock, instead of raising.

    Raises:
        InputError: another process holds the lock.
        StorageError: the folder cannot be written.
    """
    folder = as_path(folder)
    if in_bucket(folder):
        _say_unlocked(folder, "a bucket has no locks")
        yield
        return
    try:
        descriptor = _open_locked(folder, wait)
    except InputError:
        raise
    except OSError as error:
        raise StorageError(f"{folder} cannot be locked: {error}") from error
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            os.ftruncate(descriptor, 0)
        os.close(descriptor)


@contextlib.contextmanager
def locked_work_folder(folder: str | os.PathLike) -> Iterator[None]:
    """Locks a folder as `lock_folder` does, and removes the lock file afterwards.

    If this leaves the folder empty, it is also removed.

    Raises:
        InputError: another process holds the lock.
        StorageError: the folder cannot be written.
    """
    folder = as_path(folder)
    try:
        with lock_folder(folder):
            try:
                yield
            finally:
                if not in_bucket(folder):
                    with contextlib.suppress(OSError):
                        (folder / LOCK_FILE).unlink()
    finally:
        if not in_bucket(folder):
            with contextlib.suppress(OSError):
                folder.rmdir()


def remove_work_folder(folder: str | os.PathLike) -> None:
    """Removes a folder and its content, even if this process holds its lock."""
    try:
        remove(as_path(folder))
    except OSError as error:
        # NFS keeps the open lock file under another name until `locked_work_folder` removes it.
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise


def check_writable(folder: pathlib.Path) -> None:
    """Makes the folder, writes a file in it and removes it; raises InputError if that fails."""
    try:
        if not in_bucket(folder):
            folder.mkdir(parents=True, exist_ok=True)
        probe_writable(folder)
    except InputError:  # from a bucket, with a clearer message
        raise
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}); choose another folder"
        ) from error


def is_locked(folder: str | os.PathLike) -> bool:
    """Returns whether a process holds `lock_folder` on this folder now; False if unknown."""
    if in_bucket(folder):
        return False
    try:  # a shared lock needs no permission to write, which others' runs do not give
        descriptor = os.open(as_path(folder) / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return False


def check_replaceable(folder: str | os.PathLike, own: Set[str] = frozenset()) -> None:
    """Raises InputError if replacing `folder` would delete files that were not made here.

    Args:
        folder: folder that may be absent, empty, or contain only a lock and files named in `own`.
        own: names of files that this command would write.
    """
    folder = as_path(folder)
    present = names_in(folder) if folder.is_dir() else {folder.name}
    if folder.exists() and (foreign := sorted(present - own - {LOCK_FILE})):
        raise InputError(
            f"{folder} exists and contains {', '.join(foreign[:5])}, which would be lost; "
            "choose another folder, or remove it first"
        )


def claim_folder(
    folder: str | os.PathLike, request_file: str, request: Mapping[str, Any], write: bool = True
) -> None:
    """Claims `folder` for a request, so that an interrupted command can continue in it.

    Args:
        folder: folder that is absent, empty (except for hidden files), or claimed by an equal
            request.
        request_file: name of the JSON file in the folder that records the request.
        request: JSON data that determines the whole content of the folder.
        write: whether to write the request file if it is missing. If several processes start at
            once, one writes it and the others compare.

    Raises:
        InputError: the folder has other files, or was made for another request; the message lists
            all differences.
    """
    folder = as_path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another folder")
    request_path = folder / request_file
    deadline = time.monotonic() + LISTING_SECONDS
    while True:
        # Files are listed once, because other processes may already be writing. The listing is
        # repeated because a network disk may list their files before the request file.
        listing = names_in(folder)
        claimed = request_file in listing or request_path.exists()
        foreign = not claimed and any(not name.startswith(".") for name in listing)
        if not foreign or time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    if foreign:
        raise InputError(
            f"{folder} holds files and no {request_file}; empty it or choose another folder"
        )
    if claimed or (write and not create_json(request_path, request)):
        check_same_request(folder, read_json(request_path), request)


def names_in(folder: pathlib.Path) -> set[str]:
    """Returns the names of all files and folders in a folder; none if it does not exist."""
    if in_bucket(folder):
        return set().union(*buckets.list_folder(folder))
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def check_same_request(
    path: str | os.PathLike, existing: Mapping[str, Any], requested: Mapping[str, Any]
) -> None:
    """Raises InputError with all differences if `path` was made for another request."""
    requested = json.loads(json.dumps(requested))  # without tuples, like `existing` from a file
    if lines := untrusted.differences(existing, requested, "there", "requested"):
        raise InputError(
            f"{path} was made with other settings, or from files that have since changed:\n  "
            + "\n  ".join(lines)
            + "\nUse the same settings to continue it, delete it, or choose another output"
        )


def _open_locked(folder: pathlib.Path, wait: bool) -> int:
    """Opens and locks the folder's lock file; InputError if another process holds the lock."""
    path, again = folder / LOCK_FILE, not wait
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # NFS locks only files that are open for writing.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):  # everyone who may write here may lock
                os.fchmod(descriptor, folder.stat().st_mode & 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except (BlockingIOError, PermissionError):
                if again:  # `is_locked` of another process may hold it for an instant
                    os.close(descriptor)
                    again = False
                    time.sleep(0.05)
                    continue
                holder = os.read(descriptor, 200).decode(errors="replace")
                raise InputError(
                    f"another process {f'({holder}) ' if holder else ''}is using {folder}; wait "
                    "for it, stop it, or choose another folder"
                ) from None
            except OSError as error:
                _say_unlocked(folder, str(error))
                return descriptor
            # If the previous holder removed the folder, other processes lock a new file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    with contextlib.suppress(OSError):  # on a full disk, the lock still works
                        os.ftruncate(descriptor, 0)
                        os.write(descriptor, f"{socket.gethostname()}, {os.getpid()}".encode())
                    return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


@functools.cache
def _say_unlocked(folder: pathlib.Path, reason: str) -> None:
    print(
        f"note: {folder} cannot be locked ({reason}); make sure that no other process writes there "
        "at the same time",
        file=sys.stderr,
    )


def read_or_remove(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Reads a file of `files.write_tensors` that can be regenerated.

    Returns:
        (tree, metadata); None if the file does not exist. A damaged file is reported and removed.

    Raises:
        StorageError: the machine or network fails; the file may be intact.
    """
    if not exists(path):
        return None
    try:
        return read_tensors(path)
    except StorageError:
        raise
    except InputError as error:
        print(f"{error}\n{path} is deleted and will be made again", file=sys.stderr)
        remove(path)
        return None


def files_below(
    folder: pathlib.Path, above: tuple[str, ...] = (), visits: Counter[str] | None = None
) -> Iterator[pathlib.Path]:
    """Yields the files in a folder and deeper, also behind links to folders, in no order.

    A folder that contains the link to it is not entered again. Hidden folders that cannot be read
    are left out.

    Args:
        folder: folder on a disk.
        above: real paths of the folders on the way to it.
        visits: number of visits of each folder by its real path, counted here.

    Raises:
        InputError: links lead to a folder in very many ways.
        OSError: a folder cannot be read.
    """
    visits = Counter() if visits is None else visits
    above = (*above, real := os.path.realpath(folder))
    visits[real] += 1
    if visits[real] > MAX_VISITS:
        raise InputError(
            f"{folder} is reached by more than {MAX_VISITS} ways through links; remove some"
        )
    try:
        with os.scandir(folder) as entries:
            found = list(entries)
    except PermissionError:
        if folder.name.startswith("."):
            return
        raise
    for entry in found:
        if not entry.is_dir():
            yield folder / entry.name
        elif os.path.realpath(entry.path) not in above:
            yield from files_below(folder / entry.name, above, visits)
