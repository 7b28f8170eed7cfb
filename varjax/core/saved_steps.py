"""Checkpoints on the disk, read by one process without waiting for any other."""

import os
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import jax
import orbax.checkpoint as ocp

from varjax.core import files, read_errors, trees
from varjax.core.buckets import absolute, as_path, in_bucket
from varjax.core.errors import InputError, StorageError
from varjax.core.read_errors import machine_errno
from varjax.core.trees import PyTree

STATE_TREES = ("params", "ema", "opt_state")
READ_ERRORS = (ValueError, KeyError, OSError)  # what Orbax raises for files that are not all there
DAMAGE = re.compile(r"NOT_FOUND|DATA_LOSS|FAILED_PRECONDITION|missing|[Mm]etadata")


class MismatchError(InputError):
    """Reports a checkpoint that can be read, of another model."""


class SavedSteps:
    """Reads the checkpoints <directory>/<step>; one that is being written has another name.

    saved = SavedSteps(run_dir / "checkpoints")
    params = saved.params(saved.steps()[-1])
    """

    def __init__(self, directory: pathlib.Path):
        if in_bucket(directory) and not os.fspath(directory).startswith("gs:"):
            raise InputError(
                f"{directory}: Orbax reads checkpoints from disks and from gs:// alone; copy the "
                "run to a disk, or convert its weights there"
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
        """Lists the steps that are there now, oldest first."""
        found = [path for path in self.directory.glob("*") if path.name.isdigit()]
        if in_bucket(self.directory):  # they have their names while they are being written
            found = [path for path in found if ocp.utils.is_checkpoint_finalized(path)]
        return sorted(int(path.name) for path in found)

    def meta(self, step: int) -> dict:
        """Reads the `meta` saved with a step."""
        return self._restore(step, {"meta": ocp.args.JsonRestore()})["meta"]

    def arrays(
        self, step: int, abstract: dict[str, PyTree], shardings: dict[str, Any]
    ) -> tuple[dict[str, PyTree], dict]:
        """Reads trees of arrays and `meta`; of each array a process reads its part.

        Args:
            step: the checkpoint.
            abstract: shapes and dtypes of the trees, by their names in STATE_TREES; None for none.
            shardings: of the same structure.

        Returns:
            (trees by name, meta).

        Raises:
            MismatchError: the arrays saved are not those of `abstract`.
            StorageError: they cannot be read now, through no fault of the files.
            ValueError, KeyError or OSError: files are damaged or missing (READ_ERRORS).
        """
        self._check(step, abstract)
        items: dict[str, Any] = {"meta": ocp.args.JsonRestore()}
        for name, tree in abstract.items():
            if tree is not None:
                targets = jax.tree.map(_abstract, tree, shardings[name])
                items[name] = ocp.args.StandardRestore(targets)
        read = self._restore(step, items)
        return {name: read[name] for name in items if name != "meta"}, read["meta"]

    def params(self, step: int, ema: bool | None = None) -> PyTree:
        """Reads parameters alone to this process's first device, with shapes from the files.

        Args:
            step: the checkpoint.
            ema: True for their average, False for themselves, None for the average if there is one.

        Raises InputError where there is no average, or files are damaged or missing, or
        (StorageError) cannot be read now.
        """
        try:
            return self._params(step, ema)
        except InputError:
            raise
        except READ_ERRORS as error:
            raise InputError(
                f"{self.directory / str(step)} cannot be read: files are damaged or missing; "
                "delete it, and another checkpoint is used"
            ) from error

    def _params(self, step: int, ema: bool | None) -> PyTree:
        saved = self._saved_arrays(step)
        averaged = saved.get("ema") is not None
        if ema and not averaged:
            raise InputError(f"step {step} in {self.directory} keeps no average; ask for params")
        name = "ema" if averaged and ema is not False else "params"
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: _abstract(x, sharding), saved[name].tree)
        return self._restore(step, {name: ocp.args.StandardRestore(target)})[name]

    def _check(self, step: int, abstract: dict[str, PyTree]) -> None:
        saved = self._saved_arrays(step)
        for name in ("params", "ema"):
            tree = saved[name].tree if saved.get(name) is not None else {}
            if report := trees.difference(abstract[name], tree):
                where = self.directory / str(step)
                raise MismatchError(f"{where} does not hold the {name} of this config:\n{report}")

    def _saved_arrays(self, step: int) -> Any:
        """Reads names, shapes and dtypes of what was saved."""

        def read() -> Any:
            saved = self._checkpointer.metadata(self.directory / str(step)).item_metadata
            if saved is None or saved.get("params") is None:
                raise ValueError("the description of its parameters is missing")
            return saved

        return self._repeated(step, read)

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        path, composite = self.directory / str(step), ocp.args.Composite(**items)
        return self._repeated(step, lambda: self._checkpointer.restore(path, args=composite))

    def _repeated(self, step: int, read: Callable[[], Any]) -> Any:
        """Reads, and reads again where that fails: disks behind a network fail now and then."""
        # Of a bucket, the services' packages tell by exceptions of all kinds.
        errors = (Exception,) if in_bucket(self.directory) else READ_ERRORS
        for pause in read_errors.READ_PAUSES:
            try:
                return read()
            except errors:
                time.sleep(pause)
        try:
            return read()
        except errors as error:
            path = self.directory / str(step)
            if in_bucket(path) and not _tells_of_damage(error):
                raise StorageError(
                    f"{path} cannot be read now: {str(error)[:500]}. This does not tell of damaged "
                    "files, so leave them; start again once the bucket can be reached"
                ) from error
            # Orbax only logs some errors, and does as if files were missing: the files tell more.
            if (code := machine_errno(error) or machine_errno(_opening_error(path))) is None:
                raise
            raise StorageError(
                f"{path} cannot be read now: {os.strerror(code)}. This does "
                "not tell of damaged files, so leave them; start again once it is mended"
            ) from error


