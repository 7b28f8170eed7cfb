"""Lists the training runs in a folder: state, step, loss, speed, and when each last wrote.

varjax runs runs
varjax runs /shared/runs --watch=30

A run counts as running while a process holds its lock, on this machine or another one that shares
the folder and its locks.
"""

import argparse
import time

from varjax.analysis.runs import find_runs, run_status, status_table
from varjax.core.errors import check_setting, run_command


def main(arguments: list[str]) -> int:
    """Returns 0, 1 when it failed, 2 for a wrong command line, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        "varjax runs",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("folder", nargs="?", default="runs", metavar="DIR", help="holds runs (runs)")
    add("--watch", type=float, default=0.0, metavar="SECONDS", help="print it again and again")
    flags = parser.parse_args(arguments)

    def show() -> None:
        check_setting("watch", flags.watch, flags.watch >= 0, "0 or more seconds")
        print(status_table([run_status(run) for run in find_runs(flags.folder)]))
        while flags.watch:
            time.sleep(flags.watch)
            print()
            print(status_table([run_status(run) for run in find_runs(flags.folder)]))

    return run_command("varjax runs", show)
