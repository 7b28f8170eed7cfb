"""Lists the training runs in a folder: state, step, loss, speed, and when each last wrote.

"productive" is the fraction of time, over all starts of a run, spent on steps that were kept. Time
for compiling, restoring, waiting for data, evaluating, saving and repeated steps does not count.

varjax runs runs
varjax runs /shared/runs --state=running,failed --watch=30
varjax runs runs --name=digits --json

A run counts as running while a process holds its lock, on this machine or on another one that
shares the folder and its locks. A bucket has no locks: there, a run counts as running if it wrote
something in the last ten minutes. A failed start ended with an error before the run's first step.
"""

import argparse
import dataclasses
import json
import math
import os
import pathlib
import shutil
import sys
import time
import typing
from collections.abc import Iterator, Sequence
from typing import Literal

from varjax.analysis.run_log import RunLog, read_run_log
from varjax.errors import InputError, check_setting
from varjax.runtime.commands import command_parser, run_command
from varjax.runtime.text_table import table_lines
from varjax.storage import buckets, files, folders
from varjax.storage.buckets import as_path, in_bucket
from varjax.storage.untrusted import printable

EVAL_LOSSES = "eval_ema/loss", "eval/loss"  # the first one that an evaluation has
RECENT_SECONDS = 600.0
ERROR_BYTES = 2**20  # read of the end of an error file
ERROR_LENGTH = 200  # characters of an error in the table
TRACEBACK = "Traceback (most recent call last):\n"
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"  # ECMA-48: CUP, EL, ED
State = Literal["running", "finished", "failed", "failed start", "stopped"]
STATES: tuple[State, ...] = typing.get_args(State)


