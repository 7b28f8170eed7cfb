"""Tests `model.pure`, and that other methods point to it under JAX's transformations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varjax
from tests.helpers import runs
from varjax.errors import InputError
from varjax.var.sample import VAROptions

LABELS = jnp.array([3, 1], jnp.int32)
IMAGE = np.zeros((1, 8, 8, 1), np.uint8)
KEYS = varjax.image_keys(5, jnp.arange(2))


@functools.cache
def model():
    return varjax.load(runs.untrained_var())


@pytest.mark.slow
def test_a_mesh_set_by_the_caller_changes_nothing():
    tokens_BL = np.zeros((1, 21), np.int32)
    images = model().decode(tokens_BL)
    with jax.set_mesh(jax.make_mesh((1,), ("x",))):
        np.testing.assert_array_equal(model().decode(tokens_BL), images)


@pytest.mark.parametrize(
    "call",
    [
        lambda x: model().sample(x),
        lambda x: model().sample([1], seed=x[0]),
        lambda x: model().decode(jnp.zeros((1, 21), jnp.int32) + x[0]),
        lambda x: model().encode(jnp.ones((1, 8, 8, 1)) * x[0].astype(jnp.float32)),
        lambda x: model().logits(jnp.zeros((1, 21), jnp.int32), x),
        lambda x: model().edit(IMAGE, jnp.zeros((4, 4), bool) | (x[0] > 0)),
    ],
)
def test_methods_called_while_tracing_point_to_the_pure_functions(call):
    with pytest.raises(InputError, match="inside jit, grad, vmap.*model.pure"):
        jax.jit(call)(jnp.array([1], jnp.int32))


def test_options_are_checked_while_tracing():
    assert model().pure.sampling == VAROptions(guidance=1.5, top_k=7)
    with pytest.raises(InputError, match="guidence"):
        model().pure.sample(model().params, LABELS, KEYS, guidence=2)
