"""Trains tiny.py in one of several processes, with faults on request, for test_processes.py.

python -m tests.helpers.one_of_several HOST:PORT COUNT NUMBER JOBS, where JOBS is a JSON list of
{"run": directory, "settings": {...}, "die_in_save": step, "terminate_in": step,
"fail_in_save": step}.
"""

import asyncio
import json
import logging
import os
import pathlib
import signal
import sys

import jax
import orbax.checkpoint as ocp

from tests.helpers import tiny
from varjax.errors import StorageError
from varjax.runtime import distributed
from varjax.storage import read_errors
from varjax.training import loop, sharding
from varjax.training.sharding import MeshShape

LAST = 1  # the process that is killed or gets SIGTERM


def main(address: str, count: str, number: str, jobs: str) -> None:
    jax.config.update("jax_num_cpu_devices", 8 // int(count))
    logging.getLogger("absl").setLevel(logging.ERROR)
    read_errors.READ_PAUSES = (0.0,)  # tests have no network disks to wait for
    if int(count) > 1:
        distributed.connect(address, int(count), int(number))
    for job in json.loads(jobs):
        mesh = MeshShape(*job["settings"].pop("mesh"))
        if jax.process_index() == LAST:
            inject_faults(job.get("die_in_save"), job.get("terminate_in"))
        elif "fail_in_save" in job:
            fail_in_save(job["fail_in_save"])
        try:
            loop.train(tiny.experiment(job["run"], mesh=mesh, **job["settings"]))
        except StorageError as error:
            print("failed:", error, flush=True)
            distributed.end_process(1)
        except ValueError as error:
            print("refused:", error, flush=True)
        except Exception as error:
            print("failed:", type(error).__name__, flush=True)
            distributed.end_process(1)


def inject_faults(die_in_save: int | None, terminate_in: int | None) -> None:
    """Kills this process while it saves a step, or sends it SIGTERM in a step."""
    save, take, steps = (
        ocp.CheckpointManager.save,
        sharding.Prefetcher.__next__,
        iter(range(1, 10**6)),
    )

    async def save_and_die(*arguments, **options):
        await write(*arguments, **options)  # the parameters, but nothing that follows
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    write = ocp.StandardCheckpointHandler.async_save

    def note_step(manager, step, *arguments, **options):
        if step == die_in_save:
            ocp.StandardCheckpointHandler.async_save = save_and_die
        return save(manager, step, *arguments, **options)

    def take_and_terminate(batches):
        step = next(steps)
        if step == terminate_in:
            signal.raise_signal(signal.SIGTERM)
        return take(batches)

    ocp.CheckpointManager.save = note_step
    sharding.Prefetcher.__next__ = take_and_terminate


def fail_in_save(step: int) -> None:
    """Makes renaming a step's directory fail in this process, the first, which renames it."""
    rename = os.rename

    def refuse(source, target):
        if pathlib.Path(target).name == str(step):
            raise PermissionError(f"{target} cannot be written")
        rename(source, target)

    os.rename = refuse


if __name__ == "__main__":
    main(*sys.argv[1:])