@dataclasses.dataclass(frozen=True)
class RunStatus:
    """Holds the state of a run.

    Attributes:
        directory: path of the run.
        state: "running" while a process holds the run's lock (in a bucket: while it writes);
            "finished" after the last step, or once `patience` ended it; "failed" if a start ended
            with an error and nothing was saved since, and "failed start" if the run has taken no
            step yet; else "stopped".
        step: last update in the run's metrics.
        steps: length of the run in updates; None if it is not known yet.
        loss: loss in the last line of training metrics; NaN before the first.
        eval_loss: loss of the last evaluation, of the EMA weights if there are any.
        images_per_second: training speed in the last line that has one.
        productive: fraction of the run's total time, over all starts, spent on steps that were
            kept, 0 … 1.
        age: seconds since the run was started or last wrote metrics; NaN if that is not known.
        error: first line of that error; "" if there is none.
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
    error: str = ""


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
        paths = _described_below(root)
    runs = sorted(path.parent for path in paths if path.name == "data.json")
    if not (runs := [run for run in runs if (run / "config.json").is_file()]):
        raise InputError(f"{root} has no training run; a run has a config.json and a data.json")
    return runs


def _described_below(folder: pathlib.Path, above: tuple[str, ...] = ()) -> Iterator[pathlib.Path]:
    """Yields the files data.json in a folder and deeper, also behind links, but not within runs.

    Folders that cannot be read are left out, because they belong to other people, and so are those
    that disappear meanwhile.
    """
    try:
        with os.scandir(folder) as entries:
            found = {entry.name: entry for entry in entries}
    except (PermissionError, FileNotFoundError, NotADirectoryError):
        return
    if "data.json" in found:
        yield folder / "data.json"
    above = (*above, os.path.realpath(folder))
    is_run = {"config.json", "data.json"} <= found.keys()
    for name, entry in found.items():
        if not entry.is_dir() or (is_run and entry.is_symlink()):
            continue
        if os.path.realpath(entry) not in above:
            yield from _described_below(folder / name, above)


def run_status(directory: pathlib.Path) -> RunStatus:
    """Reads the state of a run, which may be in progress.

    Raises InputError for a directory that is not a run.
    """
    log = read_run_log(directory)
    steps = log.steps
    step = max((line["step"] for line in log.lines), default=0)
    metrics = directory / "metrics.jsonl"
    newest = metrics if metrics.is_file() else directory / "config.json"
    # error.txt is that of process 0; the errors of the others are often consequences of it.
    errors = sorted(directory.glob("error*.txt"), key=lambda path: (len(path.name), path.name))
    age = time.time() - files.modified(newest)
    finished = _is_finished(log, directory / "checkpoints")
    if in_bucket(directory):
        running = age < RECENT_SECONDS and not (finished or errors)
    else:
        running = folders.is_locked(directory)
    if running:
        state: State = "running"
    elif finished:
        state = "finished"
    elif errors:
        state = "failed" if step else "failed start"
    else:
        state = "stopped"
    return RunStatus(
        directory,
        state,
        step,
        steps,
        log.last("loss"),
        log.last(*EVAL_LOSSES),
        log.last("images_per_second"),
        log.last("goodput/fraction"),
        age,
        _error_line(errors[0]) if errors and not running else "",
    )


def _is_finished(log: RunLog, checkpoints: pathlib.Path) -> bool:
    """Returns whether the run's last step is saved, or that with which its `patience` ended it.

    A step whose evaluation a signal cut off is not the end. Without checkpoints, which may have
    been removed, the last evaluation counts.
    """
    evaluated = [line["step"] for line in log.lines if any(x.startswith("eval") for x in line)]
    saved = [int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal()]
    at_end = log.steps is not None and max(saved or evaluated, default=0) >= log.steps
    if not saved:
        return at_end
    try:  # as JsonCheckpointHandler names it; Orbax itself would take seconds to import
        meta = files.read_json(checkpoints / str(max(saved)) / "meta" / "metadata")["meta"]
        since_best, due = meta.get("evaluations_since_best"), meta.get("evaluation_due")
    except (InputError, KeyError, TypeError, AttributeError):  # damaged, or just removed
        return at_end
    if at_end:
        return not due
    keep_best, patience = log.config.get("keep_best"), log.config.get("patience")
    if not keep_best or type(patience) is not int or type(since_best) is not int:
        return False
    return 0 < patience <= since_best and meta.get("keep_best") == keep_best


def _error_line(path: pathlib.Path) -> str:
    """Returns the first line of the message in an error file, which may contain tracebacks."""
    try:
        text = path.read_bytes()[-ERROR_BYTES:].decode(errors="replace")
    except OSError as error:
        return f"{path.name} cannot be read: {error}"
    *_, last = text.rpartition(TRACEBACK)
    lines = last.splitlines()
    message = (line for line in lines if line.strip() and not line.startswith(" "))
    return next(message, "")


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


def status_table(runs: Sequence[RunStatus]) -> str:
    """Formats runs as a table of text: a line each, and below it the error that ended it."""
    rows: list[tuple[str, ...]] = [
        ("run", "state", "step", "loss", "eval loss", "images/s", "productive", "last written")
    ]
    for run in runs:
        total = "" if run.steps is None else f" / {run.steps:,}"
        numbers = (run.loss, run.eval_loss, run.images_per_second)
        shown = ["" if math.isnan(x) else f"{x:,.4g}" for x in numbers]
        shown.append("" if math.isnan(run.productive) else f"{run.productive:.0%}")
        rows.append((str(run.directory), run.state, f"{run.step:,}{total}", *shown, _ago(run.age)))
    errors = ["", *(printable(run.error[:ERROR_LENGTH]) for run in runs)]
    both = zip(table_lines(rows, left=2), errors, strict=True)
    return "\n".join(f"{line}\n    {error}" if error else line for line, error in both)


def status_json(runs: Sequence[RunStatus]) -> str:
    """Formats runs as a JSON list of objects; numbers that are not known are null."""
    objects = [
        {
            name: None if isinstance(value, float) and math.isnan(value) else value
            for name, value in (dataclasses.asdict(run) | {"directory": str(run.directory)}).items()
        }
        for run in runs
    ]
    return json.dumps(objects, indent=2)


def _ago(seconds: float) -> str:
    if math.isnan(seconds):
        return ""
    for unit, size in ("d", 86400), ("h", 3600), ("min", 60):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit} ago"
    return f"{max(seconds, 0):.0f} s ago"


def redraw(text: str) -> None:
    """Replaces what a terminal shows; lines and columns that it has no room for are left out."""
    columns, rows = shutil.get_terminal_size()
    lines = text.splitlines()
    if len(lines) >= rows:
        more = len(lines) - (rows - 2)
        lines = [*lines[: rows - 2], f"… {more} more lines; --state and --name show fewer runs"]
    shown = "".join(f"{line[:columns]}{CLEAR_LINE}\n" for line in lines)
    print(f"{HOME}{shown}{CLEAR_BELOW}", end="", flush=True)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    about = "folder that contains the runs (runs)"
    add("folder", nargs="?", default="runs", metavar="DIR", help=about)
    about = "show the list again at this interval; a terminal shows it in place"
    add("--watch", type=float, default=0.0, metavar="SECONDS", help=about)
    about = f"only runs in these states, joined by commas: {', '.join(STATES)}"
    add("--state", default="", help=about)
    add("--name", default="", metavar="TEXT", help="only runs whose path contains this text")
    add("--json", action="store_true", help="print a JSON list of objects instead of a table")


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    parser = command_parser("varjax runs", __doc__)
    _add_flags(parser)
    flags = parser.parse_args(arguments)
    in_place = flags.watch > 0 and sys.stdout.isatty() and not flags.json

    def read() -> str:
        found = read_statuses(flags.folder)
        states = flags.state.split(",") if flags.state else STATES
        runs = [run for run in found if run.state in states and flags.name in str(run.directory)]
        if flags.json:
            return status_json(runs)
        left_out = f"\n{len(found) - len(runs)} of {len(found)} runs are left out"
        return status_table(runs) + left_out * (len(runs) < len(found))

    def show() -> None:
        check_setting("watch", flags.watch, 0 <= flags.watch <= 86_400, "0 … 86,400 seconds")
        for state in flags.state.split(",") if flags.state else ():
            check_setting("state", state, state in STATES, f"one of {', '.join(STATES)}")
        if in_place:
            print(HOME + CLEAR_BELOW, end="")
        while True:
            if in_place:
                redraw(f"{read()}\n\nevery {flags.watch:g} s, {time.strftime('%X')}; Ctrl-C ends")
            else:
                print(read(), flush=True)
            if not flags.watch:
                break
            time.sleep(flags.watch)
            if not in_place:
                print()

    return run_command("varjax runs", show)
