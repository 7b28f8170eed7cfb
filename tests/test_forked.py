"""Tests that forked processes behave like those that subprocess starts."""

import os
import signal
import subprocess
import sys

import pytest

from tests.helpers import forked
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

CODES = {
    "arguments, folder, variables and input": """
import os, sys
print(sys.argv, os.getcwd(), os.environ["OF_THE_TEST"], __name__, sys.stdin.read())
print(os.getpgrp() == os.getpid(), os.getppid())
""",
    "where modules are": "import sys; print(sys.path); import sample",
    "a message": "import sys; sys.exit('no')",
    "an exit code": "raise SystemExit(7)",
    "an exception": "import sys; sys.tracebacklimit = 0; 1 / 0",
    "exit functions": "import atexit; atexit.register(print, 'end')",
    "a signal": "import os; os.kill(os.getpid(), 15)",
    "Ctrl-C": "import sys, signal; sys.tracebacklimit = 0; signal.raise_signal(signal.SIGINT)",
}


@pytest.mark.parametrize("code", CODES)
def test_code_behaves_as_in_a_new_interpreter(tmp_path, code):
    ends = []
    for start in (forked.Popen, subprocess.Popen):
        process = start(
            [sys.executable, "-c", CODES[code], "an argument"],
            cwd=tmp_path,
            env=os.environ | {"OF_THE_TEST": "x", "PYTHONPATH": f"{ROOT}:{tmp_path}"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        ends.append((*process.communicate("input"), process.returncode))
    assert ends[0] == ends[1]


def test_scripts_and_modules_run():
    by_script, by_module = run([f"{ROOT}/sample.py", "-h"]), run(["-m", "varjax", "sample", "-h"])
    assert by_script == by_module and "--labels" in by_module


def test_xla_and_jax_flags_take_effect():
    count = "import jax; print(len(jax.devices()))"
    assert run(["-c", count], JAX_NUM_CPU_DEVICES="3") == "3\n"
    assert run(["-c", count], XLA_FLAGS="--xla_force_host_platform_device_count=5") == "5\n"


def test_a_process_can_be_waited_for_and_killed():
    code = "import time; print(1, flush=True); time.sleep(100)"
    with forked.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        assert process.poll() is None
        process.kill()
        assert process.wait() == -signal.SIGKILL


def test_a_timeout_shows_where_the_process_hangs():
    code = "import time\ndef hang(): time.sleep(100)\nprint('begun', flush=True)\nhang()"
    with pytest.raises(AssertionError, match=r"(?s)took over 2 s: begun.*line 2 in hang"):
        forked.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=2)


def run(arguments, **variables):
    environment = os.environ | {"PYTHONPATH": str(ROOT)} | variables
    command = [sys.executable, *arguments]
    done = forked.run(command, env=environment, check=True, capture_output=True, text=True)
    return done.stdout
