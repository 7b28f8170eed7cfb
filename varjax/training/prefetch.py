"""Batches on their way from the host to the devices."""

import collections
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from varjax.training.sharding import over_batch, rows_of_process
from varjax.training.task import Batch

DEPTH = 2


def place(batch: Mapping[str, np.ndarray], mesh: Mesh, size: int) -> Batch:
    """A batch of `size` on the devices, of which `batch` holds the `rows_of_process`."""
    first = rows_of_process(mesh, size).start

    def put(x: np.ndarray) -> jax.Array:
        def part(index: Any) -> np.ndarray:
            start, stop, _ = index[0].indices(size)
            return x[start - first : stop - first]

        return jax.make_array_from_callback((size, *x.shape[1:]), over_batch(mesh), part)

    return {name: put(x) for name, x in batch.items()}


class Feed:
    """Batches of `size` on the devices, two ahead of what is consumed.

    `waited` are the seconds spent waiting for the host.
    """

    def __init__(self, batches: Iterator[Mapping[str, np.ndarray]], mesh: Mesh, size: int):
        self._batches, self._mesh, self._size = batches, mesh, size
        self._ahead: collections.deque[Batch] = collections.deque()
        self.waited = 0.0

    def __next__(self) -> Batch:
        begin = time.monotonic()
        while len(self._ahead) <= DEPTH:
            self._ahead.append(place(next(self._batches), self._mesh, self._size))
        self.waited += time.monotonic() - begin
        return self._ahead.popleft()
