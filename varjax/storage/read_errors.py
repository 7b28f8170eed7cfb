"""Distinguishes errors of a machine or network, which are retried, from damaged files.

data = retry_read(path.read_bytes, path)
"""

import errno
import os
import re
import time
from collections.abc import Callable
from typing import TypeVar

from varjax.errors import StorageError

READ_PAUSES = (0.1, 0.5, 2.0)  # seconds before each further attempt
# These errors say nothing about the content of a file. They come from disks and from network file
# systems (NFS, CIFS, Lustre, AFS), which report an absent server, an evicted client or an expired
# ticket. Some exist only on Linux.
MACHINE_ERRNOS = frozenset(
    getattr(errno, name)
    for name in (
        *("EACCES", "EPERM", "EKEYEXPIRED", "EKEYREVOKED", "ENOKEY"),
        *("EAGAIN", "EBUSY", "EIO", "EMFILE", "ENFILE", "ENOBUFS", "ENODEV", "ENOLCK", "ENOMEM"),
        *("ECOMM", "EREMOTEIO", "ENOLINK", "ENOTCONN", "ESHUTDOWN", "ESTALE", "ETIMEDOUT"),
        *("ECONNABORTED", "ECONNREFUSED", "ECONNRESET", "EHOSTDOWN", "EHOSTUNREACH"),
        *("ENETDOWN", "ENETRESET", "ENETUNREACH"),
    )
    if hasattr(errno, name)
)
# Errors in writing, which a retry does not solve; EFBIG is a limit on the size of files.
FULL_ERRNOS = frozenset((errno.EDQUOT, errno.EFBIG, errno.ENOSPC, errno.EROFS))
MACHINE_MESSAGES = {os.strerror(code): code for code in MACHINE_ERRNOS}
T = TypeVar("T")
TENSORSTORE_CODE = re.compile(r"os_error_code='(\d+)'")  # in the text of its exceptions


def machine_errno(
    error: BaseException | None,
    errnos: frozenset[int] = MACHINE_ERRNOS,
    context: bool = True,
) -> int | None:
    """Returns the error number in `errnos` that caused an exception; None for other causes.

    A MemoryError counts as ENOMEM.

    Args:
        error: the exception; the exceptions that it was raised from are also searched.
        errnos: numbers to look for.
        context: whether an exception that was being handled counts as a cause without "from". False
            finds no cause for a bug that occurs while an error of the machine is handled.
    """
    while error is not None:
        codes = [getattr(error, "errno", None), *map(int, TENSORSTORE_CODE.findall(str(error)))]
        if isinstance(error, MemoryError):
            codes.append(errno.ENOMEM)
        if isinstance(error, RuntimeError):  # C++ readers quote the system's message
            codes += [code for text, code in MACHINE_MESSAGES.items() if text in str(error)]
        if matches := errnos.intersection(codes):
            return next(iter(matches))
        error = error.__cause__ or (error.__context__ if context else None)
    return None


def retry_read(read: Callable[[], T], name: str | os.PathLike) -> T:
    """Calls `read`, and calls it again after a pause if the machine or network failed.

    Args:
        read: function without side effects; it may be called several times.
        name: name of the file, for the message.

    Raises:
        StorageError: the machine still fails after the last attempt.
        Exception: any other exception of `read`, immediately.
    """
    for pause in (*READ_PAUSES, None):
        try:
            return read()
        except (OSError, MemoryError, RuntimeError) as error:
            code = machine_errno(error)
            if code is None or isinstance(error, StorageError):
                raise
            if pause is None:
                denied = code in (errno.EACCES, errno.EPERM)
                advice = "you have permission to read it" if denied else "the machine works"
                raise StorageError(
                    f"{os.fspath(name)} cannot be read now: {os.strerror(code)}. This does not "
                    f"mean that the file is damaged. Start again when {advice}"
                ) from error
        time.sleep(pause)
    raise AssertionError
