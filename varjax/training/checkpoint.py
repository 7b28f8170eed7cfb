"""Checkpoints of a run: <run>/checkpoints/<step> and, where wanted, <run>/best/<step>."""

import pathlib
import shutil
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from varjax.core.distributed import from_first, gather
from varjax.core.errors import InputError, StorageError
from varjax.core.saved_steps import ARRAYS, UNREADABLE, Mismatch, Saved
from varjax.training.task import TrainState


class Checkpoints:
    """The last `keep` checkpoints in a directory, each written in the background.

    All processes make the same calls, and each writes its part of the arrays. A step's directory
    gets its name when it is complete, so processes killed while saving leave only a temporary,
    which the next start removes.
    """

    def __init__(self, directory: pathlib.Path, keep: int = 2):
        self.directory, self._keep = directory.absolute(), keep
        handlers: dict[str, Any] = {name: ocp.StandardCheckpointHandler() for name in ARRAYS}
        handlers["meta"] = ocp.JsonCheckpointHandler()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            cleanup_tmp_directories=True,
            # or else the processes confuse two directories that are written at the same time
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=directory.name
            ),
        )
        self._manager = ocp.CheckpointManager(
            self.directory, options=options, item_handlers=handlers
        )
        self._saved = Saved(self.directory)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        # Closing waits for the others, who may be dead if the devices failed.
        if kind is None or not issubclass(kind, jax.errors.JaxRuntimeError):
            self._manager.close()

    def steps(self) -> list[int]:
        """The saved steps, oldest first."""
        return from_first(lambda: sorted(self._manager.all_steps()))

    def save(self, step: int, state: TrainState, meta: dict | None = None) -> None:
        """Copies what is not None of the state to the host and writes it in the background.

        `meta` is plain JSON. A step that is there already is left alone: a resumed run comes to
        the same state again. But with another `meta` it is replaced, and steps that lie ahead are
        removed: they were saved under settings that were since changed.
        """
        self.wait()
        if step in (steps := self.steps()) and self.meta(step) == (meta or {}):
            return
        for late in steps:
            if late >= step:
                self._manager.delete(late)
        items: dict[str, Any] = {"meta": ocp.args.JsonSave(meta or {})}
        for name in ARRAYS:
            if (tree := getattr(state, name)) is not None:
                items[name] = ocp.args.StandardSave(tree)
        self._watch(lambda: self._manager.save(step, args=ocp.args.Composite(**items), force=True))

    def wait(self) -> None:
        """Returns when everything saved is on the disk; StorageError where that failed."""
        self._watch(self._manager.wait_until_finished)

    def check(self) -> None:
        """StorageError where what is written in the background has failed; does not wait."""
        self._watch(self._manager.check_for_errors)

    def meta(self, step: int) -> dict:
        """The `meta` saved with a step."""
        return from_first(lambda: self._saved.meta(step))

    def restore(
        self, abstract: TrainState, shardings: TrainState, step: int | None = None
    ) -> tuple[TrainState, dict] | None:
        """(state, meta) of `step` or of the newest step that all processes can read, else None.

        `shardings` need not be those that it was saved with. Steps that cannot be read are reported
        and set aside in <run>/unreadable. ValueError when none of those that exist can be read, or
        when the arrays saved are not those of `abstract`.
        """
        steps = self.steps() if step is None else [step]
        for candidate in reversed(steps):
            found, problem = None, None
            try:
                found = self._read(candidate, abstract, shardings)
            except UNREADABLE as error:
                problem = isinstance(error, Mismatch), str(error)
            problems = [p for p in gather(problem) if p is not None]
            if not problems:
                self._set_aside([late for late in steps if late > candidate])
                return found
            mismatch, words = problems[0]
            if mismatch:
                raise Mismatch(words)
            from_first(lambda: _report(candidate, words))  # noqa: B023  (called at once)
        if steps:
            raise InputError(f"no checkpoint of {steps} in {self.directory} can be read")
        return None

    def _read(self, step: int, abstract: TrainState, shardings: Any) -> tuple[TrainState, dict]:
        trees, where = ({n: getattr(state, n) for n in ARRAYS} for state in (abstract, shardings))
        read, meta = self._saved.arrays(step, trees, where)
        count = jax.make_array_from_callback((), shardings.step, lambda _: np.int32(step))
        return TrainState(count, read["params"], read.get("ema"), read["opt_state"]), meta

    def _watch(self, action: Callable[[], Any]) -> None:
        try:
            action()
        except jax.errors.JaxRuntimeError:  # not the files: a device, or another process
            raise
        except Exception as error:  # of many kinds, RESOURCE_EXHAUSTED as a ValueError among them
            good = [path.name for path in self.directory.iterdir() if path.name.isdigit()]
            raise StorageError(
                f"saving to {self.directory} failed: {str(error)[:1000]}\nThe steps saved before "
                f"are good: {sorted(map(int, good))}. Once the file system works again and has "
                f"room for {self._keep + 1} checkpoints, the same command continues"
            ) from error

    def _set_aside(self, broken: list[int]) -> None:
        def move() -> None:
            for step in broken:
                aside = self.directory.parent / "unreadable" / str(step)
                shutil.rmtree(aside, ignore_errors=True)
                aside.parent.mkdir(exist_ok=True)
                (self.directory / str(step)).rename(aside)

        if broken:
            from_first(move)
            self._manager.reload()


def _report(step: int, words: str) -> None:
    reason = words.splitlines()[0][:200] if words else "no reason given"
    print(f"checkpoint {step} cannot be read: {reason}", file=sys.stderr)
