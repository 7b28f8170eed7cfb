"""Lists checkpoints on a disk or in a bucket, and reads and verifies them.

Each step is saved with a record, the item "meta": the caller's JSON data, the number of the step,
and a fingerprint of each array as it was in memory.
"""

import contextlib
import math
import os
import pathlib
import stat
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp

from varjax import trees
from varjax.checkpoints.checkpoint_errors import checkpoint_error, device_error
from varjax.checkpoints.fingerprint import dtype_and_shape, fingerprints
from varjax.checkpoints.late_reports import late_reports_ignored
from varjax.errors import (
    DamagedFileError,
    DiskReadError,
    InputError,
    MismatchError,
    StorageError,
)
from varjax.runtime.distributed import on_all_processes
from varjax.runtime.messages import say
from varjax.storage import checksums, read_errors, untrusted
from varjax.storage.buckets import absolute, in_bucket
from varjax.trees import PyTree

STATE_TREES = ("params", "ema", "opt_state")
MAX_DELETED = 20  # steps that the run may delete before they are read
T = TypeVar("T")


def make_record(
    step: int, meta: Mapping[str, Any], state: Mapping[str, PyTree], kept: bool = False
) -> dict[str, Any]:
    """Makes the record to save with a step; all processes that hold its arrays must call this.

    Args:
        step: number of updates done.
        meta: JSON data of the caller.
        state: arrays by their names in STATE_TREES.
        kept: whether the step is kept for good.
    """
    arrays = {name: fingerprints(tree, written=True) for name, tree in state.items()}
    return checksums.seal({"step": step, "meta": dict(meta), "arrays": arrays, "kept": kept})


