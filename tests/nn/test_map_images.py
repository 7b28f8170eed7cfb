"""Encoding and decoding batches in pieces."""

import jax.numpy as jnp
import numpy as np
import pytest

from varjax.nn.autoencoder import map_images
from varjax.nn.compute import ComputeConfig


@pytest.mark.parametrize(
    ("rows", "sizes"), [(48, [16]), (24, [12]), (16, [16]), (17, [17]), (3, [3]), (34, [34])]
)
def test_splitting_batches_into_equal_pieces_does_not_change_the_result(rows, sizes):
    seen = []

    def function(x):
        seen.append(len(x))
        return x * 2 + jnp.arange(3.0)[None]

    x = jnp.arange(rows * 3.0).reshape(rows, 3)
    y = map_images(function, x, (64, 64, 3), ComputeConfig(platform="tpu"))
    np.testing.assert_array_equal(y, np.asarray(x) * 2 + np.arange(3))
    assert seen == sizes


def test_cpus_process_large_images_one_by_one():
    seen = []

    def function(x):
        seen.append(len(x))
        return x

    for shape in ((64, 64, 3), (32, 32, 3)):
        map_images(function, jnp.ones((20, 2)), shape, ComputeConfig(platform="cpu"))
    assert seen == [1, 20]
