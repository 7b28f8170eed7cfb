from types import SimpleNamespace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from varjax.training import train_step
from varjax.training.task import Plan, TrainState

PARAMS = {"w": jnp.array([[0.3, -0.2], [0.1, 0.4], [-0.5, 0.2]]), "b": jnp.zeros(2)}


def batch(size):
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "x_BZ": jax.random.normal(keys[0], (size, 3)),
        "y_BV": jax.random.normal(keys[1], (size, 2)),
        "weight_B": jax.random.uniform(keys[2], (size,)),  # drawn for the whole batch
    }


def loss_fn(params, batch):
    y_BV = jnp.tanh(batch["x_BZ"] @ params["w"] + params["b"][None])
    loss = jnp.mean(batch["weight_B"][:, None] * jnp.square(y_BV - batch["y_BV"]))
    return loss, {"loss": loss, "by_output": jnp.mean(jnp.abs(y_BV), axis=0)}


@pytest.mark.slow
@pytest.mark.parametrize("accumulate", [2, 3, 12])
def test_accumulation_does_not_change_gradients_or_metrics(accumulate):
    whole = train_step.accumulated_gradients(loss_fn, PARAMS, batch(12))
    parts = jax.jit(lambda p, b: train_step.accumulated_gradients(loss_fn, p, b, accumulate))(
        PARAMS, batch(12)
    )
    chex.assert_trees_all_close(parts, whole, rtol=1e-5, atol=1e-7)
    assert parts[1]["by_output"].shape == (2,)


def test_unequal_microbatches_are_refused():
    with pytest.raises(ValueError, match="batch of 12 cannot be split into 5 equal"):
        train_step.accumulated_gradients(loss_fn, PARAMS, batch(12), accumulate=5)


def test_apply_gradients_updates_params_ema_and_step_and_reports_norms():
    tx = optax.sgd(0.5)
    sgd: Any = SimpleNamespace(
        make=lambda plan, decayed: tx, updates=lambda opt_state: 3, lr=lambda step, plan: 0.5
    )
    state = TrainState(jnp.int32(3), PARAMS, jax.tree.map(jnp.zeros_like, PARAMS), tx.init(PARAMS))
    grads = {"w": jnp.ones((3, 2)), "b": jnp.full(2, 2.0)}
    after, norms = train_step.apply_gradients(state, grads, sgd, Plan(), ema_decay=0.9)
    assert after.step == 4
    np.testing.assert_allclose(after.params["b"], [-1, -1])
    np.testing.assert_allclose(after.ema["b"], [-0.1, -0.1], rtol=1e-6)
    np.testing.assert_allclose(norms["grad_norm"], np.sqrt(6 + 8), rtol=1e-6)
    np.testing.assert_allclose(norms["update_norm"], np.sqrt(6 + 8) / 2, rtol=1e-6)
    assert train_step.apply_gradients(state.replace(ema=None), grads, sgd, Plan())[0].ema is None