class SavedSteps:
    """Reads the checkpoints <directory>/<step>; an unfinished one has another name.

    saved = SavedSteps(run_dir / "checkpoints")
    params = saved.newest(saved.params)

    Its methods raise:
        StorageError: the machine or network cannot read a step now; its files may be intact.
        DamagedFileError: files are missing or damaged.
    """

    def __init__(self, directory: pathlib.Path):
        if in_bucket(directory) and not os.fspath(directory).startswith("gs:"):
            raise InputError(
                f"{directory}: Orbax reads checkpoints only from disks and gs://; copy the run to "
                "a disk, or convert its weights there"
            )
        self.directory = absolute(directory)
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        handlers: dict[str, Any] = {
            name: ocp.StandardCheckpointHandler(multiprocessing_options=alone)
            for name in STATE_TREES
        }
        handlers["meta"] = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        options = ocp.CompositeOptions(multiprocessing_options=alone)
        self._checkpointer = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(composite_options=options, **handlers),
            multiprocessing_options=alone,
        )

    def steps(self) -> list[int]:
        """Lists the steps that exist now, oldest first."""
        paths = [path for path in self.directory.glob("*") if path.name.isdigit()]
        if in_bucket(self.directory):  # there, unfinished steps have their final names
            paths = [path for path in paths if ocp.utils.is_checkpoint_finalized(path)]
        return sorted(int(path.name) for path in paths)

    def newest(
        self, read: Callable[[int], T], steps: Callable[[], list[int]] | None = None
    ) -> T | None:
        """Returns `read(step)` for the newest step that can be read; None if there is no step.

        If a run in progress deletes a step before it is read, the steps are listed again. A damaged
        step is reported, and the one before it is read; nothing is moved.

        Args:
            read: function that reads one step.
            steps: function that lists the steps, the same in all processes, which read together;
                then only the first one reports. None for the method `steps`.

        Raises:
            InputError: no step can be read.
            StorageError: the disk cannot read any step.
        """
        list_steps, failed = steps or self.steps, dict[int, DamagedFileError]()
        while candidates := [step for step in list_steps() if step not in failed]:
            try:
                result = read(candidates[-1])
            except DamagedFileError as error:
                failed[candidates[-1]] = error
                if len(failed.keys() - set(list_steps())) > MAX_DELETED:
                    break
                continue
            damaged = sorted(set(list_steps()) & failed.keys())
            for step in damaged if steps is None or jax.process_index() == 0 else ():
                say(f"{_unreadable(step, failed[step])}; using {candidates[-1]}")
            return result
        if failed:
            raise _none_readable(self.directory, failed)
        return None

    def meta(self, step: int) -> dict:
        """Reads the caller's data that were saved with a step."""
        return self._record(step)["meta"]

    def is_kept(self, step: int) -> bool:
        """Returns whether a step was saved to be kept for good; False for a damaged one."""
        try:
            return bool(self._record(step).get("kept"))
        except DamagedFileError:
            return False

    def record(self, step: int, meta: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the content of a step's file `meta/metadata`, with new data of the caller."""
        return checksums.seal(self._record(step) | {"meta": dict(meta)})

    def arrays(
        self, step: int, abstract: dict[str, PyTree], shardings: dict[str, Any]
    ) -> tuple[dict[str, PyTree], dict]:
        """Reads trees of arrays, each process its parts, and the caller's data.

        All processes must call this. An error in one is raised in all.

        Args:
            step: step number of the checkpoint.
            abstract: shapes and dtypes of each tree in STATE_TREES, by name; None omits a tree.
            shardings: shardings with the structure of `abstract`; they may differ from those of the
                saved arrays.

        Returns:
            (trees by name, the caller's data).

        Raises:
            MismatchError: the saved arrays differ from `abstract`.
        """
        read, record = {}, {}

        def read_my_parts() -> None:
            saved = self._saved_arrays(step)
            record.update(self._record(step))
            self._check(step, abstract, saved, record["arrays"])
            items: dict[str, Any] = {}
            for name, tree in abstract.items():
                if tree is not None:
                    targets = jax.tree.map(_abstract, tree, shardings[name])
                    items[name] = ocp.args.StandardRestore(targets)
            restored = self._restore(step, items)
            read.update({name: restored[name] for name in items})

        on_all_processes(read_my_parts)
        actual = {name: fingerprints(tree) for name, tree in read.items()}
        on_all_processes(lambda: self._compare(step, actual, record["arrays"]))
        return read, record["meta"]

    def params(self, step: int, ema: bool | None = None) -> PyTree:
        """Reads parameters to this process's first device, with shapes from the files.

        This does not wait for other processes.

        Args:
            step: step number of the checkpoint.
            ema: True reads the EMA parameters, False the others; None reads the EMA if it
                exists.

        Raises:
            InputError: there is no EMA.
        """
        saved, record = self._saved_arrays(step), self._record(step)
        averaged = saved.get("ema") is not None
        if ema and not averaged:
            raise InputError(
                f"ema=True: step {step} in {self.directory} has no EMA weights; leave ema out, or "
                "set it to false"
            )
        name = "ema" if averaged and ema is not False else "params"
        self._check_description(step, name, saved[name].tree, record["arrays"])
        self._repeated(step, lambda: self._check_claims(step, name, saved[name].tree))
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: _abstract(x, sharding), saved[name].tree)
        read = self._restore(step, {name: ocp.args.StandardRestore(target)})[name]
        self._compare(step, {name: fingerprints(read)}, record["arrays"])
        return read

    def _record(self, step: int) -> dict[str, Any]:
        """Reads what `make_record` made."""

        def read() -> dict[str, Any]:
            path = self.directory / str(step)
            items = ocp.args.Composite(meta=ocp.args.JsonRestore())
            record = self._checkpointer.restore(path, args=items)["meta"]
            record = checksums.unseal(record, path / "meta")
            if record["step"] != step:
                raise DamagedFileError(f"{path / 'meta'} belongs to step {record['step']}")
            return record

        return self._repeated(step, read)

    def _check(
        self, step: int, abstract: dict[str, PyTree], saved: Any, recorded: dict[str, Any]
    ) -> None:
        """Raises MismatchError if the saved arrays differ from `abstract`."""
        path = self.directory / str(step)
        for name in ("params", "ema"):
            tree = saved[name].tree if saved.get(name) is not None else {}
            self._check_description(step, name, tree, recorded)
            if report := trees.difference(abstract[name], tree):
                raise MismatchError(f"{path} has different {name} than this config:\n{report}")
        if abstract["opt_state"] is not None:
            leaves = trees.paths(abstract["opt_state"])
            expected = {name: dtype_and_shape(x) for name, x in leaves.items()}
            stored = {p: text.split()[0] for p, text in recorded.get("opt_state", {}).items()}
            if expected != stored:
                differing = sorted(dict(expected.items() ^ stored.items()))
                raise MismatchError(
                    f"{path} has a different opt_state than this config; {len(differing)} arrays "
                    f"differ: {', '.join(differing[:10])}"
                )

    def _check_description(
        self, step: int, name: str, tree: PyTree, recorded: dict[str, Any]
    ) -> None:
        """Raises DamagedFileError if the arrays that Orbax describes differ from the record."""
        described = {path: dtype_and_shape(leaf) for path, leaf in trees.paths(tree).items()}
        saved = {path: text.split()[0] for path, text in recorded.get(name, {}).items()}
        if described != saved:
            raise DamagedFileError(
                f"{self.directory / str(step) / name} is damaged: its metadata do not match"
            )

    def _check_claims(self, step: int, name: str, tree: PyTree) -> None:
        """Raises DamagedFileError if arrays claim many more bytes than their files have."""
        folder, claimed = self.directory / str(step) / name, 0
        try:
            for leaf in jax.tree.leaves(tree):
                itemsize = np.dtype(leaf.dtype).itemsize
                claimed += math.prod(untrusted.check_shape(leaf.shape, itemsize)) * itemsize
        except (InputError, TypeError) as error:
            raise DamagedFileError(f"{folder} is damaged: {error}") from error
        actual = 0 if in_bucket(folder) else untrusted.bytes_on_disk(folder)
        if actual and claimed > untrusted.plausible_bytes(actual):
            raise DamagedFileError(
                f"{folder} is damaged: its arrays have {claimed} bytes, but its files {actual}"
            )

    def _compare(self, step: int, actual: dict[str, Any], recorded: dict[str, Any]) -> None:
        """Raises DamagedFileError if fingerprints differ from the record."""
        for name in actual:
            saved = recorded.get(name, {})
            if changed := sorted(p for p, text in actual[name].items() if saved.get(p) != text):
                raise DamagedFileError(
                    f"{self.directory / str(step) / name} is damaged: the checksums of "
                    f"{len(changed)} of {len(saved)} arrays do not match, among them {changed[0]}"
                )

    def _saved_arrays(self, step: int) -> Any:
        """Reads names, shapes and dtypes of the saved arrays."""

        def read() -> Any:
            saved = self._checkpointer.metadata(self.directory / str(step)).item_metadata
            if saved is None or saved.get("params") is None:
                raise ValueError("the description of its parameters is missing")
            return saved

        return self._repeated(step, read)

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        path, composite = self.directory / str(step), ocp.args.Composite(**items)
        return self._repeated(step, lambda: self._checkpointer.restore(path, args=composite))

    def _check_regular_files(self, path: pathlib.Path) -> None:
        """Raises DamagedFileError for a pipe among the files, which would block."""
        if in_bucket(path):
            return
        for folder, _, names in os.walk(path):
            for file in (os.path.join(folder, name) for name in names):
                regular = True
                with contextlib.suppress(OSError):  # reported when it is read
                    regular = stat.S_ISREG(os.stat(file).st_mode)
                if not regular:
                    raise DamagedFileError(f"{file} is damaged: it is not a regular file")

    def _repeated(self, step: int, read: Callable[[], T]) -> T:
        """Calls `read`, and again after a failure, because network disks fail now and then."""
        path = self.directory / str(step)
        self._check_regular_files(path)
        for pause in (*read_errors.READ_PAUSES, None):
            try:
                with late_reports_ignored():
                    return read()
            # Orbax raises exceptions of many kinds, even a bare Exception for damaged arrays.
            except Exception as error:
                if (failed := device_error(error)) is not None:
                    raise failed from None
                if pause is None or not path.exists():
                    raise checkpoint_error(path, error) from error
            time.sleep(pause)
        raise AssertionError


def _unreadable(step: int, error: Exception) -> str:
    """Returns one line that says why a step cannot be read."""
    reason = str(error).splitlines()[0][:300] if str(error) else type(error).__name__
    return f"checkpoint {step} cannot be read: {reason}"


def _none_readable(directory: pathlib.Path, errors: Mapping[int, DamagedFileError]) -> InputError:
    """Returns the error to raise if no step can be read: a StorageError if the disk fails."""
    lines = "\n  ".join(_unreadable(step, errors[step]) for step in sorted(errors))
    text = f"no checkpoint of {sorted(errors)} in {directory} can be read:\n  {lines}\n"
    if any(isinstance(error, DiskReadError) for error in errors.values()):
        return StorageError(f"{text}Nothing was moved. Start again when the disk works")
    return InputError(
        f"{text}Restore them from a copy. Without {directory}, the run starts again "
        "from step 0, and removes its best/"
    )


def _abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
