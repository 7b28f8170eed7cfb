"""Batches on their way from the host to the devices."""

import collections
import time
from collections.abc import Iterator, Mapping

import jax
import numpy as np

from varjax.training.task import Batch

DEPTH = 2


def place(batch: Mapping[str, np.ndarray], sharding: jax.sharding.Sharding) -> Batch:
    """A global batch on the devices, of which `batch` holds this process's rows."""
    return {k: jax.make_array_from_process_local_data(sharding, x) for k, x in batch.items()}


class Feed:
    """Batches on the devices, two ahead of what is consumed.

    `waited` are the seconds spent waiting for the host.
    """

    def __init__(
        self, batches: Iterator[Mapping[str, np.ndarray]], sharding: jax.sharding.Sharding
    ):
        self._batches, self._sharding = batches, sharding
        self._ahead: collections.deque[Batch] = collections.deque()
        self.waited = 0.0

    def __next__(self) -> Batch:
        begin = time.monotonic()
        while len(self._ahead) <= DEPTH:
            self._ahead.append(place(next(self._batches), self._sharding))
        self.waited += time.monotonic() - begin
        return self._ahead.popleft()
