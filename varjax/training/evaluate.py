"""Evaluation over the held-out split, and previews."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from varjax.training.experiment import Loader
from varjax.training.feed import place
from varjax.training.metrics import flatten
from varjax.training.sharding import over_batch, replicated
from varjax.training.task import PyTree, Task, TrainState


class Evaluator:
    """`metrics` and `preview` of a task on a mesh, each compiled once, at its first use."""

    def __init__(self, task: Task, loader: Loader, frozen: PyTree, mesh: Mesh):
        self._task, self._loader, self._frozen, self._mesh = task, loader, frozen, mesh
        self._step = jax.jit(task.eval_step, out_shardings=replicated(mesh))
        self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
        self._preview = jax.jit(task.preview, out_shardings=replicated(mesh))

    def metrics(self, state: TrainState) -> dict[str, float]:
        """eval/NAME for the parameters and, where there is one, eval_ema/NAME for the average."""
        found = {f"eval/{name}": x for name, x in self._pass(state).items()}
        if state.ema is not None:
            average = self._pass(dataclasses.replace(state, params=state.ema))
            found |= {f"eval_ema/{name}": x for name, x in average.items()}
        return found

    def preview(self, state: TrainState, key: jax.Array) -> dict[str, np.ndarray]:
        """Images by name from the first held-out batch, by the average where there is one."""
        if state.ema is not None:
            state = dataclasses.replace(state, params=state.ema)
        batch = place(next(self._loader.held_out()), over_batch(self._mesh))
        return jax.device_get(self._preview(state, self._frozen, batch, key))

    def _pass(self, state: TrainState) -> dict[str, float]:
        sums = None
        for batch in self._loader.held_out():
            part = self._step(state, self._frozen, place(batch, over_batch(self._mesh)))
            sums = part if sums is None else self._add(sums, part)
        assert sums is not None, "the held-out split is empty"
        return flatten(self._task.eval_metrics(jax.device_get(sums)))
