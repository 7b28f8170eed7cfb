"""Evaluation over the held-out split, and previews."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from varjax.training.experiment import Loader
from varjax.training.feed import place
from varjax.training.metrics import flatten
from varjax.training.sharding import over_batch, replicated
from varjax.training.task import Batch, PyTree, Task, TrainState


class Evaluator:
    """`metrics` and `preview` of a task on a mesh, each compiled once, at its first use."""

    def __init__(self, task: Task, loader: Loader, frozen: PyTree, mesh: Mesh):
        self._task, self._loader, self._frozen, self._mesh = task, loader, frozen, mesh
        self._step = jax.jit(task.eval_step, out_shardings=replicated(mesh))
        self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
        self._preview = jax.jit(task.preview, out_shardings=replicated(mesh))

    def metrics(self, state: TrainState, stop: Callable[[], bool]) -> dict[str, float] | None:
        """eval/NAME for the parameters and, where there is one, eval_ema/NAME for the average.

        None as soon as `stop`, asked before each batch, says so.
        """
        found = {}
        for kind, params in _kinds(state).items():
            sums = self._sums(dataclasses.replace(state, params=params), stop)
            if sums is None:
                return None
            metrics = flatten(self._task.eval_metrics(jax.device_get(sums)))
            found |= {f"{kind}/{name}": x for name, x in metrics.items()}
        return found

    def names(self, state: TrainState) -> list[str]:
        """Those that `metrics` gives; of `state` only shapes are needed."""
        sums = jax.eval_shape(self._step, state, self._frozen, self._first_batch())
        ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), sums)  # not 0: they may divide
        names = flatten(self._task.eval_metrics(ones))
        return [f"{kind}/{name}" for kind in _kinds(state) for name in names]

    def preview(self, state: TrainState) -> dict[str, np.ndarray]:
        """Images by name from the first held-out batch, by the average where there is one."""
        if state.ema is not None:
            state = dataclasses.replace(state, params=state.ema)
        return jax.device_get(self._preview(state, self._frozen, self._first_batch()))

    def _first_batch(self) -> Batch:
        return place(self._loader.held_out_batch(0), over_batch(self._mesh))

    def _sums(self, state: TrainState, stop: Callable[[], bool]) -> PyTree:
        sums = None
        for batch in self._loader.held_out():
            if stop():
                return None
            part = self._step(state, self._frozen, place(batch, over_batch(self._mesh)))
            sums = part if sums is None else self._add(sums, part)
        assert sums is not None, "the held-out split is empty"
        return sums


def _kinds(state: TrainState) -> dict[str, PyTree]:
    """The parameters to evaluate, by the first part of their metrics' names."""
    return {"eval": state.params} | ({} if state.ema is None else {"eval_ema": state.ema})
