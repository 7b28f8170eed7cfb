import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.helpers.paths import ROOT
from varjax.training.optimizer import AdamW, LRSchedule
from varjax.training.task import Plan

GOLDEN = np.load(ROOT / "tests" / "golden" / "functions.npz")
PLAN = Plan(steps=1000, batch_size=512)
OPTIMIZER = AdamW(base_lr=1.5e-4, weight_decay=0.05, weight_decay_end=0.08, warmup=0.02)


@pytest.mark.parametrize("name", ["cos", "lin", "lin0", "lin00", "lin0.5", "exp"])
def test_schedules_equal_the_reference(name):
    optimizer = dataclasses.replace(OPTIMIZER, schedule=name)
    steps, (lr, wd) = GOLDEN["schedule.steps"], GOLDEN[f"schedule.{name}"].T
    np.testing.assert_allclose(optimizer.lr(steps, PLAN), lr, rtol=1e-12)
    np.testing.assert_allclose(optimizer.wd(steps, PLAN), wd, rtol=1e-12)
    both = jax.jit(lambda s: (optimizer.lr(s, PLAN), optimizer.wd(s, PLAN)))
    jitted_lr, jitted_wd = both(jnp.asarray(steps, jnp.int32))
    np.testing.assert_allclose(jitted_lr, lr, rtol=1e-5, atol=3e-10)
    np.testing.assert_allclose(jitted_wd, wd, rtol=1e-6)


@pytest.mark.parametrize("name", typing.get_args(LRSchedule))
def test_schedules_keep_their_last_value_after_the_plan(name):
    """A discriminator that began before a fork to a longer run makes more updates than planned."""
    optimizer = dataclasses.replace(OPTIMIZER, schedule=name)
    for schedule in (optimizer.lr, optimizer.wd):
        last, *later = schedule(np.array([999, 1000, 1500, 9999]), Plan(1000))
        assert later == [last] * 3 and last > 0
        in_jax = jax.jit(lambda s, f=schedule: f(s, Plan(1000)))(jnp.int32(9999))
        np.testing.assert_allclose(in_jax, last, rtol=1e-5)


def test_constant_stays_at_the_peak_and_short_runs_are_finite():
    optimizer = dataclasses.replace(OPTIMIZER, schedule="constant", warmup=0.0)
    assert set(optimizer.lr(np.arange(1000), PLAN)) == {3e-4}
    assert np.isfinite(OPTIMIZER.lr(0, Plan(1))) and np.isfinite(OPTIMIZER.wd(0, Plan(1)))


@jax.numpy_dtype_promotion("standard")
def test_an_update_is_adamw_with_clipping_and_masked_weight_decay():
    """From zero moments, Adam's first direction is g / (|g| + eps), with the clipped gradient g."""
    optimizer = AdamW(
        base_lr=0.1, eps=0.5, weight_decay=0.2, clip=1.0, schedule="constant", warmup=0
    )
    plan = Plan(steps=10, batch_size=256)
    params = {"kernel": jnp.array([3.0]), "bias": jnp.array([5.0])}
    grads = {"kernel": jnp.array([6.0]), "bias": jnp.array([8.0])}
    tx = optimizer.make(plan)
    updates, _ = tx.update(grads, tx.init(params), params)
    clipped = {"kernel": 0.6, "bias": 0.8}
    direction = {name: g / (g + 0.5) for name, g in clipped.items()}
    np.testing.assert_allclose(
        updates["kernel"], [-0.1 * (direction["kernel"] + 0.2 * 3)], rtol=1e-6
    )
    np.testing.assert_allclose(updates["bias"], [-0.1 * direction["bias"]], rtol=1e-6)


@jax.numpy_dtype_promotion("standard")
def test_each_update_has_the_learning_rate_of_its_number():
    optimizer = AdamW(weight_decay=0.0, clip=0.0, warmup=0.5, eps=0.0)
    plan, params = Plan(steps=8), {"w": jnp.ones(1)}
    tx = optimizer.make(plan, decayed="w")
    state = tx.init(params)
    for step in range(4):
        updates, state = tx.update({"w": jnp.ones(1)}, state, params)
        rate = -float(optax.tree.sum(updates))
        np.testing.assert_allclose(rate, optimizer.lr(step, plan), rtol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"base_lr": 0.0},
        {"warmup": 1.0},
        {"b1": 1.0},
        {"b2": -0.1},
        {"clip": -1.0},
        {"eps": -1e-8},
        {"weight_decay": -0.1},
        {"weight_decay_end": -0.1},
        {"warmup_start": -5.0},
        {"end": 2.0},
        {"end": 0.0, "schedule": "exp"},
    ],
)
def test_invalid_settings_are_refused(changes):
    (name, value), *_ = changes.items()
    with pytest.raises(ValueError, match=f"{name}={value}: must be"):
        AdamW(**changes)
