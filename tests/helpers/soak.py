"""Disturbs a run of the digits in many ways, and compares its end with an undisturbed run's.

python -m tests.helpers.soak --folder=DIR [--events=50] [--processes=1] [--kills_only] [--seed=0]

`make soak` runs this. An event may occur at any moment after the start of the interpreter:

kill       SIGKILL of one process or of all; a surviving process must end without help
pause      SIGSTOP of one process, for 5 seconds
full       no process can make a file longer, as on a full disk, until the run has ended by itself
full_once  nothing can be written to the run's folder for 20 seconds, as on a full disk
eio        some of the next file operations in the run's folder fail with EIO, once
read_only  nothing can be written to <run>/checkpoints, until the run has ended by itself

After "pause", "full_once" and "eio" the run must take further steps, or end by itself with a
message. "full_once" and "eio" need a C compiler.

The last line is a report. The exit code is 1 if more was lost than the steps since the last save,
if a process ended in an unexpected way, or if the final states are not bit-identical.
"""

import argparse
import errno
import json
import os
import pathlib
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.helpers import faults
from tests.helpers.faults import Faults
from tests.helpers.paths import ROOT
from tests.helpers.tiny import lines
from varjax.training.goodput import PREFIX, STEPS_LOST

SMALL = {"task.model.depth": 2, "task.model.width": 64, "task.tokenizer_weights": "tokenizer"}
OFTEN = {"save_every": 5, "eval_every": 50, "preview_every": 200, "log_every": 1}
SURVIVORS_END = 60  # seconds: twice the heartbeat timeout of a dead process
PAUSE = 5.0  # seconds
CONNECTED = "[Gloo]"  # starts a line of the log once all processes are connected
FAILURE_SEEN = 180  # seconds until a run that cannot write must have ended
# Dropped, because with these capabilities root may write to read-only folders.
RIGHTS = "-dac_override,-dac_read_search"
OBEYING = ["setpriv", f"--inh-caps={RIGHTS}", f"--bounding-set={RIGHTS}"] * (os.geteuid() == 0)
# Fraction of the time after imports; a run that ends every few seconds spends most on starting.
MIN_GOODPUT = 0.03
MISCOUNTED = (
    1  # step at most per start, which may be killed within a write, or between read and write
)
FULL_SECONDS = 20.0
FAILING_CALLS = 30  # limit on the calls that fail in one "eio"
# Occurs twice in the traceback of each array that TensorStore is still writing when another one
# fails. Threads interleave these tracebacks, so only occurrences of the words can be counted.
TENSORSTORE_NOISE = "Event loop is closed"
PASSING = ("pause", "full_once", "eio")
EVENT_WEIGHTS = {"kill": 7, "pause": 1, "full": 1, "read_only": 1, "full_once": 1, "eio": 2}


class Run:
    """Starts a training command, and reads what it wrote."""

    def __init__(self, folder: pathlib.Path, name: str, config: str, processes: int, **settings):
        self.path, self.log = folder / name, folder / f"{name}.log"
        self._folder, self._processes, self.steps = folder, processes, settings["steps"]
        self.faults = Faults(folder, [self.path]) if faults.COMPILER else None
        self._command = [sys.executable, str(ROOT / "train.py")]
        self._command += [f"--config={ROOT}/configs/{config}", f"--config.run_dir={name}"]
        self._command += [f"--config.{key}={value}" for key, value in settings.items()]

    def start(self) -> list[subprocess.Popen]:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_NUM_CPU_DEVICES": "1" if self._processes == 1 else "2",
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "cache"),
            "VARJAX_CACHE": str(self._folder / "varjax_cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        if self.faults is not None:
            self.faults.disarm()
            environment |= self.faults.environment()
        commands = [self._command]
        if self._processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"--coordinator=localhost:{free.getsockname()[1]}"
            flags = [address, f"--processes={self._processes}"]
            commands = [[*self._command, *flags, f"--process={i}"] for i in range(self._processes)]
        # Through a pipe, because the limit on file sizes would also apply to the log.
        with open(self.log, "w") as log:
            self.logger = logger = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=log)
        assert logger.stdin is not None
        shared: dict[str, Any] = dict(cwd=self._folder, env=environment)
        shared |= dict(stdout=logger.stdin, stderr=logger.stdin)
        with logger.stdin:
            return [subprocess.Popen(OBEYING + command, **shared) for command in commands]

    def finish(self) -> None:
        for process in self.start():
            if code := process.wait():
                raise SystemExit(f"exit code {code}:\n{self.log.read_text()}")

    def reached(self) -> int:
        """Returns the last logged step."""
        path = self.path / "metrics.jsonl"
        steps = re.findall(r'^{"step": (\d+),', path.read_text() if path.is_file() else "", re.M)
        return int(steps[-1]) if steps else 0

    def saved(self) -> int:
        """Returns the newest complete step; 0 for none."""
        names = [path.name for path in self.path.glob("checkpoints/*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def continued_from(self) -> int | None:
        """Returns the step that the last start continued from; None if it ended before that."""
        match = re.search(r"continuing .* after step (\d+)", self.log.read_text())
        return int(match[1]) if match else None

    def goodput(self) -> dict[str, float]:
        """Returns the goodput metrics over all starts, from the last line that has them."""
        entries = [json.loads(x) for x in (self.path / "metrics.jsonl").read_text().splitlines()]
        last = next(line for line in reversed(entries) if PREFIX + "fraction" in line)
        return {name: x for name, x in last.items() if name.startswith(PREFIX)}

    def end(self) -> list:
        """Returns the final result: metrics, and every array of the last and the best step."""
        contents: list = [lines(self.path)]
        for kind in ("checkpoints", "best"):
            step = max((self.path / kind).iterdir(), key=lambda path: int(path.name))
            items = [step / name for name in ("params", "ema", "opt_state")]
            contents += [read_arrays(x) for x in items if x.is_dir()]
        return contents


def read_arrays(path: pathlib.Path) -> dict:
    """Reads a tree of arrays that any number of processes saved."""
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
    tree = checkpointer.metadata(path).item_metadata.tree
    as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), tree)
    return checkpointer.restore(path, args=ocp.args.PyTreeRestore(restore_args=as_numpy))


