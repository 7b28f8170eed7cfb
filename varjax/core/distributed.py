"""Several processes as one run: how they find one another, and how they agree."""

import argparse
import json
import logging
import os
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from varjax.core.errors import InputError, StorageError, run_command

HEARTBEAT_SECONDS = 30  # a process that is silent for so long is dead, and the others end
NETWORK_SECONDS = 10  # until a file that one machine wrote is seen by another
# Errors of the first process that reach all; the most special first, for `isinstance` to find.
SHARED_ERRORS = {e.__name__: e for e in (StorageError, InputError, ValueError, KeyError, OSError)}


USAGE = (
    "--distributed alone works under Slurm, Cloud TPU, GKE and Open MPI; elsewhere give each "
    "process --coordinator=HOST:PORT (of the first) --processes=COUNT --process=NUMBER (from 0)"
)


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --distributed, --coordinator, --processes and --process, for `connect_by_flags`."""
    group = parser.add_argument_group("several processes", USAGE)
    group.add_argument("--distributed", action="store_true", help="this is one of several")
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where the first one listens")
    group.add_argument("--processes", type=int, metavar="COUNT", help="how many there are")
    group.add_argument("--process", type=int, metavar="NUMBER", help="which this one is, from 0")


def connect_by_flags(flags: argparse.Namespace, communicate: bool = True) -> tuple[int, int]:
    """Connects this process to the others where the flags of `add_process_flags` ask for it.

    To be called before anything else of JAX.

    Args:
        flags: the parsed command line.
        communicate: False where the processes only share out work, without exchanging anything;
            --processes and --process are then enough, and nothing is connected by them.

    Returns:
        The number of this process and how many there are: (0, 1) without such flags.

    Raises:
        InputError: flags are missing or out of range, or no cluster was found.
    """
    numbers = flags.coordinator, flags.processes, flags.process
    if not flags.distributed and numbers == (None, None, None):
        return 0, 1
    if not communicate and numbers[0] is None and numbers[1:] != (None, None):
        return _check_number(flags.processes, flags.process)
    connect(*numbers)
    return jax.process_index(), jax.process_count()


def connect(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Makes this process one of several.

    Without arguments it asks Slurm, Cloud TPU, GKE or Open MPI. To be called before anything else
    of JAX.

    Args:
        coordinator: HOST:PORT at which the first process listens.
        count: the number of processes.
        index: the number of this process, from 0.

    Raises:
        InputError: some arguments are missing or out of range, or no cluster was found.
    """
    coordinator = coordinator or None
    if (coordinator, count, index) != (None, None, None):
        _check_number(count, index, *(() if coordinator else ("--coordinator",)))
        host, _, port = str(coordinator).rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"--coordinator={coordinator} is not HOST:PORT; {USAGE}")
    # It would take SIGTERM for itself; `training.preemption` handles it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except ValueError as error:
        raise InputError(f"no cluster was found ({error}); {USAGE}") from error


def _check_number(count: int | None, index: int | None, *missing: str) -> tuple[int, int]:
    given = {"--processes": count, "--process": index}
    missing += tuple(flag for flag, value in given.items() if value is None)
    if missing or count is None or index is None:
        raise InputError(f"{' and '.join(missing)} missing: {USAGE}")
    if not 0 <= index < count:
        raise InputError(f"--process={index} is none of the {count} of --processes; {USAGE}")
    return index, count


def end_process(code: int) -> int:
    """Returns an exit code; one of several processes ends with it at once instead.

    For a regular end waits for the others, which may never come. They notice: at once where they
    exchange data over TCP, else by the missing heartbeat.
    """
    if jax.process_count() > 1:
        number = jax.process_index()
        print(f"process {number} ends; if another died before, that one says why", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def run_on_processes(name: str, action: Callable[[], object]) -> int:
    """Runs a command that may be one of several processes; returns its exit code.

    Args:
        name: of the command, which begins its messages.
        action: does everything; see `run_command`.
    """
    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax speaks of its own workings
    try:
        code = run_command(name, action)
    except Exception as error:
        traceback.print_exception(error)
        code = 1
    return end_process(code) if code else 0


def gather_json(value: Any) -> list[Any]:
    """Returns the JSON `value` of every process, in their order; all of them must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, int(sizes.max()) - len(text)))
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(t[:n])) for t, n in zip(texts, sizes, strict=True)]


def check_shared_file(path: pathlib.Path) -> None:
    """Raises InputError unless all processes see this file, which the first one wrote."""
    deadline = time.monotonic() + NETWORK_SECONDS
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if blind := [number for number, sees in enumerate(gather_json(seen)) if not sees]:
        raise InputError(
            f"{path}, which process 0 wrote, is not seen by process {', '.join(map(str, blind))}; "
            "choose a run_dir on a file system that all of them share"
        )


def on_first_process(action: Callable[[], Any]) -> Any:
    """Calls `action` in the first process; all wait and get what it returned, as JSON data.

    A ValueError, KeyError or OSError (InputError among them) is raised in all of them.
    """
    if jax.process_count() == 1:
        return action()
    outcome = None
    if jax.process_index() == 0:
        try:
            outcome = {"value": action()}
        except tuple(SHARED_ERRORS.values()) as error:
            kind = next(name for name, known in SHARED_ERRORS.items() if isinstance(error, known))
            outcome = {"kind": kind, "error": str(error)}
    outcome = gather_json(outcome)[0]
    if "error" in outcome:
        raise SHARED_ERRORS[outcome["kind"]](outcome["error"])
    return outcome["value"]
