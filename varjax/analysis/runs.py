"""Lists the training runs in a folder: state, step, loss, speed, and when each last wrote.

"productive" is the fraction of time, over all starts of a run, spent on steps that were kept. Time
for compiling, restoring, waiting for data, evaluating, saving and repeated steps does not count.

varjax runs runs
varjax runs /shared/runs --watch=30

A run counts as running while a process holds its lock, on this machine or on another one that
shares the folder and its locks. A bucket has no locks: there, a run counts as running if it wrote
something in the last ten minutes.
"""

import dataclasses
import math
import pathlib
import sys
import time
from typing import Literal

from varjax.analysis.run_log import read_run_log
from varjax.errors import InputError, check_setting
from varjax.runtime.commands import command_parser, run_command
from varjax.storage import buckets, files, folders
from varjax.storage.buckets import as_path, in_bucket

RECENT_SECONDS = 600.0
State = Literal["running", "finished", "failed", "stopped"]


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """Holds the state of a run.

    Attributes:
        directory: path of the run.
        state: "running" while a process holds the run's lock (in a bucket: while it writes);
            "finished" after the last step; "failed" if the last start ended with an unexpected
            error; else "stopped".
        step: last update in the run's metrics.
        steps: length of the run in updates; None if it is not known yet.
        loss: loss in the last line of training metrics; NaN before the first.
        eval_loss: loss of the last evaluation, of the averaged weights if there are any.
        images_per_second: training speed in the last line that has one.
        productive: fraction of the run's total time, over all starts, spent on steps that were
            kept, 0 … 1.
        age: seconds since the run was started or last wrote metrics; NaN if that is not known.
    """

    directory: pathlib.Path
    state: State
    step: int
    steps: int | None
    loss: float
    eval_loss: float
    images_per_second: float
    productive: float
    age: float


def find_runs(root: str | pathlib.Path) -> list[pathlib.Path]:
    """Finds the directories of runs in a folder, itself included, in alphabetical order.

    Raises InputError where there are none.
    """
    root = as_path(root)
    if not root.is_dir():
        raise InputError(f"{root} is not a folder; use one that contains runs")
    if in_bucket(root):
        paths = [root / name for name in buckets.object_versions(root)]
    else:
        paths = root.rglob("data.json")
    runs = sorted(path.parent for path in paths if path.name == "data.json")
    if not (runs := [run for run in runs if (run / "config.json").is_file()]):
        raise InputError(f"{root} has no training run; a run has a config.json and a data.json")
    return runs


def run_status(directory: pathlib.Path) -> RunStatus:
    """Reads the state of a run, which may be in progress.

    Raises InputError for a directory that is not a run.
    """
    log = read_run_log(directory)
    steps = log.steps
    step = max((line["step"] for line in log.lines), default=0)
    metrics = directory / "metrics.jsonl"
    newest = metrics if metrics.is_file() else directory / "config.json"
    errors = any(directory.glob("error*.txt"))
    age = time.time() - files.modified(newest)
    finished = steps is not None and step >= steps
    if in_bucket(directory):
        running = age < RECENT_SECONDS and not (finished or errors)
    else:
        running = folders.is_locked(directory)
    if running:
        state: State = "running"
    elif finished:
        state = "finished"
    else:
        state = "failed" if errors else "stopped"

    def last(*names: str) -> float:
        for line in reversed(log.lines):
            for name in names:
                if line.get(name) is not None:
                    return line[name]
        return math.nan

    return RunStatus(
        directory,
        state,
        step,
        steps,
        last("loss"),
        last("eval_ema/loss", "eval/loss"),
        last("images_per_second"),
        last("goodput/fraction"),
        age,
    )


def read_statuses(root: str | pathlib.Path) -> list[RunStatus]:
    """Reads the state of all runs in a folder; a damaged one is reported on stderr and left out.

    Raises InputError if there is no run, or none can be read.
    """
    found, statuses = find_runs(root), []
    for run in found:
        try:
            statuses.append(run_status(run))
        except (InputError, OSError) as error:
            if len(found) == 1:
                raise
            print(f"note: {run} is left out: {error}", file=sys.stderr)
    return statuses


def status_table(runs: list[RunStatus]) -> str:
    """Formats runs as a table of text, a line each."""
    rows: list[tuple[str, ...]] = [
        ("run", "state", "step", "loss", "eval loss", "images/s", "productive", "last written")
    ]
    for run in runs:
        total = "" if run.steps is None else f" / {run.steps:,}"
        numbers = (run.loss, run.eval_loss, run.images_per_second)
        shown = ["" if math.isnan(x) else f"{x:,.4g}" for x in numbers]
        shown.append("" if math.isnan(run.productive) else f"{run.productive:.0%}")
        rows.append((str(run.directory), run.state, f"{run.step:,}{total}", *shown, _ago(run.age)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _ago(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    for unit, size in ("d", 86400), ("h", 3600), ("min", 60):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    parser = command_parser("varjax runs", __doc__)
    add = parser.add_argument
    add(
        "folder",
        nargs="?",
        default="runs",
        metavar="DIR",
        help="folder that contains the runs (runs)",
    )
    add(
        "--watch",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="print the list again at this interval",
    )
    flags = parser.parse_args(arguments)

    def show() -> None:
        check_setting("watch", flags.watch, flags.watch >= 0, "0 or more seconds")
        while True:
            print(status_table(read_statuses(flags.folder)), flush=True)
            if not flags.watch:
                break
            time.sleep(flags.watch)
            print()

    return run_command("varjax runs", show)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
