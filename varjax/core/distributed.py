"""Several processes as one run: how they find one another, and how they agree."""

import json
import os
import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from varjax.core.errors import InputError, StorageError

HEARTBEAT_SECONDS = 30  # a process that is silent for so long is dead, and the others end
NETWORK_SECONDS = 10  # until a file that one machine wrote is seen by another
# the most special first; StorageError is an InputError and an OSError
ERRORS = {e.__name__: e for e in (StorageError, InputError, ValueError, KeyError, OSError)}


def connect(coordinator: str = "", count: int | None = None, index: int | None = None) -> None:
    """Makes this process number `index` of `count`, the first of which listens at `coordinator`.

    Without any of them, they are asked of Slurm, Cloud TPU, GKE or Open MPI. To be called before
    anything else of JAX. ValueError when some are missing, or none can be found out.
    """
    given = {"coordinator": coordinator or None, "processes": count, "process": index}
    missing = [f"--{name}" for name, value in given.items() if value is None]
    if 0 < len(missing) < len(given):
        raise InputError(f"{' and '.join(missing)} missing: {USAGE}")
    if not missing:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise InputError(f"--coordinator={coordinator} is not HOST:PORT; {USAGE}")
        assert count is not None and index is not None
        if not 0 <= index < count:
            raise InputError(f"--process={index} is none of the {count} of --processes; {USAGE}")
    try:
        jax.distributed.initialize(
            coordinator or None, count, index, heartbeat_timeout_seconds=HEARTBEAT_SECONDS
        )
    except ValueError as error:
        raise InputError(f"no cluster was found ({error}); {USAGE}") from error


USAGE = (
    "--distributed alone works under Slurm, Cloud TPU, GKE and Open MPI; elsewhere give each "
    "process --coordinator=HOST:PORT (of the first) --processes=COUNT --process=NUMBER (from 0)"
)


def end(code: int) -> int:
    """`code`; with several processes ends this one at once, for a regular end waits for the others.

    They notice: at once where they exchange data over TCP, else by the missing heartbeat.
    """
    if jax.process_count() > 1:
        number = jax.process_index()
        print(f"process {number} ends; if another died before, that one says why", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


def gather(value: Any) -> list[Any]:
    """The JSON `value` of every process, in their order; all of them must call it."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.int32(len(text)))
    padded = np.pad(text, (0, int(sizes.max()) - len(text)))
    texts = multihost_utils.process_allgather(padded)
    return [json.loads(bytes(t[:n])) for t, n in zip(texts, sizes, strict=True)]


def check_shared(path: pathlib.Path) -> None:
    """Raises InputError unless all processes see this file, which the first one wrote."""
    deadline = time.monotonic() + NETWORK_SECONDS
    while not (seen := path.exists()) and time.monotonic() < deadline:
        time.sleep(0.1)
    if blind := [number for number, sees in enumerate(gather(seen)) if not sees]:
        raise InputError(
            f"{path}, which process 0 wrote, is not seen by process {', '.join(map(str, blind))}; "
            "choose a run_dir on a file system that all of them share"
        )


def from_first(action: Callable[[], Any]) -> Any:
    """What `action` returns in the first process, as JSON; the others wait and get the same.

    A InputError, KeyError or OSError is raised in all of them.
    """
    if jax.process_count() == 1:
        return action()
    outcome = None
    if jax.process_index() == 0:
        try:
            outcome = {"value": action()}
        except tuple(ERRORS.values()) as error:
            kind = next(name for name, known in ERRORS.items() if isinstance(error, known))
            outcome = {"kind": kind, "error": str(error)}
    outcome = gather(outcome)[0]
    if "error" in outcome:
        raise ERRORS[outcome["kind"]](outcome["error"])
    return outcome["value"]
