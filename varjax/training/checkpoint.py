"""Checkpoints of a run: <run>/checkpoints/<step>, and <run>/best/<step> with `keep_best`."""

import contextlib
import functools
import pathlib
import sys
import threading
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy

from varjax.checkpoints.saved_steps import STATE_TREES, SavedSteps, make_record
from varjax.errors import DamagedFileError, StorageError
from varjax.runtime.distributed import on_first_process
from varjax.storage import files
from varjax.storage.buckets import absolute, in_bucket
from varjax.training.task import TrainState


def _wait_for_processes(*, key: str, timeout_ms: int) -> None:
    """Waits at one of Orbax's barriers, unless this process has failed to save.

    If a thread has failed, Orbax still waits ten minutes for the other processes, and they for it.
    Here the process fails immediately, which also ends the others.
    """
    error = sys.exception()
    if error is not None and threading.current_thread() is not threading.main_thread():
        raise error
    ocp.multihost.get_barrier_sync_fn()(key=key, timeout_ms=timeout_ms)


def read_state(
    saved: SavedSteps, step: int, abstract: TrainState, shardings: Any
) -> tuple[TrainState, dict]:
    """Reads the whole state of a step, each process its part; all processes must call it.

    Args:
        saved: checkpoints of a run.
        step: step number of the checkpoint.
        abstract: shapes and dtypes of the state.
        shardings: shardings of the restored arrays, which may differ from those at saving.

    Returns:
        (state, the `meta` saved with it).

    Raises:
        MismatchError: the saved arrays differ from `abstract`.
        DamagedFileError: files are missing or damaged.
        StorageError: the files cannot be read now, but may be good.
    """
    trees, where = (
        {name: getattr(state, name) for name in STATE_TREES} for state in (abstract, shardings)
    )
    read, meta = saved.arrays(step, trees, where)
    count = jax.make_array_from_callback((), shardings.step, lambda _: np.int32(step))
    return TrainState(count, read["params"], read.get("ema"), read["opt_state"]), meta