class Events:
    """Disturbs a run, and records every failure."""

    def __init__(self, run: Run, seed: int, kinds: dict[str, int], startup: float):
        self.run, self.rng, self.kinds = run, random.Random(seed), kinds
        self.done: dict[str, int] = dict.fromkeys(kinds, 0)
        self.failures: list[str] = []
        self.lost: list[int] = []
        self.in_save, self._startup = 0, startup
        self.steps_again = 0  # steps that an earlier start had already taken

    def start_and_disturb(self, limit: int) -> None:
        """Starts the run, and disturbs it until it ends or `limit` events have happened."""
        saved, reached = self.run.saved(), self.run.reached()
        alive = self.run.start()
        while sum(self.done.values()) < limit:
            moment = time.monotonic() + self.rng.uniform(0, self._startup)
            while time.monotonic() < moment and alive[0].poll() is None:
                time.sleep(0.02)
            if alive[0].poll() is not None:
                break
            (kind,) = self.rng.choices(list(self.kinds), list(self.kinds.values()))
            if kind == "read_only" and not (self.run.path / "checkpoints").is_dir():
                kind = "kill"
            self.done[kind] += 1
            getattr(self, f"_{kind}")(alive)
            print(f"{kind}: reached {self.run.reached()}, saved {self.run.saved()}")
            if kind not in PASSING:
                break
            self._expect_progress(alive, kind)
            if any(process.poll() not in (None, 0, 1) for process in alive):
                codes = [process.poll() for process in alive]
                self.failures.append(f"{kind}: exit codes {codes}: {self.run.log.read_text()}")
        codes = [process.wait() for process in alive]  # after a pause, the run continues to its end
        self.run.logger.wait()
        if self.run.continued_from() not in (None, saved):
            continued = self.run.continued_from()
            self.failures.append(f"{saved} was saved, but it continued from {continued}")
        self.count_steps_again(reached)
        self.lost.append(self.run.reached() - self.run.saved())
        self.in_save += any(self.run.path.glob("*/*.orbax-checkpoint-tmp*"))
        # Processes that lose another one print tracebacks, so only single processes are checked.
        text = self.run.log.read_text()
        if len(alive) == 1 and 2 * text.count("Traceback") > text.count(TENSORSTORE_NOISE):
            self.failures.append(f"exit codes {codes}: {text[-3000:]}")

    def count_steps_again(self, reached: int) -> None:
        """Counts the repeated steps of the last start; the run had reached `reached` before."""
        if (continued := self.run.continued_from()) is not None:
            self.steps_again += max(reached - continued, 0)

    def _kill(self, alive: list[subprocess.Popen]) -> None:
        chosen = alive if self.rng.random() < 0.3 else [self.rng.choice(alive)]
        for process in chosen:
            process.kill()
        # A process waits five minutes for the others to connect, because slow machines need it.
        # Launchers end it earlier (srun --kill-on-bad-exit).
        if len(alive) > 1 and CONNECTED not in self.run.log.read_text():
            for process in alive:
                process.kill()
        for process in alive:
            process.wait(SURVIVORS_END)

    def _pause(self, alive: list[subprocess.Popen]) -> None:
        process = self.rng.choice(alive)
        process.send_signal(signal.SIGSTOP)
        time.sleep(PAUSE)
        process.send_signal(signal.SIGCONT)

    def _full_once(self, alive: list[subprocess.Popen]) -> None:
        assert self.run.faults is not None
        self.run.faults.arm(("write", "create", "mkdir"), errno.ENOSPC)
        until = time.monotonic() + FULL_SECONDS
        while time.monotonic() < until and any(process.poll() is None for process in alive):
            time.sleep(0.02)
        self.run.faults.disarm()

    def _eio(self, alive: list[subprocess.Popen]) -> None:
        assert self.run.faults is not None
        count, every = self.rng.randint(1, FAILING_CALLS), self.rng.choice((1, 1, 5))
        calls = self.rng.choice((faults.CALLS, ("write", "fsync"), ("open", "read", "stat")))
        self.run.faults.arm(calls, errno.EIO, count=count, every=every)

    def _expect_progress(self, alive: list[subprocess.Popen], kind: str) -> None:
        """Records a failure if a run neither ends nor takes further steps."""
        reached, until = self.run.reached(), time.monotonic() + FAILURE_SEEN
        while time.monotonic() < until:
            if any(process.poll() is not None for process in alive):
                return
            if self.run.reached() > reached:
                return
            time.sleep(0.1)
        self.failures.append(f"{kind}: no step and no end in {FAILURE_SEEN} seconds")
        for process in alive:
            process.kill()

    def _full(self, alive: list[subprocess.Popen]) -> None:
        for process in alive:
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
        self._expect_an_end(alive, "a full disk")

    def _read_only(self, alive: list[subprocess.Popen]) -> None:
        folder = self.run.path / "checkpoints"
        folder.chmod(0o555)
        self._expect_an_end(alive, "a folder that cannot be written")
        folder.chmod(0o755)

    def _expect_an_end(self, alive: list[subprocess.Popen], reason: str) -> None:
        codes = [process.wait(FAILURE_SEEN) for process in alive]
        if not any(codes) and self.run.saved() < self.run.steps:
            self.failures.append(f"{reason}: exit codes {codes}")


