"""Evaluates a task on the held-out split, and makes previews."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from varjax.data.loader import Loader
from varjax.runtime.distributed import on_all_processes
from varjax.runtime.first_call import FirstCall
from varjax.training.metric_writers import flatten_metrics
from varjax.training.previews import PREVIEW_IMAGES
from varjax.training.sharding import on_mesh, put_batch, replicated
from varjax.training.task import Batch, Task, TrainState, evaluated_parameters
from varjax.training.train_step import sum_over_microbatches
from varjax.trees import PyTree


class Evaluator:
    """Computes a task's metrics and previews over held-out batches, each compiled at its first use.

    A batch is split into as many microbatches as in training (`Task.accumulate`), so that it needs
    no more memory than training does.

        evaluator = Evaluator(task, loader, frozen, mesh, batch_size)
        metrics = evaluator.metrics(state)  # {"eval/loss": …, "eval_ema/loss": …}

    Args:
        task: task that defines the computations.
        loader: loader of the held-out batches.
        frozen: the task's pretrained weights, on the mesh.
        mesh: mesh of all devices.
        batch_size: rows of a batch, over all processes.
        compiling: function of a computation's name that makes a context for its first use.
    """

    def __init__(
        self,
        task: Task,
        loader: Loader,
        frozen: PyTree,
        mesh: Mesh,
        batch_size: int,
        compiling: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    ):
        self._task, self._loader, self._frozen = task, loader, frozen
        self._mesh, self._batch_size = mesh, batch_size
        everywhere = replicated(mesh)

        def step(state: TrainState, frozen: PyTree, batch: Batch) -> PyTree:
            sums = functools.partial(task.eval_step, state, frozen)
            return sum_over_microbatches(sums, batch, task.accumulate)

        self._step = jax.jit(on_mesh(step, mesh), out_shardings=everywhere)
        self._add = jax.jit(lambda a, b: jax.tree.map(jnp.add, a, b))
        preview = jax.jit(on_mesh(task.preview, mesh), out_shardings=everywhere)
        self._run_step = FirstCall(self._step, lambda: compiling("the evaluation"))
        self._run_preview = FirstCall(preview, lambda: compiling("the previews"))

    def metrics(
        self, state: TrainState, stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float] | None:
        """Computes metrics over all held-out images, for any batch size and number of processes.

        Args:
            state: train state to evaluate.
            stop: function asked before each batch; once it returns True, the evaluation ends.

        Returns:
            "eval/NAME" for the parameters and "eval_ema/NAME" for the EMA, if there is one.
            None if the evaluation was stopped.
        """
        sums: dict[str, PyTree] = {}
        for batch in self._loader.held_out():
            if stop():
                return None
            placed, before = self._place(batch), sums
            sums = {}
            for kind, params in evaluated_parameters(state).items():
                part = self._run_step(
                    dataclasses.replace(state, params=params), self._frozen, placed
                )
                sums[kind] = self._add(before[kind], part) if before else part
            jax.block_until_ready(before)  # otherwise all batches could accumulate on the devices
        assert sums, "the held-out split is empty"
        results = {}
        for kind, total in jax.device_get(sums).items():
            metrics = flatten_metrics(self._task.eval_metrics(total))
            results |= {f"{kind}/{name}": x for name, x in metrics.items()}
        return results

    def compile(self, state: TrainState) -> Any:
        """Compiles the evaluation of a batch and returns the program; `state` may be shapes."""
        return self._step.lower(state, self._frozen, self._first_batch()).compile()

    def metric_names(self, state: TrainState) -> list[str]:
        """Returns the names of the metrics; `state` may be shapes."""
        sums = jax.eval_shape(self._step, state, self._frozen, self._first_batch())
        ones = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), sums)  # not 0: they may divide
        names = flatten_metrics(self._task.eval_metrics(ones))
        return [f"{kind}/{name}" for kind in evaluated_parameters(state) for name in names]

    def preview(self, state: TrainState) -> dict[str, np.ndarray]:
        """Returns previews of some held-out images by name, from the EMA if there is one.

        Raises OSError (StorageError) in all processes if one of them cannot read the batch.
        """
        if state.ema is not None:
            state = dataclasses.replace(state, params=state.ema)
        batch: dict[str, np.ndarray] = {}
        # All processes must have the batch, or those that have it would wait forever.
        on_all_processes(lambda: batch.update(self._loader.held_out_spread(PREVIEW_IMAGES)))
        return jax.device_get(self._run_preview(state, self._frozen, self._place(batch)))

    def _first_batch(self) -> Batch:
        return self._place(self._loader.held_out_batch(0))

    def _place(self, batch: Mapping[str, np.ndarray]) -> Batch:
        return put_batch(batch, self._mesh, self._batch_size)
