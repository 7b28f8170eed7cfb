"""Folders that several processes may want: who may write where, and who is there now."""

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
from collections.abc import Iterator, Mapping, Set
from typing import Any

from varjax.errors import InputError, StorageError
from varjax.storage import buckets
from varjax.storage.buckets import as_path, in_bucket
from varjax.storage.files import (
    create_json,
    exists,
    probe_writable,
    read_json,
    read_tensors,
    remove,
)

LOCK_FILE = ".lock"
LISTING_SECONDS = 5.0  # until a listing shows what another machine wrote


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike, wait: bool = False) -> Iterator[None]:
    """Keeps other processes that ask for the same folder out of it, until this one is done or dead.

    A file system without locks, or a bucket, keeps nobody out; then a line on stderr says so.

    Args:
        folder: folder to lock, created if it is missing. An empty file .lock stays behind in it.
        wait: whether to wait for another process that holds the lock, instead of raising.

    Raises:
        InputError: another process is there now.
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
    """Keeps other processes out of a folder as `lock_folder`; afterwards the lock is removed.

    A folder that is empty then is removed as well.

    Raises:
        InputError: another process is there now.
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
    """Removes a folder with all that is in it, also where this process holds its lock."""
    try:
        remove(as_path(folder))
    except OSError as error:
        # NFS keeps a file that is open, under another name: `locked_work_folder` comes later.
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise


def check_writable(folder: pathlib.Path) -> None:
    """Makes the folder and one file in it, which is gone again, or raises InputError."""
    try:
        if not in_bucket(folder):
            folder.mkdir(parents=True, exist_ok=True)
        probe_writable(folder)
    except InputError:  # says all that is known of a bucket
        raise
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}); choose another out"
        ) from error


def is_locked(folder: str | os.PathLike) -> bool:
    """Returns whether a process holds `lock_folder` on this folder now; False if unknown."""
    if in_bucket(folder):
        return False
    try:
        descriptor = os.open(as_path(folder) / LOCK_FILE, os.O_RDWR)
    except OSError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return True
    except OSError:
        pass
    finally:
        os.close(descriptor)
    return False


def check_replaceable(folder: str | os.PathLike, own: Set[str] = frozenset()) -> None:
    """Raises InputError where writing `folder` as a whole would lose anybody else's files.

    Args:
        folder: folder that may be absent, empty, or hold nothing but a lock and files named in
            `own`.
        own: names of files that the same command wrote and would write again.
    """
    folder = as_path(folder)
    present = names_in(folder) if folder.is_dir() else {folder.name}
    if folder.exists() and (foreign := sorted(present - own - {LOCK_FILE})):
        raise InputError(
            f"{folder} exists and holds {', '.join(foreign[:5])}, which would be lost; "
            "choose another out, or remove it first"
        )


def claim_folder(
    folder: str | os.PathLike, request_file: str, request: Mapping[str, Any], write: bool = True
) -> None:
    """Claims `folder` for a request, so that an interrupted command can continue in it.

    Args:
        folder: folder that is absent, empty (except for hidden files), or already claimed by an
            equal request.
        request_file: name of the JSON file in the folder that records the request.
        request: JSON data that determines the whole content of the folder.
        write: whether to write the request file if it is missing; of several processes that start
            at once, one writes it and the others compare.

    Raises:
        InputError: the folder holds other files, or was begun for another request; then all
            differences are listed.
    """
    folder = as_path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another out")
    request_path = folder / request_file
    deadline = time.monotonic() + LISTING_SECONDS
    while True:
        # One listing, for other processes may be at work in the folder already; and repeated, for
        # on a network's disk it may show what these have made, but not yet what began it.
        listing = names_in(folder)
        begun = request_file in listing or request_path.exists()
        foreign = not begun and any(not name.startswith(".") for name in listing)
        if not foreign or time.monotonic() >= deadline:
            break
        time.sleep(0.1)
    if foreign:
        raise InputError(
            f"{folder} holds files and no {request_file}; empty it or choose another out"
        )
    if begun or (write and not create_json(request_path, request)):
        check_same_request(folder, read_json(request_path), request)


def names_in(folder: pathlib.Path) -> set[str]:
    """Returns the names of everything in a folder; none if it does not exist."""
    if in_bucket(folder):
        return set().union(*buckets.list_folder(folder))
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def check_same_request(
    path: str | os.PathLike, there: Mapping[str, Any], asked: Mapping[str, Any]
) -> None:
    """Raises InputError, with all differences, unless `path` was made for the request `asked`."""
    asked = json.loads(json.dumps(asked))  # as `there` was: tuples become lists
    lines = [
        f"{name}: {there.get(name)} there, {asked.get(name)} asked for"
        for name in dict.fromkeys((*there, *asked))
        if there.get(name) != asked.get(name)
    ]
    if lines:
        raise InputError(
            f"{path} was made for another request, or of files that have changed since:\n  "
            + "\n  ".join(line if len(line) < 300 else line[:300] + " …" for line in lines)
            + "\nask for the same to go on, delete it, or choose another out"
        )


def _open_locked(folder: pathlib.Path, wait: bool) -> int:
    """Opens the folder's lock, for as long as it is open; InputError where another holds it."""
    path = folder / LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        # For writing, and a file: NFS locks nothing else.
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with contextlib.suppress(OSError):  # whoever may write to the folder may lock it
                os.fchmod(descriptor, folder.stat().st_mode & 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except (BlockingIOError, PermissionError):
                who = os.read(descriptor, 200).decode(errors="replace")
                raise InputError(
                    f"another process {f'({who}) ' if who else ''}is at work in {folder}; wait for "
                    "it, stop it, or choose another"
                ) from None
            except OSError as error:
                _say_unlocked(folder, str(error))
                return descriptor
            # The one that held it may have removed the folder: then others lock another file.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    with contextlib.suppress(OSError):  # a full disk can be locked as well
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
        f"note: nothing can be locked in {folder} ({reason}): take care that no other process "
        "works there at the same time",
        file=sys.stderr,
    )


def read_or_remove(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, str]] | None:
    """Reads a file of `files.write_tensors` that can be made again.

    Returns:
        (tree, metadata); None where there is no such file. A damaged one is reported and removed.

    Raises:
        StorageError: the machine or network fails; the file may be good.
    """
    if not exists(path):
        return None
    try:
        return read_tensors(path)
    except StorageError:
        raise
    except InputError as error:
        print(f"{error}\n{path} is deleted and made again", file=sys.stderr)
        remove(path)
        return None