def soak_run(
    folder: pathlib.Path, events: int, processes: int, kinds: dict[str, int], seed: int, steps: int
) -> dict:
    """Returns the report, which includes "failures"."""
    begin = time.monotonic()
    Run(folder, "tokenizer", "digits_tokenizer.py", 1, steps=20, eval_every=0).finish()
    settings = SMALL | OFTEN | {"steps": steps}
    whole = Run(folder, "whole", "digits.py", processes, **settings)
    started = time.monotonic()
    alive = whole.start()
    while not whole.reached() and alive[0].poll() is None:
        time.sleep(0.02)
    startup = time.monotonic() - started  # longer than for later starts, because it compiles
    if any(process.wait() for process in alive):
        raise SystemExit(whole.log.read_text())
    run = Run(folder, "disturbed", "digits.py", processes, **settings)
    disturbed = Events(run, seed, kinds, startup)
    while sum(disturbed.done.values()) < events and disturbed.run.reached() < steps:
        disturbed.start_and_disturb(events)
    reached = disturbed.run.reached()
    disturbed.run.finish()
    disturbed.count_steps_again(reached)
    for a, b in zip(whole.end(), disturbed.run.end(), strict=True):
        if not jax.tree.all(jax.tree.map(np.array_equal, a, b)):
            disturbed.failures.append("the ends differ")
    goodput = disturbed.run.goodput()
    if (productive := goodput[PREFIX + "fraction"]) < MIN_GOODPUT:
        disturbed.failures.append(f"only {productive:.0%} of the time was productive: {goodput}")
    # Compare the run's own count with the count from outside.
    again, counted = disturbed.steps_again, goodput[STEPS_LOST]
    if abs(again - counted) > MISCOUNTED * (len(disturbed.lost) + 1):
        disturbed.failures.append(f"took {again} steps again, but counted {counted:g} as lost")
    return {
        "events": disturbed.done,
        "processes": processes,
        "seed": seed,
        "in_a_save": disturbed.in_save,
        "steps_lost_most": max(disturbed.lost),
        "steps_lost_mean": float(np.mean(disturbed.lost)),
        "steps_again": again,
        "goodput": round(productive, 3),
        "goodput_undisturbed": round(whole.goodput()[PREFIX + "fraction"], 3),
        "seconds": round(time.monotonic() - begin),
        "failures": disturbed.failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser("tests.helpers.soak", description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a new one")
    parser.add_argument("--events", type=int, default=50)
    parser.add_argument("--kills_only", action="store_true")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True)
    folder = flags.folder.absolute()
    kinds = {"kill": 1} if flags.kills_only else EVENT_WEIGHTS
    if faults.COMPILER is None:
        print("no C compiler, so no full_once and no eio", file=sys.stderr)
        kinds = {kind: weight for kind, weight in kinds.items() if kind not in ("full_once", "eio")}
    report = soak_run(folder, flags.events, flags.processes, kinds, flags.seed, flags.steps)
    print(json.dumps(report))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
