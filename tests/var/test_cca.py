"""Condition contrastive alignment: its loss, its training step, and a fine-tuned run."""

import dataclasses
import functools
import shutil

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varjax
from tests.helpers import runs
from varjax.checkpoints.weights import restore_weights
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.models import read_model, read_tokenizer
from varjax.storage import files
from varjax.training import loop
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW
from varjax.training.sharding import shardings
from varjax.training.task import Plan
from varjax.training.train_step import create_state
from varjax.var.cca import CCAConfig, cca_loss, read_reference_params
from varjax.var.model import VAR
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask
from varjax.var.teacher_forcing import targets_and_inputs
from varjax.weight_files import convert_run

CCA = CCAConfig(reference="random", negative_weight=5.0, beta=1.0)
TASK = VARTask(
    runs.VAR, runs.TOKENIZER, "random", AdamW(schedule="constant", warmup=0.0), class_dropout=0.0,
    ema_decay=0.5, sampling=VAROptions(guidance=1.0), cca=CCA,
)  # fmt: skip
BATCH = Digits().make(8, seed=0).train_batch(0)


def numpy_loss(own_B, other_B, dropped_B, equal_B, config):
    """Computes the authors' loss and its derivatives with respect to both log-ratios."""

    def log_sigmoid(x):
        return -np.logaddexp(0, -x)

    counts_B = dropped_B | equal_B
    weight_B = np.where(counts_B, 1.0, config.negative_weight)
    sign_B = np.where(counts_B, 1.0, -1.0)
    scale, beta = max(config.negative_weight, 1.0) * len(own_B), config.beta
    loss_B = -log_sigmoid(beta * own_B) - weight_B * log_sigmoid(sign_B * beta * other_B)
    own_slope_B = -beta / (1 + np.exp(beta * own_B))
    other_slope_B = -weight_B * sign_B * beta / (1 + np.exp(sign_B * beta * other_B))
    return loss_B.sum() / scale, own_slope_B / scale, other_slope_B / scale


