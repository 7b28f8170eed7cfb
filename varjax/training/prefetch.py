"""Copies batches to the devices ahead of the steps that use them."""

import collections
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from varjax.training.sharding import batch_sharding, rows_of_process
from varjax.training.task import Batch

PREFETCHED_BATCHES = 2


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh, size: int) -> Batch:
    """Copies a batch to the devices, its rows spread over them.

    Args:
        batch: arrays whose first axis is the `rows_of_process` of this process.
        mesh: mesh of all devices of all processes.
        size: number of rows of the whole batch, over all processes.
    """
    mine_N = rows_of_process(mesh, size)

    def put(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(size)  # a device's rows are contiguous
            first = np.searchsorted(mine_N, start)
            return x[first : first + stop - start]

        return jax.make_array_from_callback((size, *x.shape[1:]), batch_sharding(mesh), part)

    return {name: put(x) for name, x in batch.items()}


class Prefetcher:
    """Yields batches on the devices, copied while earlier ones are processed.

    batches = Prefetcher(loader.train(0), mesh, batch_size)
    state, metrics = train_step(state, frozen, next(batches), key)
    """

    def __init__(self, batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, size: int):
        self._batches, self._mesh, self._size = batches, mesh, size
        self._ahead: collections.deque[Batch] = collections.deque()

    def __next__(self) -> Batch:
        while len(self._ahead) <= PREFETCHED_BATCHES:
            self._ahead.append(put_batch(next(self._batches), self._mesh, self._size))
        return self._ahead.popleft()
