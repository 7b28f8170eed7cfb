"""Finds the cause of an exception from Orbax: damaged files, a failing machine, or a device.

Orbax raises exceptions of many kinds, and a bare Exception for damaged arrays, so the chain of
causes is searched.
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
    """Returns the error of a device or of another process that caused an exception, if any."""
    while error is not None:
        if isinstance(error, jax.errors.JaxRuntimeError):
            return error
        error = error.__cause__ or error.__context__
    return None


def checkpoint_error(path: pathlib.Path, error: Exception) -> InputError:
    """Returns the error to raise after reading the files in a folder failed with `error`.

    This is a StorageError if the machine, the network or a bucket failed, otherwise a
    DamagedFileError.
    """
    code = machine_errno(error)
    if code is None and not in_bucket(path):
        # Orbax logs some errors and then reports missing files, so try to open the files.
        code = machine_errno(_opening_error(path))
    if code is not None and code == errno.EIO:
        # Retries failed for seconds, so this may be a bad sector. If the error goes away later, the
        # step still exists in the folder for unreadable steps.
        return DiskReadError(f"{path}: {os.strerror(code)}")
    if code is not None:
        return StorageError(
            f"{path} cannot be read now: {os.strerror(code)}. This does not mean that files are "
            "damaged, so keep them. Start again when the problem is solved"
        )
    if isinstance(error, DamagedFileError):
        return error
    if in_bucket(path) and not _means_damage(error):
        # The services' packages raise exceptions of many kinds.
        return StorageError(
            f"{path} cannot be read now: {str(error)[:500]}. This does not mean that files are "
            "damaged, so keep them. Start again when the bucket can be reached"
        )
    return DamagedFileError(f"{path} is damaged: {type(error).__name__}: {str(error)[:500]}")


def _means_damage(error: BaseException | None) -> bool:
    """Returns whether an exception means that objects of a bucket are missing or damaged."""
    while error is not None:
        if isinstance(error, FileNotFoundError | KeyError) or DAMAGE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _opening_error(directory: pathlib.Path) -> OSError | None:
    """Opens the files in a directory on a disk; returns the first error, or None."""

    def reraise(error: OSError) -> None:
        raise error

    try:
        for folder, _, names in os.walk(directory, onerror=reraise):
            for name in names:
                os.close(os.open(os.path.join(folder, name), os.O_RDONLY | os.O_NONBLOCK))
    except OSError as error:
        return error
    return None