def restore_weights(run_dir: str | pathlib.Path, ema: bool | None = None) -> PyTree:
    """Reads the weights that a run is used with to the first device.

    They are the best ones by the run's `keep_best`, else the last ones. The run may be going on.

    Args:
        run_dir: of the run.
        ema: True for their average, False for themselves. None for the average if there is one,
            unless the best was chosen by the parameters' own metric ("eval/...").

    Raises:
        InputError: nothing was saved yet, or no average.
    """
    run_dir = as_path(run_dir)
    if steps := (best := SavedSteps(run_dir / "best")).steps():
        # Best by an earlier setting of keep_best is not what the run asks for now.
        chosen_by = best.meta(steps[-1]).get("keep_best", "")
        if chosen_by == files.read_json(run_dir / "config.json").get("keep_best"):
            if ema is None and chosen_by.rpartition(":")[2].startswith("eval/"):
                ema = False
            return best.params(steps[-1], ema)
    if steps := (last := SavedSteps(run_dir / "checkpoints")).steps():
        return last.params(steps[-1], ema)
    raise InputError(f"{run_dir} holds no checkpoint yet; let it train until its first save")


def _tells_of_damage(error: BaseException | None) -> bool:
    """Tells whether an exception says that objects of a bucket are missing or not as written."""
    while error is not None:
        if isinstance(error, FileNotFoundError | KeyError) or DAMAGE.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _opening_error(directory: pathlib.Path) -> OSError | None:
    """Opens the files in a directory; returns the first error, None where there is none."""
    if in_bucket(directory):
        return None

    def reraise(error: OSError) -> None:
        raise error

    try:
        for folder, _, names in os.walk(directory, onerror=reraise):
            for name in names:
                os.close(os.open(os.path.join(folder, name), os.O_RDONLY))
    except OSError as error:
        return error
    return None


def _abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
