"""Tests that the watchdog ends a run that hangs, and reports where it hung."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests.helpers import forked, tiny
from tests.helpers.paths import ROOT
from varjax.training import loop
from varjax.training.run_dir import CHANGEABLE_FIELDS
from varjax.training.watchdog import STALLED_EXIT_CODE, Watchdog

# Prints a line, so that a test knows that imports are done.
CHILD = """
import sys, threading, time
from varjax.training.watchdog import Watchdog
print("begun", flush=True)
"""


def start(script, folder):
    command = [sys.executable, "-c", CHILD + script, str(folder)]
    process = forked.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


HANGS = """
import pathlib

def wait_for_a_lock():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()

with Watchdog(0.5 / 60, pathlib.Path(sys.argv[1]) / "error.txt") as watchdog:
    watchdog.progress()
    wait_for_a_lock()
"""


@pytest.mark.slow
def test_a_hang_ends_the_process_and_its_stack_is_reported(tmp_path):
    process = start(HANGS, tmp_path)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == STALLED_EXIT_CODE
    for text in (said, (tmp_path / "error.txt").read_text()):
        assert "no progress for 0.00833333 minutes" in text
        assert "wait_for_a_lock" in text and 'File "<string>", line' in text


@pytest.mark.slow
def test_a_hanging_disk_or_terminal_does_not_block_the_watchdog(tmp_path):
    """The report and stderr are pipes that nobody reads."""
    os.mkfifo(tmp_path / "error.txt")
    fill = "import os, fcntl, varjax.training.watchdog as w; w.WRITE_SECONDS = 0.3\n"
    fill += "fcntl.fcntl(2, fcntl.F_SETPIPE_SZ, 4096); os.write(2, bytes(4096))\n"
    process = start(fill + HANGS, tmp_path)
    assert process.wait(60) == STALLED_EXIT_CODE
    process.communicate()


PROGRESS = """
import pathlib
watchdog = Watchdog(1 / 60, pathlib.Path(sys.argv[1]) / "error.txt")
with watchdog:
    time.sleep(1.5)  # before the first step
    for _ in range(15):
        watchdog.progress()
        time.sleep(0.1)
    with watchdog.paused():  # compiles
        time.sleep(1.5)
    print("stop me", flush=True)
    time.sleep(0.2)
time.sleep(1.5)  # it has ended
"""


@pytest.mark.slow
def test_progress_pauses_and_sigstop_do_not_count_as_a_hang(tmp_path):
    process = start(PROGRESS, tmp_path)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(2.0)
    process.send_signal(signal.SIGCONT)
    said = process.communicate(timeout=60)[1]
    assert (process.returncode, said) == (0, "")
    assert not (tmp_path / "error.txt").exists()


def test_zero_minutes_start_no_watchdog(tmp_path):
    with Watchdog(0, tmp_path / "error.txt") as watchdog:
        watchdog.progress()
        assert watchdog._thread is None
    assert "stalled_minutes" in CHANGEABLE_FIELDS


RUN = """
import functools, jax, jax.numpy as jnp, numpy as np
from tests.helpers import tiny
from varjax.training import loop

def host_callback_that_hangs(step):
    if step == 12:
        time.sleep(10**6)
    return np.int32(step)

train_step = tiny.Tiny.train_step

def step_with_callback(task, state, frozen, batch, key, plan):
    step = jax.pure_callback(host_callback_that_hangs, state.step, state.step)
    return train_step(task, state.replace(step=step), frozen, batch, key, plan)

tiny.Tiny.train_step = step_with_callback
loop.train(
    tiny.experiment(
        sys.argv[1], stalled_minutes=2 / 60, keep_best="eval/loss", preview_every=20
    )
)
"""


@pytest.mark.slow
def test_a_run_whose_device_hangs_ends_and_the_next_start_finishes_it(whole, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-c", CHILD + RUN, str(run)]
    hung = forked.run([*command, "hang"], capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert hung.returncode == STALLED_EXIT_CODE, hung.stderr
    report = run / "error.txt"
    assert "host_callback_that_hangs" in report.read_text() and "take_steps" in report.read_text()
    assert "host_callback_that_hangs" in hung.stderr
    loop.train(tiny.experiment(run, keep_best="eval/loss", preview_every=20))
    assert not report.exists()
    tiny.assert_same_run(whole[0], run)
