"""The weights that a run starts from: pretrained parameters, another run's state, frozen networks.

A run keeps its own copy of frozen weights, <run>/frozen.safetensors. <run>/frozen.json keeps the
copy's digest, so that only the same weights can replace a damaged or missing copy.
"""

import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from varjax import trees
from varjax.checkpoints.saved_steps import SavedSteps
from varjax.checkpoints.weights import split_step
from varjax.config import config_tree
from varjax.errors import DamagedFileError, InputError, MismatchError, StorageError
from varjax.runtime.distributed import check_shared_file, on_first_process
from varjax.runtime.messages import say
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.training.checkpoint import read_state
from varjax.training.experiment import Experiment
from varjax.training.task import MatchingRows, Task, TrainState
from varjax.trees import PyTree

MIN_SHARED_FRACTION = (
    0.01  # of all numbers; with less, it is another model of which only biases fit
)


def warm_start_state(
    task: Task, init_from: str, key: jax.Array, placement: TrainState
) -> TrainState:
    """Makes the state before the first step, with those parameters of `init_from` that fit.

    A parameter with the same path and shape is copied whole. Where the task names matching rows,
    only those are copied. Everything else is initialized as usual. The average starts from the
    result. Process 0 prints what was copied and what was not.

    Args:
        task: task that defines the parameters (`init`) and those to take over (`pretrained`).
        init_from: run or converted directory; "" for none.
        key: random key for `task.init`.
        placement: a sharding for each array of the state.

    Raises:
        InputError: almost no parameter fits; raised before any computation.
    """
    init = jax.jit(task.init, out_shardings=placement)
    if not init_from:
        return init(key)
    params, rows = task.pretrained(init_from)
    source = _PretrainedParameters(init_from, trees.paths(params), rows)
    report = source.report(jax.eval_shape(task.init, key).params)
    if jax.process_index() == 0:
        say(report)
    state = init(key)
    return state.replace(
        params=trees.map_with_path(source.take, state.params),
        ema=trees.map_with_path(source.take, state.ema),
    )


def forked_state(fork_from: str, abstract: TrainState, placement: TrainState) -> TrainState:
    """Reads the whole state of another run, to continue it with other settings.

    Its step number continues, and so does the learning rate's schedule, over this run's length.

    Args:
        fork_from: RUN for its last checkpoint, RUN@STEP for another one; RUN may contain @.
        abstract: shapes and dtypes of the state.
        placement: a sharding for each array of the state.

    Raises:
        InputError: no such run or step, another model or optimizer, or damaged files.
    """
    run, number = on_first_process(lambda: split_step(fork_from))
    saved = SavedSteps(as_path(run) / "checkpoints")

    def read(step: int) -> tuple[int, TrainState]:
        try:
            return step, read_state(saved, step, abstract, placement)[0]
        except (MismatchError, DamagedFileError) as error:
            raise type(error)(
                f"fork_from={fork_from}: step {step} cannot be read as the state of this run: its "
                f"optimizer differs, or files are damaged ({str(error)[:500]}). init_from "
                "takes its parameters alone"
            ) from error

    def list_steps() -> list[int]:
        return on_first_process(saved.steps)  # the other run may still be training

    if number is not None:
        steps = list_steps()
        if number not in steps:
            raise InputError(f"fork_from={fork_from}: {run} has checkpoints of steps {steps}")
        step, state = read(number)
    elif (newest := saved.newest(read, list_steps)) is None:
        raise InputError(f"fork_from={fork_from}: {run} has no checkpoint; give RUN or RUN@STEP")
    else:
        step, state = newest
    if jax.process_index() == 0:
        say(f"continuing from step {step} of {run}")
    return state


class _PretrainedParameters:
    """Holds parameters by path, and the rows that match where whole parameters do not."""

    def __init__(self, location: str, leaves: dict[str, Any], rows: MatchingRows):
        self._location, self._leaves, self._rows = location, leaves, rows

    def report(self, params: PyTree) -> str:
        """Summarizes what is copied, with a line for each parameter that is not copied whole."""
        wanted = trees.paths(params)
        kept, whole, lines = 0, 0, []
        for path, leaf in wanted.items():
            taken = self._taken(path, leaf)
            if taken is True:
                kept, whole = kept + leaf.size, whole + 1
                continue
            source = self._leaves.get(path)
            origin = "not there" if source is None else f"there {tuple(source.shape)}"
            count = len(taken[0]) if taken else 0
            kept += count * math.prod(leaf.shape[1:])
            what = f"{count} of {leaf.shape[0]} rows kept" if count else "new"
            lines.append(f"  {what}: {path} {tuple(leaf.shape)}, {origin}")
        lines += [
            f"  not used: {path} {tuple(leaf.shape)}"
            for path, leaf in self._leaves.items()
            if path not in wanted
        ]
        fraction = kept / max(sum(leaf.size for leaf in wanted.values()), 1)
        if fraction < MIN_SHARED_FRACTION:
            raise InputError(
                f"init_from: {self._location} holds another model; almost no parameter fits:\n"
                + "\n".join(lines)
            )
        summary = f"{whole} of {len(wanted)} parameters whole, {fraction:.2%} of all numbers"
        return "\n".join([f"starting from {self._location}: kept {summary}", *lines])

    def take(self, path: str, fresh: jax.Array) -> jax.Array:
        """Returns `fresh` with everything that fits copied into it, on its devices."""
        if not (taken := self._taken(path, fresh)):
            return fresh
        source = np.asarray(self._leaves[path], fresh.dtype)
        if taken is True:  # each device reads its own part
            return jax.make_array_from_callback(fresh.shape, fresh.sharding, lambda i: source[i])
        here_rows, there_rows = (np.array(rows) for rows in taken)
        put = jax.jit(lambda x, new: x.at[here_rows].set(new), out_shardings=fresh.sharding)
        return put(fresh, source[there_rows])

    def _taken(self, path: str, leaf: Any) -> Any:
        """Returns True if a leaf fits whole, (rows here, rows there) if in part, or None."""
        source = self._leaves.get(path)
        if source is None:
            return None
        if path in self._rows:
            fits = self._rows[path][0] and source.shape[1:] == leaf.shape[1:]
            return self._rows[path] if fits else None
        return True if source.shape == leaf.shape else None


