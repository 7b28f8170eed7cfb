"""Folders that a command fills: checked beforehand, one command at a time, no trace of the lock.

with locked_work_folder(folder):
    ...  # parts are written, and what they make
    remove_work_folder(folder)
"""

import contextlib
import errno
import os
import pathlib
from collections.abc import Iterator

from varjax.errors import InputError
from varjax.storage import files, folders
from varjax.storage.buckets import as_path, in_bucket


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
        with folders.lock_folder(folder):
            try:
                yield
            finally:
                if not in_bucket(folder):
                    with contextlib.suppress(OSError):
                        (folder / folders.LOCK_FILE).unlink()
    finally:
        if not in_bucket(folder):
            with contextlib.suppress(OSError):
                folder.rmdir()


def remove_work_folder(folder: str | os.PathLike) -> None:
    """Removes a folder with all that is in it, also where this process holds its lock."""
    try:
        files.remove(as_path(folder))
    except OSError as error:
        # NFS keeps a file that is open, under another name: `locked_work_folder` comes later.
        if error.errno not in (errno.ENOTEMPTY, errno.EBUSY):
            raise


def check_writable(folder: pathlib.Path) -> None:
    """Makes the folder and one file in it, which is gone again, or raises InputError."""
    try:
        if not in_bucket(folder):
            folder.mkdir(parents=True, exist_ok=True)
        files.probe_writable(folder)
    except InputError:  # says all that is known of a bucket
        raise
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}); choose another out"
        ) from error
