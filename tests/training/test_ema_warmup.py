"""Tests the warm-up of the EMA decay, in every task and over a restart."""

import dataclasses
import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import adversarial, runs, tiny
from varjax.mar.task import MARTask
from varjax.tokenizers.kl.task import KLTask
from varjax.training import loop, train_step
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan
from varjax.var.task import VARTask

DECAY = 0.99
TASKS = {
    "VAR": VARTask(runs.VAR, runs.TOKENIZER, "random"),
    "MAR": MARTask(runs.MAR, runs.KL, "random", sampling=runs.MAR_SAMPLING),
    "VQ": adversarial.TASK,
    "KL": KLTask(runs.KL),
}


@pytest.mark.parametrize(
    ("updates", "decay"), [(0, 0.1), (8, 0.5), (890, 0.99), (891, 0.99), (10**6, 0.99)]
)
def test_the_decay_rises_to_ema_decay(updates, decay):
    found = train_step.warmed_up_decay(DECAY, jnp.int32(updates))
    np.testing.assert_allclose(found, decay, rtol=1e-6)


def test_a_warmed_up_ema_soon_forgets_the_initial_parameters():
    optimizer = AdamW(base_lr=1.0, schedule="constant", warmup=0.0)
    state = train_step.create_state({"w": jnp.ones(3)}, optimizer, DECAY)
    update = functools.partial(
        train_step.apply_gradients,
        grads={"w": jnp.arange(3.0)},
        optimizer=optimizer,
        plan=Plan(),
        ema_decay=DECAY,
        ema_warmup=True,
    )
    expected = np.ones(3)
    for updates in range(3):
        state, _ = jax.jit(update)(state)
        decay = (1 + updates) / (10 + updates)
        expected = decay * expected + (1 - decay) * np.asarray(state.params["w"])
    np.testing.assert_allclose(state.ema["w"], expected, rtol=1e-6)


@pytest.mark.parametrize("name", TASKS)
def test_ema_warmup_is_off_by_default_and_works_in_every_task(name, monkeypatch):
    """Only traces the step, which is enough to see which decay it asks for."""
    task = TASKS[name]
    assert not task.ema_warmup
    task = dataclasses.replace(task, ema_decay=DECAY, ema_warmup=True)
    asked = []

    def recorded(decay, step):
        asked.append(decay)
        return jnp.float32(decay)

    monkeypatch.setattr(train_step, "warmed_up_decay", recorded)
    key = jax.random.key(0)
    state = jax.eval_shape(task.init, key)
    tokenizer = task.tokenizer if name in ("VAR", "MAR") else task.model
    frozen = jax.eval_shape(tokenizer.init, key) if name in ("VAR", "MAR") else {}
    batch = {
        "image_BHWC": jax.ShapeDtypeStruct((4, *tokenizer.image_shape), jnp.uint8),
        "label_B": jax.ShapeDtypeStruct((4,), jnp.int32),
    }
    step = functools.partial(task.train_step, plan=Plan())
    after, _ = jax.eval_shape(step, state, frozen, batch, key)
    assert asked == [DECAY]
    chex.assert_trees_all_equal_shapes_and_dtypes(after.ema, state.ema)


def test_an_interrupted_run_ends_with_the_same_ema(tmp_path):
    settings = dict(steps=6, save_every=3, eval_every=0, ema_decay=DECAY, ema_warmup=True)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    loop.train(tiny.experiment(whole, **settings))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "6")
    loop.train(tiny.experiment(cut, **settings))
    (step, average), (_, params) = (tiny.weights(cut, ema) for ema in (True, False))
    assert step == 6
    chex.assert_trees_all_equal(average, tiny.weights(whole, True)[1])
    assert not np.array_equal(average["down"]["kernel"], params["down"]["kernel"])
