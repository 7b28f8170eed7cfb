"""Runs jobs of one_of_several.py in several processes that train together."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time

from tests.helpers import forked
from tests.helpers.paths import ROOT

HUNG = -signal.SIGABRT  # the exit code of a process that was told to print its stacks


def together(count: int, *jobs: dict, deadline: float = 300) -> tuple[list[int | None], list[str]]:
    """Returns exit codes and output of so many processes that do these jobs together.

    Nobody may outlive the first to end by more than 10 s, whatever it died of. Where none ends in
    time, each tells where it hangs (SIGABRT makes Python print its stacks).

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
    end = time.monotonic() + deadline
    while all(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.05)
    if time.monotonic() >= end:
        for process in processes:
            process.send_signal(signal.SIGABRT)
    end = time.monotonic() + 10
    while any(process.poll() is None for process in processes) and time.monotonic() < end:
        time.sleep(0.05)
    codes, said = [process.poll() for process in processes], []
    for process, file in zip(processes, files, strict=True):
        process.kill()
        process.wait()
        file.seek(0)
        said.append(file.read())
        file.close()
    return codes, said
