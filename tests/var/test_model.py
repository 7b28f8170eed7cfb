import dataclasses
import functools
import json
import zlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import weights
from tests.helpers import golden_cases as golden
from tests.helpers.random_params import random_params
from varjax import trees
from varjax.convert.apply_map import to_official
from varjax.nn.compute import ComputeConfig
from varjax.nn.transformer import drop_path
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan
from varjax.training.train_step import create_state
from varjax.var.model import VAR, VARConfig, check_fit
from varjax.var.task import VARTask

SMALL = VARConfig(depth=2, width=16, heads=2, classes=3, scales=(1, 2, 3), vocab=7, code_channels=4)


@functools.cache
def small_params(config=SMALL):
    """Draws weights so large that every block matters, unlike at initialization."""
    return {"params": random_params(config.init, std=0.3)}


INPUT_BlZ = np.random.default_rng(2).normal(size=(2, 13, 4)).astype(np.float32)
LABEL_B = np.array([2, 0])


def test_shapes_of_a_large_model_need_neither_its_mask_nor_its_weights():
    wide = dataclasses.replace(SMALL, width=2**18, heads=2, scales=(1, 255))
    shapes = jax.eval_shape(wide.init, jax.random.key(0))
    assert shapes["pos_embed"].shape == (1 + 255**2, 2**18)
    assert shapes["blocks"]["adaln"]["linear"]["kernel"].shape == (2, 2**18, 6 * 2**18)


@pytest.mark.parametrize("name", golden.CASES)
def test_teacher_forced_logits_match_reference(name):
    _, config = golden.configs(name)
    expected = golden.outputs(name)
    logits_BLV = jax.jit(VAR(config).apply)(
        {"params": golden.var_params(name)}, expected["teacher_forcing_input"], expected["label"]
    )
    np.testing.assert_allclose(logits_BLV, expected["logits"], rtol=0, atol=2e-4)


def official_arrays(config, params):
    """Returns (official name, array) of every tensor."""
    return [(name, np.asarray(tensor)) for name, tensor in to_official(config, params).items()]


def golden_task(name, **changes) -> VARTask:
    tokenizer, config = golden.configs(name)
    # The golden step used a learning rate of 1e-3 for a batch of 256, and no schedule.
    optimizer = AdamW(base_lr=1e-3, clip=0.5, schedule="constant", warmup=0.0)
    task = VARTask(config, tokenizer, "", optimizer, class_dropout=0.0)
    return dataclasses.replace(task, **changes)


def golden_batch(name):
    # The images are not read, because `_feed_golden_tokens` replaces the encoder.
    return {"image_BHWC": None, "label_B": golden.outputs(name)["label"].astype(np.int32)}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["base", "shared_aln", "no_qk_norm", "phi_per_scale"])