@pytest.mark.parametrize("negative_weight", [50.0, 0.5])
def test_the_loss_and_its_gradient_match_numpy(negative_weight):
    config = CCAConfig("", negative_weight)
    rng = np.random.default_rng(0)
    ratio_B2 = rng.normal(scale=40, size=(8, 2)).astype(np.float32)
    dropped_B, equal_B = (np.arange(8) % n == 0 for n in (3, 4))
    expected, own_B, other_B = numpy_loss(*ratio_B2.T, dropped_B, equal_B, config)
    matches_B = jnp.asarray(dropped_B | equal_B)
    loss, slope_B2 = jax.value_and_grad(cca_loss)(jnp.asarray(ratio_B2), matches_B, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(slope_B2, np.stack([own_B, other_B], 1), rtol=1e-4, atol=1e-9)


def test_invalid_settings_are_refused():
    for field, value in (("negative_weight", 0.0), ("beta", -1.0)):
        with pytest.raises(InputError, match=f"{field}={value}: must be above 0"):
            dataclasses.replace(CCA, **{field: value})
    with pytest.raises(InputError, match="label_smoothing=0.1: must be 0 with cca"):
        dataclasses.replace(TASK, label_smoothing=0.1)


def test_the_frozen_copy_is_sharded_like_the_trained_weights():
    mesh = jax.sharding.AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    params = jax.eval_shape(runs.VAR.init, jax.random.key(0))
    copy = shardings({"tokenizer": {}, "reference": params}, mesh)["reference"]
    chex.assert_trees_all_equal(copy, shardings(params, mesh))
    assert not all(s.is_fully_replicated for s in jax.tree.leaves(copy))


def drawn(seed):
    """Draws parameters with logits of order 1, so that log-ratios of two draws are, too."""
    return jax.tree.map(lambda x: 8 * x, runs.VAR.init(jax.random.key(seed)))


@pytest.fixture(scope="module")
def frozen():
    return {"tokenizer": read_tokenizer(runs.tokenizer())[1], "reference": jax.jit(drawn)(1)}


@pytest.fixture(scope="module")
def state():
    return create_state(jax.jit(drawn)(0), TASK.optimizer, TASK.ema_decay)


@pytest.mark.slow
def test_the_gradient_of_the_task_follows_the_chain_rule(frozen, state):
    """Computes the log-probabilities with the network itself, one label at a time."""
    label_B = np.array([3, 3, 5, 7], np.int32)
    other_B = np.array([3, 5, 7, 10], np.int32)
    batch = {"image_BHWC": BATCH["image_BHWC"][:4], "label_B": label_B, "other_label_B": other_B}
    tokens_BL, input_BlZ = targets_and_inputs(runs.TOKENIZER, frozen["tokenizer"], batch)
    model = VAR(runs.VAR)

    @jax.jit
    def log_probability_2B(params):
        logits_2BLV = jnp.concatenate(
            [model.apply({"params": params}, input_BlZ, label) for label in (label_B, other_B)]
        )
        tokens_2BL1 = jnp.tile(tokens_BL, (2, 1))[..., None]
        return jnp.take_along_axis(jax.nn.log_softmax(logits_2BLV), tokens_2BL1, 2).sum((1, 2))

    trained_2B, reference_2B = map(log_probability_2B, (state.params, frozen["reference"]))
    own_B, other_B = np.split(np.asarray(trained_2B - reference_2B), 2)
    equal_B = np.array([True, False, False, False])
    loss, *slopes = numpy_loss(own_B, other_B, equal_B & False, equal_B, CCA)
    (expected,) = jax.vjp(log_probability_2B, state.params)[1](
        jnp.asarray(np.concatenate(slopes), jnp.float32)
    )
    found, means = jax.jit(jax.grad(TASK.contrast, has_aux=True))(state.params, frozen, batch)
    np.testing.assert_allclose(means["cca/loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(means["cca/log_ratio"], own_B.mean(), atol=1e-4)
    np.testing.assert_allclose(means["cca/other_log_ratio"], other_B.mean(), atol=1e-4)
    chex.assert_trees_all_close(found, expected, rtol=1e-3, atol=1e-5)


def test_other_labels_come_from_the_next_image_and_are_dropped_together():
    task = dataclasses.replace(TASK, class_dropout=0.5)
    drawn = task.with_draws(BATCH, jax.random.key(0))
    label_B, next_B = BATCH["label_B"], np.roll(BATCH["label_B"], -1)
    dropped_B = np.asarray(drawn["label_B"]) == runs.VAR.classes
    assert 0 < dropped_B.sum() < 8
    np.testing.assert_array_equal(drawn["label_B"], np.where(dropped_B, 10, label_B))
    np.testing.assert_array_equal(drawn["other_label_B"], np.where(dropped_B, 10, next_B))


@pytest.mark.slow
def test_accumulation_changes_only_rounding_and_drop_path_affects_both_models(frozen, state):
    frozen = frozen | {"reference": state.params}
    after = []
    for accumulate in (1, 2):
        changes = dict(drop_path=0.5, class_dropout=0.5, accumulate=accumulate)
        step = functools.partial(dataclasses.replace(TASK, **changes).train_step, plan=Plan())
        after.append(jax.jit(step)(state, frozen, BATCH, jax.random.key(0)))
    chex.assert_trees_all_close(after[0][0].params, after[1][0].params, atol=1e-6)
    for name, value in after[0][1].items():
        np.testing.assert_allclose(after[1][1][name], value, rtol=1e-3, atol=1e-5, err_msg=name)
    assert abs(after[0][1]["cca/log_ratio"]) > 1e-3  # equal weights, but different dropped paths


@pytest.mark.slow
def test_a_reference_of_another_config_is_refused():
    start = str(runs.var())
    chex.assert_trees_all_equal(read_reference_params(start, runs.VAR), read_model(start)[2])
    with pytest.raises(InputError, match="different model .*\n  heads: 2 there, 4 in this run"):
        read_reference_params(start, dataclasses.replace(runs.VAR, heads=4))
    with pytest.raises(InputError, match="nowhere does not exist"):
        read_reference_params("nowhere", runs.VAR)


@pytest.mark.slow
def test_a_fine_tuned_run_resumes_without_its_start_and_loads_as_var(tmp_path):
    def train(name, start):
        cca = dataclasses.replace(CCA, reference=start)
        task = dataclasses.replace(TASK, cca=cca, tokenizer_weights=start)
        run = tmp_path / name
        settings = dict(batch_size=8, steps=2, save_every=1, init_from=start)
        loop.train(Experiment(task, Digits(), str(run), **settings))
        return run

    whole, run = (train(name, str(runs.var())) for name in ("whole", "run"))
    shutil.rmtree(run / "checkpoints/2")
    train("run", "nowhere")
    chex.assert_trees_all_equal(*map(restore_weights, (whole, run)))
    kept = files.read_tensors(run / "frozen.safetensors")[0]
    chex.assert_trees_all_equal(kept["reference"], read_model(runs.var())[2])

    convert_run(run, tmp_path / "converted")
    for location in (run, tmp_path / "converted"):
        model = varjax.load(location)
        assert model.sampling.guidance == 1
        chex.assert_trees_all_equal(model.params["var"], restore_weights(run))
        chex.assert_trees_all_equal(model.params["tokenizer"], read_tokenizer(runs.var())[1])
