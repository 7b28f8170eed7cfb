"""Folders that a command fills step by step: one command at a time, and no trace of the lock.

with locked_work_folder(folder):
    ...  # parts are written, and what they make
    remove_work_folder(folder)
"""

import contextlib
import errno
import os
from collections.abc import Iterator

from varjax.core import files, folders
from varjax.core.buckets import as_path, in_bucket


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
