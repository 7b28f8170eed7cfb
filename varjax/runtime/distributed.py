"""Connects the processes of a run, exchanges their data, and makes them agree on errors."""

import argparse
import json
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
from varjax.runtime.commands import end_at_once, run_command

HEARTBEAT_SECONDS = 30  # without a heartbeat from a process, after which the others end
# Time until every machine sees a file that one of them wrote: an NFS client caches a folder for up
# to a minute (acdirmax).
NETWORK_SECONDS = 65
# Errors that are raised in all processes; subclasses first, because `isinstance` picks the first.
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
    "--distributed alone works with Slurm, Cloud TPU, GKE and Open MPI; elsewhere each process "
    "needs --coordinator=HOST:PORT (of the first) --processes=COUNT --process=NUMBER (from 0)"
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
    """Connects this process to others if the flags of `add_process_flags` say so.

    Call this before any other use of JAX.

    Args:
        flags: the parsed command line.
        communicate: False if the processes divide the work without exchanging data. They are then
            not connected, and --processes and --process are enough.

    Returns:
        Index of this process and number of processes; (0, 1) without these flags.

    Raises:
        InputError: flags are missing or out of range, or no cluster was found.
    """
    automatic = (flags.coordinator, flags.processes, flags.process) == (None, None, None)
    if automatic and not flags.distributed:
        return 0, 1
    if not communicate:
        if automatic:
            return _number_in_cluster()
        return _check_number(flags.processes, flags.process)
    connect(flags.coordinator, flags.processes, flags.process)
    return jax.process_index(), jax.process_count()


def connect(
    coordinator: str | None = None, count: int | None = None, index: int | None = None
) -> None:
    """Connects this process to the others of a run.

    Without arguments it asks Slurm, Cloud TPU, GKE or Open MPI. Call this before any other use of
    JAX.

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
    # JAX's service would handle SIGTERM, but `training.preemption` does.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except ValueError as error:
        raise InputError(f"no cluster was found ({error}); {USAGE}") from error


def _number_in_cluster() -> tuple[int, int]:
    """Asks the cluster for the index and number of processes, without connecting them.

    Connected processes must end together: the first one waits for the others for five minutes, and
    then all are killed, as they are if one dies or starts late. Disconnecting later would leave JAX
    with devices of other processes. JAX has no public function that returns only the numbers. This
    is the interface that its clusters implement. If it changes, the flags still work.
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
            f"this version of JAX cannot number processes without connecting them ({error}); start "
            "each with --processes=COUNT and --process=NUMBER (from 0)"
        ) from error
    if device is not None:  # one GPU for each process, as in `jax.distributed.initialize`
        for platform in ("cuda", "rocm"):
            jax.config.update(f"jax_{platform}_visible_devices", str(device))
    return _check_number(count, index)


def _check_number(count: int | None, index: int | None, *missing: str) -> tuple[int, int]:
    flags = {"--processes": count, "--process": index}
    missing += tuple(flag for flag, value in flags.items() if value is None)
    if missing or count is None or index is None:
        raise InputError(f"{' and '.join(missing)} missing: {USAGE}")
    if not 0 <= index < count:
        raise InputError(f"--process={index} must be from 0 to {count - 1}; {USAGE}")
    return index, count


def end_process(code: int) -> int:
    """Returns an exit code; if this is one of several processes, ends it immediately instead.

    A regular exit would wait for the other processes, perhaps forever. They notice the end at once
    if they exchange data over TCP, otherwise by the missing heartbeat.
    """
    if jax.process_count() > 1:
        number = jax.process_index()
        print(f"process {number} ends; if another one died first, see its error", file=sys.stderr)
        end_at_once(code)
    return code


def run_on_processes(name: str, action: Callable[[], object], debug: bool = False) -> int:
    """Runs a command that may be one of several processes; returns its exit code.

    Args:
        name: name of the command, for its messages.
        action: function that does the work; see `run_command`.
        debug: whether to print the traceback of an InputError.
    """
    before = set(threading.enumerate())
    try:
        code = run_command(name, action, debug)
    except Exception as error:
        traceback.print_exception(error)
        code = 1
    if not code:
        return 0
    new_threads = set(threading.enumerate()) - before
    if any(type(thread).__module__.startswith("orbax.") for thread in new_threads):
        # After a failed save, these threads wait minutes for one another, and so would a regular
        # exit.
        end_at_once(code)
    return end_process(code)


def gather_json(value: Any) -> list[Any]:
    """Returns the JSON `value` of every process, in order; all processes must call this."""
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
    while not (visible := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if blind := [number for number, sees in enumerate(gather_json(visible)) if not sees]:
        raise InputError(
            f"{path}, which process 0 wrote, is not visible to process "
            f"{', '.join(map(str, blind))}; choose a run_dir on a file system that all processes "
            "share"
        )


def on_first_process(action: Callable[[], Any]) -> Any:
    """Calls `action` in the first process, and returns its result, as JSON data, in all processes.

    A ValueError (such as InputError), KeyError or OSError is raised in all processes.
    """
    if jax.process_count() == 1:
        return action()
    outcome = gather_json(_outcome(action) if jax.process_index() == 0 else None)[0]
    if "error" in outcome:
        raise SHARED_ERRORS[outcome["kind"]](outcome["error"])
    return outcome["value"]


def on_all_processes(action: Callable[[], Any]) -> list[Any]:
    """Calls `action` in every process, and returns the results of all, as JSON data.

    A ValueError (such as InputError), KeyError or OSError in any process is raised in all.
    """
    if jax.process_count() == 1:
        return [action()]
    outcomes = gather_json(_outcome(action))
    for number, outcome in enumerate(outcomes):
        if "error" in outcome:
            raise SHARED_ERRORS[outcome["kind"]](f"process {number}: {outcome['error']}")
    return [outcome["value"] for outcome in outcomes]


def _outcome(action: Callable[[], Any]) -> dict[str, Any]:
    """Returns the result or the exception of `action`, as JSON data."""
    try:
        return {"value": action()}
    except tuple(SHARED_ERRORS.values()) as error:
        kind = next(name for name, known in SHARED_ERRORS.items() if isinstance(error, known))
        return {"kind": kind, "error": str(error)}
