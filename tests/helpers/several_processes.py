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
    """Returns exit codes and output of so many processes that do these jobs together.

    Nobody may outlive the first to end by more than 10 s, whatever it died of. A process that does
    tells where it hangs (SIGABRT makes Python print its stacks), and so does each if none ends.

    Args:
        count: number of processes.
        jobs: what one_of_several.py does, in order.
        deadline: seconds until the first must have ended. Two runs take 20 on two free cores, but
            machines are shared.
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
    for process in processes:
        if process.poll() is None:
            process.send_signal(signal.SIGABRT)
    _wait(all, processes, 10)
    codes, said = [process.poll() for process in processes], []
    for process, file in zip(processes, files, strict=True):
        process.kill()
        process.wait()
        file.seek(0)
        said.append(file.read())
        file.close()
    return codes, said


def _wait(enough: Callable[[Iterable[bool]], bool], processes: list, seconds: float) -> None:
    """Waits until any process has ended, or all have, but no longer than so many seconds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not enough(
        process.poll() is not None for process in processes
    ):
        time.sleep(0.05)