class Checkpoints:
    """Keeps the last checkpoints of a run in a directory, each written in the background.

        with Checkpoints(run_dir / "checkpoints") as checkpoints:
            checkpoints.save(10, state)

    All processes make the same calls, and each writes its part of the arrays. A step's directory
    gets its name when it is complete, so processes killed while saving leave only a temporary
    directory, which the next start removes.

    Args:
        directory: directory of the checkpoints <directory>/<step>.
        keep: number of most recent checkpoints to keep.
        keep_every: checkpoints that are saved at multiples of this step while it is set are kept
            for good, also by later starts with another setting; 0 for none.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2, keep_every: int = 0):
        self.directory, self._keep, self._keep_every = absolute(directory), keep, keep_every
        self._saved = SavedSteps(self.directory)
        kept = on_first_process(lambda: list(filter(self._saved.is_kept, self._saved.steps())))
        policies = [preservation_policy.LatestN(keep), preservation_policy.CustomSteps(kept)]
        if keep_every:
            policies.append(preservation_policy.EveryNSteps(keep_every))
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in STATE_TREES}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        options = ocp.CheckpointManagerOptions(
            preservation_policy=preservation_policy.AnyPreservationPolicy(policies),
            cleanup_tmp_directories=True,
            async_options=ocp.AsyncOptions(barrier_sync_fn=_wait_for_processes),
            # otherwise processes confuse two directories that are written at the same time
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=directory.name
            ),
        )
        try:
            self._manager = ocp.CheckpointManager(
                self.directory, options=options, item_handlers=handlers
            )
        except OSError as error:
            raise StorageError(f"{directory} cannot be made or read: {error}") from error

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        # Closing waits for the others, who may be dead if the devices failed.
        if kind is None or not issubclass(kind, jax.errors.JaxRuntimeError):
            self._reporting_failure(self._manager.close)

    def steps(self) -> list[int]:
        """Lists the saved steps, oldest first."""
        return on_first_process(lambda: sorted(self._manager.all_steps()))

    def save(self, step: int, state: TrainState, meta: dict | None = None) -> None:
        """Copies the state, except what is None, to the host, and writes it in the background.

        A step that is already saved stays as it is, because a resumed run reaches the same state.
        With another `meta` it is replaced and later steps are removed, because they were saved
        under settings that have changed since.

        Args:
            step: number of updates done.
            state: arrays sharded over all processes.
            meta: plain JSON data to store with them.

        Raises:
            StorageError: an earlier save failed, or this one cannot start.
        """
        self.wait()
        self._reporting_failure(lambda: on_first_process(self._check_writable))
        if step in (steps := self.steps()) and self._has_meta(step, meta or {}):
            return
        for late in steps:
            if late >= step:
                self._manager.delete(late)
        saved = {name: getattr(state, name) for name in STATE_TREES}
        saved = {name: tree for name, tree in saved.items() if tree is not None}
        items: dict[str, Any] = {n: ocp.args.StandardSave(tree) for n, tree in saved.items()}
        kept = self._keep_every > 0 and step % self._keep_every == 0
        items["meta"] = ocp.args.JsonSave(make_record(step, meta or {}, saved, kept))
        self._reporting_failure(
            lambda: self._manager.save(step, args=ocp.args.Composite(**items), force=True)
        )

    def rewrite_meta(self, step: int, meta: dict) -> None:
        """Replaces the `meta` of a saved step, atomically, without writing its arrays again."""
        self.wait()
        path = self.directory / str(step) / "meta" / "metadata"  # as JsonCheckpointHandler names it
        on_first_process(lambda: files.write_json(path, self._saved.record(step, meta)))

    def wait(self) -> None:
        """Waits until everything is on the disk; raises StorageError if a save failed."""
        self._reporting_failure(self._manager.wait_until_finished)

    def check(self) -> None:
        """Raises StorageError if a write in the background has failed; does not wait."""
        self._reporting_failure(self._manager.check_for_errors)

    def meta(self, step: int) -> dict:
        """Reads the `meta` saved with a step."""
        return on_first_process(lambda: self._saved.meta(step))

    def restore(
        self, abstract: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict] | None:
        """Reads the newest step that all processes can read.

        Damaged steps are reported, and moved to <run>/unreadable once an older one is read.

        Args:
            abstract: shapes and dtypes of the state.
            shardings: shardings of the restored arrays, which may differ from those at saving.

        Returns:
            (state, meta), or None if nothing is saved.

        Raises:
            MismatchError: the saved arrays differ from `abstract`.
            StorageError: a step cannot be read now, but its files may be good.
            InputError: none of the saved steps can be read.
        """
        read = functools.partial(read_state, self._saved, abstract=abstract, shardings=shardings)
        if (restored := self._saved.newest(read, self.steps)) is not None:
            newest = int(restored[0].step)
            self._move_aside([step for step in self.steps() if step > newest])
        return restored

    def _reporting_failure(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except (
            jax.errors.JaxRuntimeError
        ):  # the cause is a device or another process, not the files
            raise
        except Exception as error:  # of many kinds, such as RESOURCE_EXHAUSTED as a ValueError
            good = []
            with contextlib.suppress(Exception):  # the disk may be what failed
                good = self._saved.steps()
            raise StorageError(
                f"saving to {self.directory} failed: {str(error)[:1000]}\nThe steps saved before "
                f"are good: {good}. Once the file system works again and has "
                f"room for {self._keep + 1} checkpoints, the same command continues"
            ) from error

    def _has_meta(self, step: int, meta: dict) -> bool:
        try:
            return self.meta(step) == meta
        except DamagedFileError:  # it is replaced
            return False

    def _check_writable(self) -> None:
        """Raises OSError if the folder is not writable; Orbax would wait for minutes instead."""
        if not in_bucket(self.directory):
            files.probe_writable(self.directory)

    def _move_aside(self, broken: list[int]) -> None:
        def move() -> None:
            for step in broken:
                aside = self.directory.parent / "unreadable" / str(step)
                files.remove(aside)
                files.move(self.directory / str(step), aside)

        if broken:
            on_first_process(move)
            self._manager.reload()
