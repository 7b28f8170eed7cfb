"""Checkpoints of a run: <run>/checkpoints/<step> and, where wanted, <run>/best/<step>."""

import pathlib
import shutil
import sys
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from varjax import trees
from varjax.training.task import PyTree, TrainState

ARRAYS = ("params", "ema", "opt_state")
UNREADABLE = (ValueError, KeyError, OSError)  # what Orbax raises for files that are not all there


class Checkpoints:
    """The last `keep` checkpoints in a directory, each written in the background.

    A step's directory gets its name when it is complete, so a process killed while saving leaves
    only a temporary, which the next start removes, unless it is to be `read_only`: then the run
    may be going on elsewhere.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2, read_only: bool = False):
        self.directory = directory.absolute()
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=not read_only,
            read_only=read_only,
            # or else the processes confuse two directories that are written at the same time
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=directory.name
            ),
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: Any) -> None:
        self._manager.close()

    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: TrainState, meta: dict | None = None) -> None:
        """Copies what is not None of the state to the host and writes it in the background.

        `meta` is plain JSON. A step that is there already is left alone: a resumed run comes to
        the same state again. But with another `meta` it is replaced, and steps that lie ahead are
        removed: they were saved under settings that were since changed.
        """
        self.wait()
        if step in self.steps() and self.meta(step) == (meta or {}):
            return
        for late in self.steps():
            if late >= step:
                self._manager.delete(late)
        items: dict[str, Any] = {"meta": ocp.args.JsonSave(meta or {})}
        for name in ARRAYS:
            if (tree := getattr(state, name)) is not None:
                items[name] = ocp.args.StandardSave(tree)
        self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def wait(self) -> None:
        """Returns when everything saved is on the disk."""
        self._manager.wait_until_finished()

    def meta(self, step: int) -> dict:
        """The `meta` saved with a step."""
        return self._restore(step, {"meta": ocp.args.JsonRestore()})["meta"]

    def restore(
        self, abstract: TrainState, shardings: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict] | None:
        """(state, meta) of `step` or of the newest step that can be read; None at the start.

        Steps that cannot be read are reported and set aside in <run>/unreadable. ValueError when
        none of those that exist can be read, or when the arrays saved are not those of `abstract`.
        """
        steps = self.steps() if step is None else [step]
        for candidate in reversed(steps):
            try:
                self._check(candidate, abstract)
                found = self._read(candidate, abstract, shardings)
                self._set_aside([late for late in steps if late > candidate])
                return found
            except _Mismatch:
                raise
            except UNREADABLE as error:
                reason = str(error).splitlines()[0][:200]
                print(f"checkpoint {candidate} cannot be read: {reason}", file=sys.stderr)
        if steps:
            raise ValueError(f"no checkpoint of {steps} in {self.directory} can be read")
        return None

    def params(self, step: int, ema: bool | None = None) -> PyTree:
        """Parameters alone on the first device, with shapes from the checkpoint itself.

        `ema` asks for their average, None for the average if there is one.
        """
        saved: Any = self._manager.item_metadata(step)
        averaged = saved.get("ema") is not None
        if ema and not averaged:
            raise ValueError(f"step {step} in {self.directory} keeps no average; ask for params")
        name = "ema" if averaged and ema is not False else "params"
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: _abstract(x, sharding), saved[name].tree)
        return self._restore(step, {name: ocp.args.StandardRestore(target)})[name]

    def _set_aside(self, broken: list[int]) -> None:
        for step in broken if jax.process_index() == 0 else []:
            aside = self.directory.parent / "unreadable" / str(step)
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            (self.directory / str(step)).rename(aside)
        if broken:
            self._manager.reload()

    def _check(self, step: int, abstract: TrainState) -> None:
        saved: Any = self._manager.item_metadata(step)
        if saved.get("params") is None:
            raise ValueError("the description of its parameters is missing")
        for name in ("params", "ema"):
            tree = saved[name].tree if saved.get(name) is not None else {}
            if report := trees.difference(getattr(abstract, name), tree):
                where = self.directory / str(step)
                raise _Mismatch(f"{where} does not hold the {name} of this config:\n{report}")

    def _read(
        self, step: int, abstract: TrainState, shardings: TrainState
    ) -> tuple[TrainState, dict]:
        targets = jax.tree.map(_abstract, abstract, shardings)
        trees_of = {name: getattr(targets, name) for name in ARRAYS}
        items: dict[str, Any] = {"meta": ocp.args.JsonRestore()}
        items |= {n: ocp.args.StandardRestore(t) for n, t in trees_of.items() if t is not None}
        read = self._restore(step, items)
        count = jax.device_put(np.int32(step), shardings.step)
        state = TrainState(count, read["params"], read.get("ema"), read["opt_state"])
        return state, read["meta"]

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        return self._manager.restore(step, args=ocp.args.Composite(**items))


def restore_weights(run_dir: str | pathlib.Path, ema: bool | None = None) -> PyTree:
    """The weights that a run is used with, on the first device: the best it kept, else its last.

    `ema` asks for their average or for none. None gives the average if there is one, unless the
    best was chosen by the parameters' own metric ("eval/..."). Raises ValueError when nothing was
    saved yet, or no average.
    """
    for name in ("best", "checkpoints"):
        directory = pathlib.Path(run_dir) / name
        if not directory.is_dir():
            continue
        with Checkpoints(directory, read_only=True) as checkpoints:
            if steps := checkpoints.steps():
                chosen_by = checkpoints.meta(steps[-1]).get("keep_best", "")
                if ema is None and name == "best" and chosen_by.startswith("eval/"):
                    ema = False
                return checkpoints.params(steps[-1], ema)
    raise ValueError(f"{run_dir} holds no checkpoint yet; let it train until its first save")


class _Mismatch(ValueError):
    """A checkpoint that can be read, of something else."""


def _abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