def test_loss_gradients_and_one_step_match_reference(name, monkeypatch):
    expected = golden.outputs(name)
    task = golden_task(name)
    _feed_golden_tokens(monkeypatch, expected)
    params = golden.var_params(name)

    def loss_fn(params):
        losses = task.token_losses(params, {}, golden_batch(name))
        return jnp.mean(losses.cross_entropy_BL)

    loss, grads = jax.jit(jax.value_and_grad(loss_fn))(params)
    np.testing.assert_allclose(loss, expected["train.loss"], rtol=1e-5)
    for official, grad in official_arrays(task.model, grads):
        norm = expected[f"grad_norm.{official}"]
        np.testing.assert_allclose(np.linalg.norm(grad), norm, rtol=2e-4, atol=1e-6)
        rng = np.random.RandomState(zlib.crc32(f"probe/{official}".encode()))
        probe = np.sum(grad * rng.standard_normal(grad.shape).astype(np.float32))
        np.testing.assert_allclose(
            probe, expected[f"grad_probe.{official}"], rtol=2e-4, atol=2e-4 * max(norm, 1)
        )

    @jax.jit
    def step(params, batch):
        state = create_state(params, task.optimizer)
        return task.train_step(state, {}, batch, jax.random.key(0), Plan(batch_size=256))

    state, metrics = step(params, golden_batch(name))
    np.testing.assert_allclose(metrics["grad_norm"], expected["train.grad_norm"], rtol=1e-4)
    for official, parameter in official_arrays(task.model, state.params):
        flat = parameter.ravel()
        np.testing.assert_allclose(
            flat[:: max(1, flat.size // 64)],
            expected[f"after_one_step.{official}"].ravel(),
            atol=2e-4,
        )


@pytest.mark.slow
def test_label_smoothing_matches_pytorch(monkeypatch):
    expected = golden.outputs("base")
    _feed_golden_tokens(monkeypatch, expected)
    task = golden_task("base", label_smoothing=0.1)
    losses = jax.jit(task.token_losses)(golden.var_params("base"), {}, golden_batch("base"))
    np.testing.assert_allclose(
        np.mean(losses.objective_BL), expected["train.loss_label_smoothing_0.1"], rtol=1e-5
    )


def _feed_golden_tokens(monkeypatch, expected):
    tokens_BL = jnp.asarray(expected["tokens"], jnp.int32)
    taught = tokens_BL, jnp.asarray(expected["teacher_forcing_input"])
    monkeypatch.setattr("varjax.var.teacher_forcing.targets_and_inputs", lambda *_: taught)


@pytest.mark.slow
def test_weight_decay_applies_where_the_reference_applies_it():
    case = weights.case("base")
    task = golden_task("base")
    params = golden.var_params("base")
    no_grads = jax.tree.map(np.zeros_like, params)
    tx = task.optimizer.make(Plan(batch_size=256))
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = jax.jit(lambda g, p: tx.update(g, tx.init(p), p))(no_grads, params)
    for official, update in official_arrays(task.model, updates):
        assert np.any(update != 0) == (official not in case["no_weight_decay"]), official


@pytest.mark.slow
def test_initialization_matches_statistics_of_the_reference():
    expected = json.loads((weights.HERE / "init_d16.json").read_text())
    config = VARConfig.preset("d16")
    abstract = jax.eval_shape(config.init, jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(abstract)) == 310_283_520
    # Drawing 310 million numbers takes longer than compiling, so XLA optimizes as usual.
    optimized = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
    params = jax.jit(config.init, compiler_options=optimized)(jax.random.key(0))
    rows = {}
    for name, tensor in official_arrays(config, params):
        if name.endswith("ada_lin.1.weight") and name.startswith("blocks"):
            gates, rest = np.split(tensor, [2 * config.width])
            rows |= {f"{name} rows gamma": gates, f"{name} rows scale,shift": rest}
        else:
            rows[name] = tensor
    for name, statistics in expected.items():
        found = rows[name]
        error = 5 * statistics["std"] / found.size**0.5
        assert abs(found.mean() - statistics["mean"]) <= 2 * error + 1e-12, name
        assert abs(found.std() - statistics["std"]) <= error + 1e-12, name


@jax.jit
@jax.grad
def gradient_of_chosen_logits(input_BlZ, chosen_L):
    logits_BLV = VAR(SMALL).apply(small_params(), input_BlZ, LABEL_B)
    return jnp.sum(logits_BLV * chosen_L[None, :, None])


@pytest.mark.slow
@pytest.mark.parametrize("k", range(3))
def test_later_scales_do_not_affect_earlier_logits(k):
    tokens, chosen_L = SMALL.pyramid.slices[k], np.zeros(SMALL.pyramid.length, np.float32)
    chosen_L[tokens] = 1
    grad_BlZ = np.asarray(gradient_of_chosen_logits(INPUT_BlZ, chosen_L))
    end = tokens.stop - 1  # the first token has no input
    assert np.all(grad_BlZ[:, end:] == 0)
    assert end == 0 or np.all(np.any(grad_BlZ[:, :end] != 0, axis=(0, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("cosine", [False, True])
def test_cached_logits_by_scale_match_teacher_forcing(shared, cosine):
    config = dataclasses.replace(SMALL, shared_adaln=shared, cosine_attention=cosine)

    @jax.jit
    def both(params):
        model = VAR(config).bind(params)
        cond, cache, logits = model.condition(LABEL_B), model.empty_cache(len(LABEL_B)), []
        for k, scale in enumerate(config.pyramid.slices):
            input_BlZ = None if k == 0 else INPUT_BlZ[:, scale.start - 1 : scale.stop - 1]
            logits_BlV, cache = model.predict(input_BlZ, cond, k, cache)
            logits.append(logits_BlV)
        return jnp.concatenate(logits, axis=1), model(INPUT_BlZ, LABEL_B)

    by_scale_BLV, together_BLV = both(small_params(config))
    np.testing.assert_allclose(by_scale_BLV, together_BLV, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("way", "trace"),
    [
        ({"unroll": True}, "unroll=2"),
        ({"remat": "block"}, "remat"),
        ({"remat": "dots"}, "remat"),
        ({"attention_impl": "loop"}, "scan["),  # a second loop, over images
    ],
)
def test_compute_settings_do_not_change_loss_and_gradients(way, trace):
    plain = ComputeConfig(attention_impl="xla")
    (before, expected), (after, found) = (
        traced_and_computed(compute) for compute in (plain, dataclasses.replace(plain, **way))
    )
    assert after.count(trace) > before.count(trace)
    for path, leaf in trees.paths(expected).items():
        np.testing.assert_allclose(trees.paths(found)[path], leaf, rtol=1e-4, atol=1e-6)


@functools.cache
def traced_and_computed(compute):
    """Returns the trace of a loss and its gradients as text, and their values."""
    branch_scale_S2B = drop_path(jax.random.key(3), SMALL.depth, 2, 0.5)

    def total(params):
        logits_BLV = VAR(SMALL, compute).apply(params, INPUT_BlZ, LABEL_B, branch_scale_S2B)
        return jnp.mean(jnp.square(logits_BLV))

    traced = jax.jit(jax.value_and_grad(total)).trace(small_params())
    return str(traced.jaxpr), jax.device_get(traced.lower().compile()(small_params()))


@pytest.mark.slow
def test_bfloat16_stays_close_and_gives_float32_logits():
    expected, found = (
        jax.jit(VAR(SMALL, ComputeConfig(dtype=dtype)).apply)(small_params(), INPUT_BlZ, LABEL_B)
        for dtype in ("float32", "bfloat16")
    )
    assert found.dtype == jnp.float32
    assert 0 < np.max(np.abs(found - expected)) < 0.1 * np.std(expected)


def test_drop_path_rescales_kept_branches_and_never_drops_the_first_layer():
    branch_scale_S2B = drop_path(jax.random.key(0), 3, 4000, 0.4)
    np.testing.assert_array_equal(branch_scale_S2B[0], 1)
    np.testing.assert_allclose(np.unique(branch_scale_S2B[2]), [0, 1 / 0.6], rtol=1e-6)
    np.testing.assert_allclose(branch_scale_S2B[2].mean(), 1, atol=0.05)
    assert drop_path(jax.random.key(0), 3, 4, 0.0) is None


@pytest.mark.slow
def test_dropping_branches_affects_only_their_image():
    logits = jax.jit(VAR(SMALL).apply)
    branch_scale_S2B = np.ones((2, 2, 2), np.float32)
    branch_scale_S2B[:, :, 0] = 0
    dropped, kept = logits(small_params(), INPUT_BlZ, LABEL_B, branch_scale_S2B)
    _, full = logits(small_params(), INPUT_BlZ, LABEL_B)
    np.testing.assert_allclose(kept, full, atol=1e-5)
    # With all branches dropped, the blocks are the identity, so no token affects another.
    moved_BlZ = INPUT_BlZ.copy()
    moved_BlZ[:, 0] += 1
    other, _ = logits(small_params(), moved_BlZ, LABEL_B, branch_scale_S2B)
    np.testing.assert_array_equal(other[2:], dropped[2:])


def test_invalid_sizes_are_refused():
    with pytest.raises(ValueError, match="width=15 is not a multiple of heads=2"):
        dataclasses.replace(SMALL, width=15)
    with pytest.raises(ValueError, match="d16, d20, d24, d30, d36"):
        VARConfig.preset("d17")
    tokenizer, config = golden.configs("base")
    with pytest.raises(ValueError, match="(?s)scales.*vocab"):
        check_fit(tokenizer, dataclasses.replace(config, scales=(1, 2), vocab=5))
