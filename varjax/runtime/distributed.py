"""Several processes as one run: how they find one another, and how they agree."""

import argparse
import json
import logging
import os
import pathlib
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from varjax.errors import (
    DamagedFileError,
    DiskReadError,
    InputError,
    MismatchError,
    StorageError,
)
from varjax.runtime.commands import run_command

HEARTBEAT_SECONDS = 30  # a process that is silent for so long is dead, and the others end
# Until a file that one machine wrote is seen by another: an NFS client keeps what it knows of a
# folder for up to a minute (acdirmax).
NETWORK_SECONDS = 65
# Errors of the first process that reach all; the most special first, for `isinstance` to find.
SHARED_ERRORS: dict[str, type[Exception]] = {
    error.__name__: error
    for error in (
        StorageError,
        MismatchError,
        DiskReadError,
        DamagedFileError,
        InputError,
        ValueError,
        KeyError,
        OSError,
    )
}

USAGE = (
    "--distributed alone works under Slurm, Cloud TPU, GKE and Open MPI; elsewhere give each "
    "process --coordinator=HOST:PORT (of the first) --processes=COUNT --process=NUMBER (from 0)"
)


def add_process_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --distributed, --coordinator, --processes and --process, for `connect_by_flags`."""
    group = parser.add_argument_group("several processes", USAGE)
    group.add_argument("--distributed", action="store_true", help="this process is one of several")
    group.add_argument(
        "--coordinator", metavar="HOST:PORT", help="address at which the first process listens"
    )
    group.add_argument("--processes", type=int, metavar="COUNT", help="total number of processes")
    group.add_argument(
        "--process", type=int, metavar="NUMBER", help="index of this process, from 0"
    )


def connect_by_flags(flags: argparse.Namespace, communicate: bool = True) -> tuple[int, int]:
    """Connects this process to the others where the flags of `add_process_flags` ask for it.

    To be called before anything else of JAX.

    Args:
        flags: the parsed command line.
        communicate: False if the processes only divide the work and exchange nothing; then they are
            not connected, and --processes and --process are enough.

    Returns:
        The number of this process and how many there are: (0, 1) without such flags.

    Raises:
        InputError: flags are missing or out of range, or no cluster was found.
    """
    numbers = flags.coordinator, flags.processes, flags.process
    if not flags.distributed and numbers == (None, None, None):
        return 0, 1
    if not communicate:
        if numbers == (None, None, None):
            return _number_in_cluster()
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
        count: total number of processes.
        index: index of this process, from 0.

    Raises:
        InputError: some arguments are missing or out of range, or no cluster was found.
    """
    coordinator = coordinator or None
    if (coordinator, count, index) != (None, None, None):
        _check_number(count, index, *(() if coordinator else ("--coordinator",)))
        host, _, port = str(coordinator).rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port[:6]) < 2**16:
            raise InputError(f"--coordinator={coordinator} is not HOST:PORT; {USAGE}")
    # It would take SIGTERM for itself; `training.preemption` handles it.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except ValueError as error:
        raise InputError(f"no cluster was found ({error}); {USAGE}") from error


def _number_in_cluster() -> tuple[int, int]:
    """Asks the cluster which process this is, and how many there are, without connecting to them.

    Those that are connected must end together: the first to be done waits for the others at a
    barrier of five minutes, and then all are killed, as they are where one dies or is late to
    start. Connecting, then parting, would leave devices that JAX takes for parts of a larger whole.
    JAX has no public function that tells only the numbers; this is the interface that its clusters
    implement, and where it changes there are still the flags.
    """
    try:
        from jax._src.clusters import ClusterEnv

        clusters = [c for c in ClusterEnv._cluster_types if not c.opt_in_only_method]
        cluster = next((c for c in clusters if c.is_env_present()), None)
        if cluster is None:
            raise InputError(f"no cluster was found; {USAGE}")
        index, count = cluster.get_process_id(), cluster.get_process_count()
        device = os.environ.get("JAX_LOCAL_DEVICE_IDS") or cluster.get_local_process_id()
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"this version of JAX does not tell the number of a process alone ({error}); give each "
            "--processes=COUNT and --process=NUMBER (from 0)"
        ) from error
    if device is not None:  # as `jax.distributed.initialize`: one GPU for each process
        for platform in ("cuda", "rocm"):
            jax.config.update(f"jax_{platform}_visible_devices", str(device))
    return _check_number(count, index)


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
        _end_at_once(code)
    return code


def _end_at_once(code: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_on_processes(name: str, action: Callable[[], object], debug: bool = False) -> int:
    """Runs a command that may be one of several processes; returns its exit code.

    Args:
        name: name of the command, which its messages begin with.
        action: function that does the work; see `run_command`.
        debug: whether users' mistakes are shown with their traceback, too.
    """
    # Orbax speaks of its own workings, and shows errors that it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    before = set(threading.enumerate())
    try:
        code = run_command(name, action, debug)
    except Exception as error:
        traceback.print_exception(error)
        code = 1
    if not code:
        return 0
    left = set(threading.enumerate()) - before
    if any(type(thread).__module__.startswith("orbax.") for thread in left):
        # After a save that failed they wait for one another, and a regular end for them: minutes.
        _end_at_once(code)
    return end_process(code)


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
    outcome = gather_json(_outcome(action) if jax.process_index() == 0 else None)[0]
    if "error" in outcome:
        raise SHARED_ERRORS[outcome["kind"]](outcome["error"])
    return outcome["value"]


def on_all_processes(action: Callable[[], Any]) -> list[Any]:
    """Calls `action` in every process; returns what it returned in each, as JSON data.

    A ValueError, KeyError or OSError (InputError among them) in any of them is raised in all.
    """
    if jax.process_count() == 1:
        return [action()]
    outcomes = gather_json(_outcome(action))
    for number, outcome in enumerate(outcomes):
        if "error" in outcome:
            raise SHARED_ERRORS[outcome["kind"]](f"process {number}: {outcome['error']}")
    return [outcome["value"] for outcome in outcomes]


def _outcome(action: Callable[[], Any]) -> dict[str, Any]:
    """Returns what `action` returned or raised, as JSON data."""
    try:
        return {"value": action()}
    except tuple(SHARED_ERRORS.values()) as error:
        kind = next(name for name, known in SHARED_ERRORS.items() if isinstance(error, known))
        return {"kind": kind, "error": str(error)}
