import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import runs
from varjax.data.sources import Digits
from varjax.training.optimizer import AdamW
from varjax.var.task import VARTask

TASK = VARTask(runs.VAR, runs.TOKENIZER, "", AdamW(schedule="constant", warmup=0.0))
BATCH = Digits().make(8, seed=0).train_batch(0)


@pytest.fixture(scope="module")
def frozen():
    return dataclasses.replace(TASK, tokenizer_weights=str(runs.tokenizer())).frozen()


@pytest.fixture(scope="module")
def state():
    return jax.jit(TASK.init)(jax.random.key(0))


def test_evaluation_does_not_depend_on_the_batch_size_and_drops_no_class(frozen, state):
    task = dataclasses.replace(TASK, class_dropout=1.0, drop_path=0.9)
    step, metrics = jax.jit(task.eval_step), []
    for size in (8, 5):
        totals = None
        for start in range(0, 8, size):
            rows = np.arange(start, start + size)
            batch = {name: array[np.minimum(rows, 7)] for name, array in BATCH.items()}
            sums = jax.device_get(step(state, frozen, batch | {"valid_B": rows < 8}))
            totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
        metrics.append(task.eval_metrics(totals))
    for name in metrics[0]:
        np.testing.assert_allclose(metrics[1][name], metrics[0][name], rtol=1e-5)
    loss_BL, correct_BL, _ = TASK.token_losses(state.params, frozen, BATCH)
    np.testing.assert_allclose(metrics[0]["loss"], loss_BL.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["accuracy"], correct_BL.mean(), atol=1e-6)
    np.testing.assert_allclose(metrics[0]["loss_last"], loss_BL[:, 5:].mean(), rtol=1e-5)


def test_class_dropout_replaces_labels_by_no_class_in_training(frozen, state):
    def loss(task, label_B):
        _, metrics = jax.jit(task.train_step)(
            state, frozen, BATCH | {"label_B": label_B}, jax.random.key(0)
        )
        return metrics["loss"]

    always, never = (dataclasses.replace(TASK, class_dropout=p) for p in (1.0, 0.0))
    no_class_B = np.full(8, runs.VAR.classes, np.int32)
    np.testing.assert_allclose(loss(always, BATCH["label_B"]), loss(never, no_class_B), rtol=1e-6)
    assert loss(never, BATCH["label_B"]) != loss(never, no_class_B)


def test_the_first_loss_is_that_of_guessing(frozen, state):
    loss_BL, _, _ = TASK.token_losses(state.params, frozen, BATCH)
    np.testing.assert_allclose(loss_BL.mean(), np.log(runs.VAR.vocab), atol=0.01)


def test_a_step_trains_everything_but_the_tokenizer(frozen, state):
    task = dataclasses.replace(TASK, drop_path=0.1, class_dropout=0.5, accumulate=2)
    before = jax.tree.map(np.array, frozen)
    after, _ = jax.jit(task.train_step)(state, frozen, BATCH, jax.random.key(0))
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), after.params, state.params)
    assert not any(jax.tree.leaves(same)), same
    assert after.step == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, frozen))


def test_another_tokenizer_than_the_config_s_is_refused():
    other = dataclasses.replace(runs.TOKENIZER, width=16)
    task = dataclasses.replace(TASK, tokenizer=other, tokenizer_weights=str(runs.tokenizer()))
    with pytest.raises(ValueError, match="width: 8 there, 16 here"):
        task.frozen()
    with pytest.raises(ValueError, match="nowhere"):
        dataclasses.replace(TASK, tokenizer_weights="nowhere").frozen()


def test_previews_are_samples(frozen, state):
    images = jax.jit(TASK.preview)(state, frozen, BATCH)["samples"]
    assert images.shape == (16, 8, 8, 1) and 0 <= images.min() < images.max() <= 1
