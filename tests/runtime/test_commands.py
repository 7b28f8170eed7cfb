"""Tests exit codes and messages of commands."""

import errno
import logging
import os
import sys

import pytest

from tests.helpers import forked
from varjax.errors import InputError, StorageError
from varjax.runtime.commands import command_parser, end_at_once, run_command
from varjax.storage.read_errors import retry_read


def fail(*errors):
    """Returns an action that raises the first error, caused by the second, and so on."""

    def action():
        for error, cause in zip(errors, (*errors[1:], None), strict=True):
            error.__cause__ = cause
        raise errors[0]

    return action


FULL = "RESOURCE_EXHAUSTED: Error writing local file \"x/d\" [os_error_code='28']"
FAILURES = {
    "disk": [OSError(errno.EIO, "Input/output error", "run/config.json")],
    "full": [OSError(errno.ENOSPC, "No space left on device", "run/config.json")],
    "wrapped": [RuntimeError("run/config.json"), OSError(errno.EMFILE, "Too many open files")],
    "tensorstore": [ValueError(FULL.replace("x/d", "run/config.json"))],
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failing_machine_ends_a_command_with_a_message(name, capsys):
    assert run_command("varjax sample", fail(*FAILURES[name])) == 1
    said = capsys.readouterr().err
    assert said.startswith("varjax sample: ") and "run/config.json" in said
    assert "again" in said and "Traceback" not in said


def test_debug_raises_errors_of_the_machine():
    with pytest.raises(OSError):
        run_command("varjax sample", fail(*FAILURES["disk"]), debug=True)


@pytest.mark.parametrize(
    "bug", [KeyError("x"), FileNotFoundError(errno.ENOENT, "x"), ValueError("28"), AssertionError()]
)
def test_a_bug_is_raised(bug):
    with pytest.raises(type(bug)):
        run_command("varjax sample", fail(bug))


def test_a_bug_while_handling_a_machine_error_is_raised():
    def action():
        try:
            raise OSError(errno.EIO, "Input/output error")
        except OSError:
            {}["a bug"]

    with pytest.raises(KeyError):
        run_command("varjax sample", action)


def test_the_advice_depends_on_the_error():
    def read(code):
        raise OSError(code, os.strerror(code))

    with pytest.raises(StorageError, match="when you have permission to read it"):
        retry_read(lambda: read(errno.EACCES), "cat.png")
    with pytest.raises(StorageError, match="when the machine works"):
        retry_read(lambda: read(errno.EIO), "cat.png")


def test_exit_codes(capsys):
    assert run_command("x", lambda: None) == 0
    assert run_command("x", lambda: 3) == 3
    assert run_command("x", fail(InputError("a=1: must be 2"))) == 1
    assert run_command("x", fail(KeyboardInterrupt()), interrupted="stopped") == 130
    assert capsys.readouterr().err == "x: a=1: must be 2\nx: stopped\n"


def test_details_that_orbax_logs_are_not_printed(caplog):
    caplog.set_level(logging.INFO, "absl")
    assert run_command("x", lambda: logging.getLogger("absl").error("parsed no metadata")) == 0
    assert not caplog.records


SLOW_TO_COMPILE = """
import signal, sys, jax, jax.numpy as jnp
from varjax.runtime.commands import end_at_once, run_command

def slow(x):
    for _ in range(1000):
        x = jnp.sin(x @ x)
    return x

def action():
    traced = jax.jit(slow).lower(jnp.ones((2, 2)))
    print("compiling", flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    traced.compile()

def interrupt(*_):
    raise KeyboardInterrupt

signal.signal(signal.SIGALRM, interrupt)
jax.config.update("jax_enable_compilation_cache", False)
sys.exit(run_command("x", action))
"""


@pytest.mark.slow
def test_ctrl_c_during_compilation_ends_without_a_crash():
    command = [sys.executable, "-c", SLOW_TO_COMPILE]
    ended = forked.run(command, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout, ended.stderr) == (
        130,
        "compiling\n",
        "x: interrupted\n",
    )


def test_a_process_without_stdout_also_ends_at_once(monkeypatch):
    codes = []
    monkeypatch.setattr(os, "_exit", codes.append)
    monkeypatch.setattr(sys, "stdout", None)
    end_at_once(3)
    assert codes == [3]


@pytest.mark.parametrize("name", ["VARJAX_MAX_PIXELS", "VARJAX_MAX_ASPECT_RATIO"])
def test_an_invalid_image_limit_is_refused_before_the_action(name, monkeypatch, capsys):
    monkeypatch.setenv(name, "-1")
    begun = []
    assert run_command("varjax train", lambda: begun.append(1)) == 1 and not begun
    assert f"varjax train: {name}=-1: must be a whole number" in capsys.readouterr().err


@pytest.mark.parametrize("lines", [1, 10_000])
def test_a_closed_pipe_ends_a_command_without_a_traceback(lines, monkeypatch, capsys):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as output:
        monkeypatch.setattr(sys, "stdout", output)
        code = run_command("varjax info", lambda: print("x\n" * lines, flush=lines > 1))
    assert code == 141
    assert "nothing reads its output" in capsys.readouterr().err


def test_another_broken_pipe_is_a_bug():
    with pytest.raises(BrokenPipeError):
        run_command("varjax info", fail(BrokenPipeError()))


@pytest.mark.parametrize("argument", ["", " ", "=3", "word", "--flg=3"])
def test_an_unknown_argument_is_reported_in_one_line(argument, capsys):
    parser = command_parser("varjax x", None)
    parser.add_argument("--flag")
    with pytest.raises(SystemExit) as ended:
        parser.parse_args([argument])
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.count("\n") == 1
    assert message.startswith("varjax x: unrecognized arguments: ")
    assert ("did you mean '--flag'" in message) == (argument == "--flg=3")