def frozen_weights(read: Callable[[], PyTree], run_dir: pathlib.Path, bound: bool = True) -> PyTree:
    """Reads the run's own copy of the task's pretrained weights, which the first process makes.

    A damaged copy is made again if the weights that it comes from are still the same.

    Args:
        read: function that reads the weights to copy.
        run_dir: directory of the run.
        bound: whether the run has a checkpoint. Before its first one, the copy is replaced if the
            weights have changed, as do those of a tokenizer that is trained further.

    Raises:
        InputError: the copy is damaged and cannot be made again.
        StorageError: the copy cannot be read or written now.
    """
    path = run_dir / "frozen.safetensors"
    if not bound:
        on_first_process(lambda: _remove_outdated(read, path))
    if not on_first_process(lambda: _copy(read, path)):
        return {}
    check_shared_file(path)
    return files.read_tensors(path)[0]


def own_frozen_weights(run_dir: pathlib.Path) -> PyTree | None:
    """Reads the run's own copy of the task's pretrained weights; None if there is no intact one."""
    try:
        return files.read_tensors(run_dir / "frozen.safetensors")[0]
    except StorageError:
        raise
    except InputError:
        return None


def first_frozen_weights(experiment: Experiment) -> PyTree:
    """Reads the frozen weights of a run that has no copy yet.

    These are the weights that the settings name. With `fork_from`, they are that run's copy if it
    names the same ones: its state was trained with them, and they may have changed since, as does a
    tokenizer that is trained further.

    Raises InputError as the task's `frozen` does.
    """
    forked = _forked_frozen_weights(experiment) if experiment.fork_from else None
    return experiment.task.frozen() if forked is None else forked


def _forked_frozen_weights(experiment: Experiment) -> PyTree | None:
    """Reads the copy of `fork_from`; None if it names other weights or has no intact copy."""
    run = as_path(split_step(experiment.fork_from)[0])
    try:
        before = files.read_json(run / "config.json")["task"]
        if _frozen_settings(before) != _frozen_settings(config_tree.to_dict(experiment.task)):
            return None
    except StorageError:
        raise
    except (InputError, KeyError, TypeError):  # reading its state says what is wrong
        return None
    return own_frozen_weights(run)


def _frozen_settings(task: Mapping[str, Any]) -> dict[str, Any]:
    """Returns those of a task's settings that say which weights are frozen, and where they are."""
    settings = {name: task.get(name) for name in ("tokenizer", "tokenizer_weights")}
    settings["perceptual"] = (task.get("perceptual") or {}).get("weights")
    return settings | {"cca": (task.get("cca") or {}).get("reference")}


def _remove_outdated(read: Callable[[], PyTree], path: pathlib.Path) -> None:
    """Removes a copy of weights that have changed since, or that is damaged."""
    if not files.exists(path) and not files.exists(path.with_suffix(".json")):
        return
    try:
        digest = trees.digest(read())
    except (InputError, OSError):  # the weights are gone; the copy is as good
        return
    if digest != _digest_before(path):
        files.remove(path.with_suffix(".json"))
        files.remove(path)


def _copy(read: Callable[[], PyTree], path: pathlib.Path) -> bool:
    """Makes the copy if it is missing or damaged; returns whether the task has such weights."""
    problem = ""
    if files.exists(path):
        try:
            files.read_tensors(path)
            return True
        except StorageError:
            raise
        except InputError as error:
            problem = str(error)
            say(f"{problem}\ncopying these weights again")
    before = _digest_before(path)
    advice = (
        "restore the file from a copy, or the weights it came from (--config.task.tokenizer_weights"
        " says where they are now)"
    )
    try:
        tree = read()
    except InputError as error:
        if problem or before:
            raise InputError(f"{problem or f'{path} is missing'}; {error}; {advice}") from error
        raise
    if not jax.tree.leaves(tree):
        return False
    digest = trees.digest(tree)
    if digest != (before or digest) or (problem and not before):
        raise InputError(
            f"{problem or f'{path} is missing'}; the weights to copy are "
            f"{'different now' if before else 'not known to be the same'}: {advice}"
        )
    files.write_tensors(path, tree, {})
    files.write_json(path.with_suffix(".json"), {"digest": digest})
    return True


def _digest_before(path: pathlib.Path) -> str:
    """Returns the digest of the weights that were copied; "" if it is unknown."""
    try:
        return str(files.read_json(path.with_suffix(".json"))["digest"])
    except StorageError:
        raise
    except (InputError, KeyError, TypeError):
        return ""
