"""Exceptions for users' mistakes, which are shown without a traceback, and for damaged files."""

import contextlib
import difflib
import os
import pathlib
import traceback
from collections.abc import Iterable, Iterator

MISTAKE = "InputError: "  # what the file of `error_file` starts with after a user's mistake


class InputError(ValueError):
    """Reports a user's mistake: what was wrong, its value, what is allowed and what to do.

    Commands print it without a traceback. Any other exception is a bug of ours, or a machine that
    failed, and keeps its traceback.
    """


class StorageError(InputError, OSError):
    """Reports files that cannot be read or written now: a full disk, a missing permission.

    It says nothing about their content.
    """


class MismatchError(InputError):
    """Reports a checkpoint that can be read, of another model."""


class DamagedFileError(InputError):
    """Reports a file that is missing in part, or does not hold what was written to it."""


class DiskReadError(DamagedFileError):
    """Reports a file that the disk does not return (EIO): a bad sector, or a failing disk."""


@contextlib.contextmanager
def errors_naming(path: str | os.PathLike) -> Iterator[None]:
    """Puts the name of a file before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def check_setting(name: str, value: object, valid: bool, allowed: str) -> None:
    """Raises InputError for a setting that is not `valid`: "name=value: must be allowed".

    check_setting("ema_decay", self.ema_decay, 0 <= self.ema_decay <= 1, "in [0, 1]")
    """
    if not valid:
        raise InputError(f"{name}={value}: must be {allowed}")


@contextlib.contextmanager
def needs_extra(extra: str, package: str, purpose: str) -> Iterator[None]:
    """Turns the ImportError of a package that varjax installs only on demand into an InputError.

        with needs_extra("plot", "matplotlib", "drawing curves"):
            import matplotlib

    Args:
        extra: varjax's extra with the package, in pyproject.toml.
        package: name of the package for pip.
        purpose: what the package is needed for, in the message.
    """
    try:
        yield
    except ImportError as error:
        raise InputError(
            f"{purpose} needs {package} ({error}): pip install {package}, or "
            f'pip install ".[{extra}]" in the folder of varjax'
        ) from error


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Returns "; did you mean 'steps'?", with the nearest allowed names, or "" if none is near."""
    near = difflib.get_close_matches(name, list(allowed), n=3, cutoff=0.7)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""


@contextlib.contextmanager
def error_file(path: pathlib.Path) -> Iterator[None]:
    """Writes the exception that ends a run to a file, and lets it pass.

    An unexpected one is written with its traceback, which the message of a later user's mistake
    does not replace. Where all goes well, the file is removed.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise
    except Exception as error:
        with contextlib.suppress(OSError):  # the disk may be what failed
            if not isinstance(error, InputError):
                path.write_text(traceback.format_exc())
            elif not path.exists() or path.read_text(errors="replace").startswith(MISTAKE):
                path.write_text(f"{MISTAKE}{error}\n")
        raise
    except SystemExit:  # stopped, but in good order
        path.unlink(missing_ok=True)
        raise
    path.unlink(missing_ok=True)
