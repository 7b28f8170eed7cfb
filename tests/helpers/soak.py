"""Kills a run of the digits at random moments, and compares its end with a run left alone.

python -m tests.helpers.soak --folder=DIR [--kills=50] [--processes=1] [--seed=0]

`make soak` does it. Every kill is a SIGKILL, at any moment from the start of the interpreter on;
with several processes it hits one of them, and the others have to end by themselves. The last line
is a report; the exit code is 1 where more was lost than the steps since the last save, or where the
ends differ by a bit.
"""

import argparse
import json
import os
import pathlib
import random
import re
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import orbax.checkpoint as ocp

from tests.helpers.paths import ROOT
from tests.helpers.tiny import lines

SMALL = {"task.model.depth": 2, "task.model.width": 64, "task.tokenizer_weights": "tokenizer"}
OFTEN = {"save_every": 5, "eval_every": 50, "preview_every": 200, "log_every": 1}
SURVIVORS_END = 60  # seconds: twice the heartbeat after which they take a process for dead


class Run:
    """A command that trains, and what it leaves."""

    def __init__(self, folder: pathlib.Path, name: str, config: str, processes: int, **settings):
        self.path, self.log = folder / name, folder / f"{name}.log"
        self._folder, self._processes = folder, processes
        self._command = [sys.executable, str(ROOT / "train.py")]
        self._command += [f"--config={ROOT}/configs/{config}", f"--config.run_dir={name}"]
        self._command += [f"--config.{key}={value}" for key, value in settings.items()]

    def start(self) -> list[subprocess.Popen]:
        environment = os.environ | {
            "PYTHONPATH": str(ROOT),
            "JAX_NUM_CPU_DEVICES": "1" if self._processes == 1 else "2",
            "JAX_COMPILATION_CACHE_DIR": str(self._folder / "cache"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        commands = [self._command]
        if self._processes > 1:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                address = f"--coordinator=localhost:{free.getsockname()[1]}"
            flags = [address, f"--processes={self._processes}"]
            commands = [[*self._command, *flags, f"--process={i}"] for i in range(self._processes)]
        with open(self.log, "w") as log:
            return [
                subprocess.Popen(command, cwd=self._folder, env=environment, stdout=log, stderr=log)
                for command in commands
            ]

    def finish(self) -> None:
        for process in self.start():
            if code := process.wait():
                raise SystemExit(f"exit code {code}:\n{self.log.read_text()}")

    def reached(self) -> int:
        """The last step that was logged."""
        path = self.path / "metrics.jsonl"
        steps = re.findall(r'^{"step": (\d+),', path.read_text() if path.is_file() else "", re.M)
        return int(steps[-1]) if steps else 0

    def saved(self) -> int:
        """The newest step that is whole, 0 for none."""
        names = [path.name for path in self.path.glob("checkpoints/*")]
        return max((int(name) for name in names if name.isdigit()), default=0)

    def continued_from(self) -> int | None:
        """The step from which the last start went on; None where it did not come so far."""
        found = re.search(r"continuing .* after step (\d+)", self.log.read_text())
        return int(found[1]) if found else None

    def end(self) -> list:
        """All that it ended with: metrics, and every array of the last and of the best step."""
        found: list = [lines(self.path)]
        for kind in ("checkpoints", "best"):
            step = max((self.path / kind).iterdir(), key=lambda path: int(path.name))
            items = [step / name for name in ("params", "ema", "opt_state")]
            found += [ocp.StandardCheckpointer().restore(x) for x in items if x.is_dir()]
        return found


def soak(folder: pathlib.Path, kills: int, processes: int, seed: int, steps: int) -> dict:
    """The report, "failures" among it."""
    rng, begin, failures = random.Random(seed), time.monotonic(), []
    Run(folder, "tokenizer", "digits_tokenizer.py", 1, steps=20, eval_every=0).finish()
    settings = SMALL | OFTEN | {"steps": steps}
    whole = Run(folder, "whole", "digits.py", processes, **settings)
    killed = Run(folder, "killed", "digits.py", processes, **settings)
    whole.finish()

    lost, in_save, done, startup = [], 0, 0, 15.0
    while done < kills and killed.reached() < steps:
        saved, reached, started = killed.saved(), killed.reached(), time.monotonic()
        alive, moment = killed.start(), rng.uniform(0, 1.6 * startup)
        while (seconds := time.monotonic() - started) < moment and alive[0].poll() is None:
            time.sleep(0.02)
            if startup == 15.0 and killed.reached() != reached:
                startup = seconds
        rng.choice(alive).kill()
        done += 1
        for process in alive:
            process.wait(SURVIVORS_END)
        if killed.continued_from() not in (None, saved):
            failures.append(f"{saved} was saved, but it went on from {killed.continued_from()}")
        lost.append(killed.reached() - killed.saved())
        in_save += any(killed.path.glob("*/*.orbax-checkpoint-tmp*"))
        print(f"kill {done} after {seconds:.1f} s: {killed.reached()=}, {killed.saved()=}")
    killed.finish()
    for a, b in zip(whole.end(), killed.end(), strict=True):
        if not jax.tree.all(jax.tree.map(np.array_equal, a, b)):
            failures.append("the ends differ")
    return {
        "kills": done,
        "processes": processes,
        "seed": seed,
        "in_a_save": in_save,
        "steps_lost_most": max(lost),
        "steps_lost_mean": float(np.mean(lost)),
        "seconds": round(time.monotonic() - begin),
        "failures": failures,
    }


def main() -> int:
    parser = argparse.ArgumentParser("tests.helpers.soak", description=__doc__)
    parser.add_argument("--folder", type=pathlib.Path, required=True, help="a new one")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=1000)
    flags = parser.parse_args()
    flags.folder.mkdir(parents=True)
    folder = flags.folder.absolute()
    report = soak(folder, flags.kills, flags.processes, flags.seed, flags.steps)
    print(json.dumps(report))
    return 1 if report["failures"] else 0


if __name__ == "__main__":
    sys.stdout.reconfigure(line_buffering=True)
    sys.exit(main())
