import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import runs
from varjax.config import config_tree
from varjax.data.sources import Digits
from varjax.nn.autoencoder import to_model_range
from varjax.nn.compute import ComputeConfig
from varjax.runtime import flops
from varjax.tokenizers.vq.model import VQConfig, decode_features, quantize_images
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask

pytestmark = pytest.mark.slow

TASK = VARTask(runs.VAR, runs.TOKENIZER, "", AdamW(schedule="constant", warmup=0.0))
BATCH = Digits().make(8, seed=0).train_batch(0)


@pytest.mark.parametrize("guidance", [[1, 2, 3], np.array([1, 2, 3]), lambda k: k + 1])
def test_sampling_options_by_scale_survive_a_round_trip_through_json(guidance):
    options = VAROptions(guidance=guidance, top_k=[9, 5, 1])
    sampling = dataclasses.replace(TASK, sampling=options).sampling
    assert sampling == VAROptions(guidance=(1, 2, 3), top_k=(9, 5, 1))
    data = json.loads(json.dumps(config_tree.to_dict(sampling)))
    assert config_tree.from_dict(VAROptions, data) == sampling


@pytest.fixture(scope="module")
def frozen():
    return dataclasses.replace(TASK, tokenizer_weights=str(runs.tokenizer())).frozen()


@pytest.fixture(scope="module")
def state():
    return jax.jit(TASK.init)(jax.random.key(0))


def test_evaluation_does_not_depend_on_batch_size_and_drops_nothing(frozen, state):
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
    losses = TASK.token_losses(state.params, frozen, BATCH)
    np.testing.assert_allclose(metrics[0]["loss"], losses.cross_entropy_BL.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics[0]["accuracy"], losses.correct_BL.mean(), atol=1e-6)
    last_Bl = losses.cross_entropy_BL[:, 5:]
    np.testing.assert_allclose(metrics[0]["loss_last"], last_Bl.mean(), rtol=1e-5)
    perplexity_K = metrics[0]["perplexity_at_scale"]
    np.testing.assert_allclose(perplexity_K[-1], np.exp(last_Bl.mean()), rtol=1e-5)
    # Codes of the last scale, counted by NumPy.
    _, counts = np.unique(losses.tokens_BL[:, 5:], return_counts=True)
    p = counts / counts.sum()
    found = metrics[0]["code_perplexity_at_scale"][-1], metrics[0]["code_usage_at_scale"][-1]
    np.testing.assert_allclose(found, (np.exp(-np.sum(p * np.log(p))), len(p) / 16), rtol=1e-5)


def test_class_dropout_replaces_labels_by_no_class(frozen, state):
    def loss(task, label_B):
        step = jax.jit(functools.partial(task.train_step, plan=Plan()))
        _, metrics = step(state, frozen, BATCH | {"label_B": label_B}, jax.random.key(0))
        return metrics["loss"]

    always, never = (dataclasses.replace(TASK, class_dropout=p) for p in (1.0, 0.0))
    no_class_B = np.full(8, runs.VAR.classes, np.int32)
    np.testing.assert_allclose(loss(always, BATCH["label_B"]), loss(never, no_class_B), rtol=1e-6)
    assert loss(never, BATCH["label_B"]) != loss(never, no_class_B)


def test_the_initial_loss_is_that_of_uniform_guessing(frozen, state):
    loss_BL = TASK.token_losses(state.params, frozen, BATCH).cross_entropy_BL
    np.testing.assert_allclose(loss_BL.mean(), np.log(runs.VAR.vocab), atol=0.01)


def test_a_step_trains_everything_but_the_tokenizer(frozen, state):
    task = dataclasses.replace(TASK, drop_path=0.1, class_dropout=0.5, accumulate=2)
    before = jax.tree.map(np.array, frozen)
    step = jax.jit(functools.partial(task.train_step, plan=Plan()))
    after, _ = step(state, frozen, BATCH, jax.random.key(0))
    same = jax.tree.map(lambda a, b: bool(jnp.all(a == b)), after.params, state.params)
    assert not any(jax.tree.leaves(same)), same
    assert after.step == 1
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.array, frozen))


def test_weights_of_another_tokenizer_are_refused():
    other = dataclasses.replace(runs.TOKENIZER, width=16)
    task = dataclasses.replace(TASK, tokenizer=other, tokenizer_weights=str(runs.tokenizer()))
    with pytest.raises(ValueError, match="width: 8 there, 16 expected"):
        task.frozen()
    with pytest.raises(ValueError, match="nowhere"):
        dataclasses.replace(TASK, tokenizer_weights="nowhere").frozen()


def test_previews_show_samples_and_reconstructions(frozen, state):
    pictures = jax.jit(TASK.preview)(state, frozen, BATCH)
    images = pictures["samples"]
    assert images.shape == (16, 8, 8, 1) and 0 <= images.min() < images.max() <= 1
    real_BHWC, again_BHWC = pictures["reconstructions"]
    np.testing.assert_allclose(real_BHWC, BATCH["image_BHWC"] / 255, atol=1e-6)
    x_BHWC = to_model_range(BATCH["image_BHWC"])
    f_hats = quantize_images(runs.TOKENIZER, frozen, x_BHWC).f_hats
    decoded_BHWC = decode_features(runs.TOKENIZER, frozen, f_hats[-1])
    np.testing.assert_allclose(again_BHWC, (decoded_BHWC + 1) / 2, atol=1e-5)


def test_previews_without_their_guidance_are_refused_at_once():
    with pytest.raises(ValueError, match="guidance_to=1, guidance_schedule=linear: guidance is 1"):
        dataclasses.replace(TASK, sampling=VAROptions(guidance=2.0, guidance_to=1))


def test_data_that_does_not_fit_the_model_is_refused():
    task = dataclasses.replace(TASK, accumulate=3)
    task.check((8, 8, 1), 10)
    with pytest.raises(ValueError, match="data has 7 classes, but the model 10; set task.model.c"):
        task.check((8, 8, 1), 7)
    with pytest.raises(ValueError, match=r"images are \(8, 9, 1\), .* takes \(8, 8, 1\)"):
        task.check((8, 9, 1), 10)


def test_train_flops_do_not_count_recomputation(frozen, state):
    def flop(**changes):
        task = dataclasses.replace(TASK, compute=ComputeConfig(**changes))
        return flops.count(task.train_step, state, frozen, BATCH, jax.random.key(0), Plan())

    model = TASK.train_flops(state, frozen, BATCH)
    assert (
        model
        == flop(remat="none", attention_impl="xla")
        < flop(remat="block", attention_impl="xla")
    )
    again = dataclasses.replace(TASK, compute=ComputeConfig(remat="block"))
    assert again.train_flops(state, frozen, BATCH) == model


def test_a_random_tokenizer_is_announced(monkeypatch, capsys):
    monkeypatch.setattr(VQConfig, "init", lambda config, key: {"x": jnp.ones(3)})
    assert dataclasses.replace(TASK, tokenizer_weights="random").frozen()["x"].shape == (3,)
    assert "tokenizer is RANDOM" in capsys.readouterr().err
