"""Runs jobs of one_of_several.py in several processes that train together."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable

from tests.helpers import forked
from tests.helpers.paths import ROOT


def together(count: int, *jobs: dict, deadline: float = 300) -> tuple[list[int | None], list[str]]:
    """Runs jobs in several processes together; returns their exit codes and output.

    No process may outlive the first one to end by more than 10 s. A process that does gets SIGABRT,
    which makes Python print its stack traces, and its exit code is None. If none ends before the
    deadline, all get it.

    Args:
        count: number of processes.
        jobs: jobs of one_of_several.py, in order.
        deadline: seconds until the first process must have ended. Two runs take 20 s on two idle
            cores, but machines are shared.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.helpers.one_of_several", address, str(count)]
    files = [tempfile.TemporaryFile("w+") for _ in range(count)]
    processes = [
        forked.Popen(
            [*command, str(number), json.dumps(jobs)],
            cwd=ROOT,
            env=os.environ | {"PYTHONFAULTHANDLER": "1"},
            stdout=file,
            stderr=subprocess.STDOUT,
        )
        for number, file in enumerate(files)
    ]
    _wait(any, processes, deadline)
    _wait(all, processes, 10)
    hanging = [process for process in processes if process.poll() is None]
    for process in hanging:
        process.send_signal(signal.SIGABRT)
    _wait(all, processes, 10)
    codes = [None if process in hanging else process.poll() for process in processes]
    said = []
    for process, file in zip(processes, files, strict=True):
        process.kill()
        process.wait()
        file.seek(0)
        said.append(file.read())
        file.close()
    return codes, said


def _wait(enough: Callable[[Iterable[bool]], bool], processes: list, seconds: float) -> None:
    """Waits at most `seconds` until any or all of the processes have ended."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not enough(
        process.poll() is not None for process in processes
    ):
        time.sleep(0.05)
