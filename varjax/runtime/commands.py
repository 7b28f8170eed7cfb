"""Makes a command's parser, and turns its exceptions into messages and exit codes."""

import argparse
import atexit
import contextlib
import faulthandler
import io
import logging
import os
import select
import signal
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

from varjax.errors import InputError, did_you_mean
from varjax.storage.read_errors import FULL_ERRNOS, MACHINE_ERRNOS, machine_errno
from varjax.storage.untrusted import image_limits

INTERRUPTED = 128 + signal.SIGINT  # exit code of a command that Ctrl-C ends
BROKEN_PIPE = 128 + signal.SIGPIPE  # exit code of a command that SIGPIPE ends


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong with a command line."""

    def error(self, message: str) -> NoReturn:
        unknown = message.removeprefix("unrecognized arguments: ")
        option = unknown.partition("=")[0].partition(" ")[0] if unknown != message else ""
        hint = did_you_mean(option, self._option_string_actions) or f"; see {self.prog} --help"
        self.exit(2, f"{self.prog}: {message}{hint}\n")


def command_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Makes the parser of a command's flags, which cannot be abbreviated.

    Args:
        name: name of the command.
        description: text that --help prints unchanged, usually the module's docstring.
    """
    escape_unprintable()
    return _Parser(
        name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )


def escape_unprintable() -> None:
    """Makes stdout escape characters that its encoding lacks, such as "…" in ASCII."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def run_command(
    name: str,
    action: Callable[[], object],
    debug: bool = False,
    interrupted: str = "interrupted",
) -> int:
    """Runs a command and returns its exit code.

    Args:
        name: name of the command, for its messages.
        action: function that does the work; if it returns an int, that is the exit code.
        debug: whether to print the traceback of an InputError.
        interrupted: text printed after Ctrl-C.

    Returns:
        0 if `action` returns no int, 1 after an InputError or a failure of the machine or its file
        system, 130 after Ctrl-C, 141 if stdout is a pipe that nothing reads anymore. Any other
        exception is a bug and is raised. A signal that ends the process, such as SIGBUS after a
        mapped file was truncated, prints the stack.
    """
    if not faulthandler.is_enabled():
        with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is not a file
            faulthandler.enable()
    # Orbax logs internal details, and errors that it also raises.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        image_limits()  # refuses an invalid environment variable now, not at the first image
        code = action()
        if sys.stdout is not None:  # as in varjax models >&-
            sys.stdout.flush()
    except InputError as error:
        if debug:
            traceback.print_exception(error)
        else:
            print(f"{name}: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        print(f"{name}: stopped, because nothing reads its output anymore", file=sys.stderr)
        return BROKEN_PIPE
    except Exception as error:
        code = machine_errno(error, MACHINE_ERRNOS | FULL_ERRNOS, context=False)
        if debug or code is None:
            raise
        print(
            f"{name}: {os.strerror(code)}: {str(error)[:500]}\nThe machine or its file system "
            "failed. Run the same command again when it works",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt as error:
        print(f"{name}: {interrupted}", file=sys.stderr)
        if _interrupted_compiling(error):
            atexit.register(end_at_once, INTERRUPTED)
        return INTERRUPTED
    return code if isinstance(code, int) else 0


def _interrupted_compiling(error: KeyboardInterrupt) -> bool:
    """Returns whether JAX was compiling a program, which its threads continue to do.

    A regular exit waits for them, perhaps for minutes. With JAX 0.10.2 it then crashes, because the
    program is made for devices that no longer exist.
    """
    frames = traceback.walk_tb(error.__traceback__)
    return any(frame.f_globals.get("__name__") == "jax._src.compiler" for frame, _ in frames)


def end_at_once(code: int) -> None:
    """Ends the process with an exit code, without waiting for threads or other processes."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # as in varjax models >&-
            stream.flush()
    os._exit(code)


def _output_is_closed() -> bool:
    """Returns whether stdout is a pipe that nothing reads; then discards what is left to write."""
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)
    except io.UnsupportedOperation:  # such as in a notebook
        return False
    if not any(event & select.POLLERR for _, event in poll.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return True
