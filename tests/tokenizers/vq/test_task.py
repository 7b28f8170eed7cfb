import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tokenizers.vq.test_model import small_config
from varjax import trees
from varjax.nn.autoencoder import to_model_range
from varjax.tokenizers.vq.task import VQTask
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan

CONFIG = small_config()
TASK = VQTask(CONFIG, AdamW(base_lr=2e-3, schedule="constant", warmup=0.0), ema_decay=0.5)
IMAGE_BHWC = np.random.default_rng(0).integers(0, 256, (6, *CONFIG.image_shape), dtype=np.uint8)
BATCH, KEY = {"image_BHWC": IMAGE_BHWC}, jax.random.key(1)


@pytest.fixture(scope="module")
def state():
    return jax.jit(TASK.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def train_step():
    """Returns a training step that is compiled once for all tests with its settings."""
    return jax.jit(functools.partial(TASK.train_step, plan=Plan()))


def evaluate(state, batch_size):
    """Returns the metrics of the six images in batches, the last one padded with copies."""
    totals, step = None, jax.jit(TASK.eval_step)
    for start in range(0, 6, batch_size):
        rows = np.arange(start, start + batch_size)
        batch = {"image_BHWC": IMAGE_BHWC[np.minimum(rows, 5)], "valid_B": rows < 6}
        sums = jax.device_get(step(state, {}, batch))
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    return TASK.eval_metrics(totals)


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_batch_size(state):
    expected, found = evaluate(state, 6), evaluate(state, 4)
    assert expected.keys() == found.keys() >= {"loss", "l1", "l2", "quantizer", "psnr", "usage"}
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_usage_and_perplexity_follow_from_code_counts():
    counts = np.array([[4.0, 4.0, 0.0, 0.0], [8.0, 0.0, 0.0, 0.0]])
    sums = {"images": 2.0, "codes_KV": counts, "psnr": 40.0}
    metrics = TASK.eval_metrics(sums)
    np.testing.assert_allclose(metrics["perplexity"], [2, 1])
    np.testing.assert_allclose(metrics["usage"], [0.5, 0.25])
    np.testing.assert_allclose(metrics["psnr"], 20)


@pytest.mark.slow
def test_loss_is_the_weighted_sum_of_its_terms(state):
    task = dataclasses.replace(TASK, l1=0.3, l2=0.7)
    losses, _ = jax.jit(task.losses)(state.params, {}, IMAGE_BHWC)
    expected = 0.3 * losses["l1"] + 0.7 * losses["l2"] + losses["quantizer"]
    np.testing.assert_allclose(losses["loss"], expected, rtol=1e-5)


@pytest.mark.slow
def test_accumulation_changes_only_rounding(state, train_step):
    _, expected = train_step(state, {}, BATCH, KEY)
    task = dataclasses.replace(TASK, accumulate=3)
    _, found = jax.jit(functools.partial(task.train_step, plan=Plan()))(state, {}, BATCH, KEY)
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, err_msg=name)


@pytest.mark.slow
def test_training_reduces_the_loss_and_updates_every_parameter(state, train_step):
    first, losses = state, []  # constant learning rate, so the plan's length does not matter
    for _ in range(40):
        state, metrics = train_step(state, {}, BATCH, KEY)
        losses.append(float(metrics["l2"]))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    moved = trees.paths(
        jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, first.params)
    )
    assert all(moved.values()), [path for path, m in moved.items() if not m]


@pytest.mark.slow
def test_ema_follows_the_parameters_with_its_decay(state, train_step):
    after, _ = train_step(state, {}, BATCH, KEY)
    halfway = jax.tree.map(lambda a, b: (a + b) / 2, state.params, after.params)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), after.ema, halfway)


@pytest.mark.parametrize("field, value", [("ema_decay", 1.5), ("l1", -1.0), ("beta", -0.1)])
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(ValueError, match=field):
        dataclasses.replace(TASK, **{field: value})


@pytest.mark.parametrize("value, expected", [(0, -1.0), (255, 1.0)])
def test_uint8_images_are_mapped_to_minus_one_to_one(value, expected):
    assert to_model_range(jnp.full((1,), value, jnp.uint8))[0] == expected


def test_previews_show_the_images_and_then_every_scale(state):
    rows = jax.jit(TASK.preview)(state, {}, BATCH)["reconstructions"]
    assert rows.shape == (1 + len(CONFIG.scales), 6, *CONFIG.image_shape)
    np.testing.assert_allclose(rows[0], IMAGE_BHWC / 255, atol=1e-6)
