"""Finds the cause of an exception from Orbax: damaged files, a machine, or a device.

Orbax raises exceptions of all kinds, and a bare Exception for damaged arrays, so the chain of
causes is looked at.
"""

import errno
import os
import pathlib
import re

import jax

from varjax.errors import DamagedFileError, DiskReadError, InputError, StorageError
from varjax.storage.buckets import in_bucket
from varjax.storage.read_errors import machine_errno

DAMAGE = re.compile(r"NOT_FOUND|DATA_LOSS|FAILED_PRECONDITION|missing|[Mm]etadata")


def device_error(error: BaseException | None) -> BaseException | None:
    """Returns what led to an exception if it is an error of a device or of another process."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return error
        error = error.__cause__ or error.__context__
    return None


def checkpoint_error(path: pathlib.Path, error: Exception) -> InputError:
    """Returns the error to raise where reading the files in a folder failed with `error`.

    A StorageError where the machine, the network or a bucket failed, else a DamagedFileError.
    """
    code = machine_errno(error)
    if code is None and not in_bucket(path):
        # Orbax only logs some errors, and does as if files were missing: the files tell more.
        code = machine_errno(_opening_error(path))
    if code is not None and code == errno.EIO:
        # It has failed again and again for seconds, so it may be a bad sector. If it passes later,
        # the step is still there, at the place where it was set aside.
        return DiskReadError(f"{path}: {os.strerror(code)}")
    if code is not None:
        return StorageError(
            f"{path} cannot be read now: {os.strerror(code)}. This does "
            "not tell of damaged files, so leave them; start again once it is mended"
        )
    if isinstance(error, DamagedFileError):
        return error
    if in_bucket(path) and not _tells_of_damage(error):
        # Of a bucket, the services' packages tell by exceptions of all kinds.
        return StorageError(
            f"{path} cannot be read now: {str(error)[:500]}. This does not tell of damaged "
            "files, so leave them; start again once the bucket can be reached"
        )
    return DamagedFileError(f"{path} is damaged: {type(error).__name__}: {str(error)[:500]}")


def _tells_of_damage(error: BaseException | None) -> bool:
    """Returns whether an exception says that objects of a bucket are missing or not as written."""
    while error is not None:
        if isinstance(error, FileNotFoundError | KeyError) or DAMAGE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _opening_error(directory: pathlib.Path) -> OSError | None:
    """Opens the files in a directory; returns the first error, None where there is none."""
    if in_bucket(directory):
        return None

    def reraise(error: OSError) -> None:
        raise error

    try:
        for folder, _, names in os.walk(directory, onerror=reraise):
            for name in names:
                os.close(os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        return error
    return None
