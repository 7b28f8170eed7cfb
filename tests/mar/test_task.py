"""MAR's task: loss and optimizer step against the reference, accumulation, and evaluation."""

import dataclasses
import functools
import json
import re
import zlib

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import weights
from tests.helpers.random_params import random_params
from tests.mar import golden
from varjax import trees
from varjax.config import config_tree
from varjax.convert import apply_map
from varjax.errors import InputError
from varjax.mar.heads import CategoricalHead, DiffusionHead, DiffusionNoise
from varjax.mar.losses import LossDraws, content_keys, masked_mean, token_losses
from varjax.mar.model import MARConfig
from varjax.mar.pipeline import MARPipeline
from varjax.mar.sample import MAROptions
from varjax.mar.task import MAR_DECAYED, MARTask, matching_mar_rows
from varjax.nn.compute import ComputeConfig
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan
from varjax.training.train_step import create_state

KL = KLConfig(
    image_size=8, image_channels=1, width=8, channel_mult=(1, 2), blocks=1, groups=4,
    latent_channels=3,
)  # fmt: skip
VQ = VQConfig(
    scales=(4,), image_channels=1, width=8, channel_mult=(1, 2), blocks=1, groups=4, vocab=7,
    code_channels=4,
)  # fmt: skip
MODEL = MARConfig(
    width=24, encoder_depth=1, decoder_depth=2, encoder_heads=2, decoder_heads=2,
    head=DiffusionHead(channels=3, depth=1, width=16), classes=10, latent_map=(4, 4), buffer_size=2,
)  # fmt: skip
FAST = MAROptions(guidance=1.5, steps=2, diffusion_steps="3", clip_denoised=3.0)
TASK = MARTask(
    MODEL, KL, "random", AdamW(base_lr=1e-2, schedule="constant", clip=3.0), ema_decay=0.5,
    sampling=FAST,
)  # fmt: skip
DISCRETE = dataclasses.replace(
    TASK, model=dataclasses.replace(MODEL, head=CategoricalHead(7)), tokenizer=VQ
)
CAUSAL = dataclasses.replace(TASK, model=dataclasses.replace(MODEL, causal=True))
KEY = jax.random.key(3)


def batch(rows=8):
    rng = np.random.default_rng(0)
    return {
        "image_BHWC": rng.integers(0, 256, (rows, 8, 8, 1), np.uint8),
        "label_B": rng.integers(0, 10, rows).astype(np.int32),
    }


@functools.cache
def frozen(tokenizer):
    return random_params(tokenizer.init)


@functools.cache
def start(task):
    """Makes a state in which every parameter has a gradient; an initial head outputs only 0."""
    params = random_params(task.model.init)
    return jax.jit(lambda params: create_state(params, task.optimizer, task.ema_decay))(params)


def official_draws(case):
    """Returns the masks, timesteps and noise of the official loss."""
    shape = 2, case.config.length, 1
    noise = DiffusionNoise(
        timestep_BLU=jnp.asarray(case.out["loss.t"].astype(np.int32).reshape(shape)),
        noise_BLUZ=jnp.asarray(case.out["loss.noise"].reshape(*shape, -1)),
    )
    return LossDraws(
        order_BL=jnp.asarray(case.out["orders"][:, ::-1].astype(np.int32)),
        known_B=jnp.full(2, case.known),
        noise=noise,
    )


def official_loss(case, params):
    token_BLZ = jnp.asarray(case.config.patchify(case.latents_BhwZ))
    labels, draws = jnp.asarray(case.label_B), official_draws(case)
    losses = token_losses(case.config, params, token_BLZ, labels, draws, case.known + 1)
    return masked_mean(losses.loss_BLU[..., 0], losses.masked_BL)


@functools.cache
def official_grads(name):
    case = golden.case(name)
    return jax.jit(jax.value_and_grad(functools.partial(official_loss, case)))(case.params)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
def test_loss_and_gradients_match_reference(name):
    case = golden.case(name)
    loss, grads = official_grads(name)
    assert loss == pytest.approx(float(case.out["loss.masked_mean"]), rel=1e-4)
    official = apply_map.to_official(case.config, jax.device_get(grads))
    for key in case.out:
        if not key.startswith("grad_norm."):
            continue
        tensor = key.removeprefix("grad_norm.")
        grad = np.asarray(official[tensor])
        norm = float(case.out[key])
        assert np.linalg.norm(grad) == pytest.approx(norm, rel=1e-3), tensor
        rng = np.random.RandomState(zlib.crc32(f"probe/{tensor}".encode()))
        probe = np.sum(grad * rng.standard_normal(grad.shape).astype(np.float32))
        scale = norm * grad.size**0.5
        assert abs(probe - float(case.out[f"grad_probe.{tensor}"])) < 1e-4 * scale, tensor


@pytest.mark.slow
def test_optimizer_step_matches_reference():
    case, about = golden.case("mar_base"), weights.case("mar_base_step")
    out = weights.outputs("mar_base_step")
    (b1, b2), lr = about["betas"], about["lr"]
    optimizer = AdamW(
        base_lr=lr, b1=b1, b2=b2, eps=about["eps"], weight_decay=about["weight_decay"],
        clip=about["clip"], schedule="constant", warmup=0.0,
    )  # fmt: skip
    task = dataclasses.replace(TASK, optimizer=optimizer)

    @jax.jit
    def step(params, grads):
        return task.update(create_state(params, optimizer, task.ema_decay), grads, Plan(2, 256))

    state, norms = step(case.params, official_grads("mar_base")[1])
    assert float(norms["grad_norm"]) == pytest.approx(float(out["grad_norm"]), rel=1e-3)
    after = apply_map.to_official(case.config, jax.device_get(state.params))
    before = weights.state_dict("mar_base", "mar")
    checked = 0
    for name in before:
        if name == "fake_latent":  # no label was dropped, so it has no gradient in PyTorch
            continue
        flat = np.asarray(after[name]).reshape(-1)
        stride = max(1, flat.size // 64)
        moved = out[f"after_one_step.{name}"] - before[name].reshape(-1)[::stride]
        ours = flat[::stride] - before[name].reshape(-1)[::stride]
        if name.endswith("qkv.bias"):  # attention ignores the keys' bias; its gradient is noise
            kind = np.arange(0, flat.size, stride) * 3 // flat.size
            ours, moved = ours[kind != 1], moved[kind != 1]
        np.testing.assert_allclose(ours, moved, atol=0.05 * lr, err_msg=name)
        checked += 1
    assert checked == len(before) - 1


def test_weight_decay_matches_reference():
    about, case = weights.case("mar_base_step"), golden.case("mar_base")
    decays = trees.map_with_path(
        lambda path, leaf: np.full(leaf.shape, bool(re.search(MAR_DECAYED, path)), np.float32),
        case.params,
    )
    official = apply_map.to_official(case.config, decays)
    for name, tensor in official.items():
        assert (np.asarray(tensor) == (name not in about["no_weight_decay"])).all(), name


@pytest.mark.slow
@pytest.mark.parametrize("task", [TASK, DISCRETE], ids=["masked", "codes"])
def test_accumulation_changes_only_rounding(task):
    state, weights_ = start(task), frozen(task.tokenizer)
    results = []
    for accumulate in (1, 4):
        changed = dataclasses.replace(task, accumulate=accumulate)
        step = jax.jit(functools.partial(changed.train_step, plan=Plan(4, 8)))
        results.append(step(state, weights_, batch(), KEY))
    chex.assert_trees_all_close(results[0][1], results[1][1], rtol=1e-3, atol=1e-5)
    (one, _), (four, _) = jax.device_get(results)
    moved = jax.tree.map(largest_difference, one.params, jax.device_get(state.params))
    apart = jax.tree.map(largest_difference, one.opt_state, four.opt_state)
    assert max(jax.tree.leaves(apart)) < 1e-4 and max(jax.tree.leaves(moved)) > 1e-4


def largest_difference(a, b):
    return np.abs(a - b).max()


@pytest.mark.slow
@pytest.mark.parametrize("rate", ["dropout", "attention_dropout"])
def test_dropout_is_drawn_per_example(rate):
    params, KEY_B = start(TASK).params, jax.random.split(KEY, 4)
    token_BLZ = jax.random.normal(KEY, (4, 16, 3))

    @jax.jit
    def loss(key_B):
        draws = LossDraws.from_keys(MODEL, KEY_B, jnp.full(4, 3), 1, **{rate: 0.5})
        draws = draws.replace(dropouts={rate: draws.dropouts[rate].replace(key_B=key_B)})
        label_B = jnp.zeros(4, jnp.int32)
        losses = token_losses(MODEL, params, token_BLZ, label_B, draws, 4)
        return jnp.sum(losses.metrics_BLU["mse"], axis=(1, 2))

    one_B, swapped_B = loss(KEY_B), loss(KEY_B[jnp.array([1, 0, 2, 3])])
    assert (one_B[:2] != swapped_B[:2]).all()
    np.testing.assert_array_equal(one_B[2:], swapped_B[2:])


@pytest.mark.slow
def test_labels_are_dropped_and_mask_ratios_vary():
    task = dataclasses.replace(TASK, class_dropout=1.0)
    step = jax.jit(functools.partial(task.train_step, plan=Plan(4, 8)))
    state, ratios = jax.device_get(start(TASK)), set()
    for number in range(4):
        numbered = state.replace(step=np.int32(number))
        after, metrics = jax.device_get(step(numbered, frozen(KL), batch(), KEY))
        ratios.add(float(metrics["masked"]))
        decay = 1 - float(TASK.optimizer.wd(0, Plan(4, 8))) * float(metrics["lr"])
        moved = after.params["class_embed"] - state.params["class_embed"] * decay
        assert np.abs(moved).max() < 1e-6  # no class was seen
        assert (after.params["no_class_embed"] != state.params["no_class_embed"]).all()
    assert len(ratios) > 1 and min(ratios) >= 0.7


@pytest.mark.slow
@pytest.mark.parametrize("task", [TASK, DISCRETE, CAUSAL], ids=["masked", "codes", "causal"])
def test_evaluation_ignores_batch_size_and_padding(task):
    state, weights_ = start(task), frozen(task.tokenizer)
    rows = batch(6) | {"valid_B": np.ones(6, bool)}
    step = jax.jit(task.eval_step)
    padded = {k: np.concatenate([x[:4], np.zeros_like(x[:1])]) for k, x in rows.items()}
    rest = {k: np.concatenate([x[4:], np.zeros_like(x[:3])]) for k, x in rows.items()}
    whole = task.eval_metrics(dict(jax.device_get(step(state, weights_, rows))))
    parts = jax.device_get([step(state, weights_, part) for part in (padded, rest)])
    summed = task.eval_metrics(dict(jax.tree.map(np.add, *parts)))
    assert whole.keys() == summed.keys()
    assert ("loss_by_known" in whole) == (not task.model.causal)
    for name in whole:
        np.testing.assert_allclose(whole[name], summed[name], rtol=2e-4, err_msg=name)


def test_content_keys_depend_only_on_each_example():
    keys = jax.random.key_data(content_keys(batch(8)))
    assert len(np.unique(np.asarray(keys), axis=0)) == 8
    some = {name: x[3:5] for name, x in batch(8).items()}
    np.testing.assert_array_equal(jax.random.key_data(content_keys(some)), keys[3:5])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(tokenizer=VQ), "takes a KL tokenizer, but the tokenizer is a VQConfig"),
        (dict(tokenizer=dataclasses.replace(KL, latent_channels=4)), "channels: tokenizer 4, tr"),
        (dict(tokenizer=dataclasses.replace(KL, image_size=16)), r"latent_map: tokenizer \(8, 8\)"),
        (dict(sampling=MAROptions(steps=17)), "steps=17: must be at most 16"),
        (dict(min_mask_ratio=0.0), r"min_mask_ratio=0.0: must be in \(0, 1\)"),
        (dict(diffusion_batch_mul=0), "diffusion_batch_mul=0: must be 1 or more"),
        (dict(attention_dropout=1.0), "attention_dropout=1.0: must be at least 0 and below 1"),
        (
            dict(compute=ComputeConfig(attention_impl="cudnn")),
            "attention_impl=cudnn has no dropout",
        ),
        (dict(compute=ComputeConfig(attention_impl="splash")), "=splash has no dropout"),
    ],
)
def test_invalid_settings_are_refused(change, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(TASK, **change)


@pytest.mark.parametrize("values", [[1, 2], np.array([1, 2]), lambda step: step + 1])
def test_sampling_options_by_step_survive_a_round_trip_through_json(values):
    options = MAROptions(guidance=values, temperature=values, steps=2)
    sampling = dataclasses.replace(TASK, sampling=options).sampling
    assert sampling == MAROptions(guidance=(1, 2), temperature=(1, 2), steps=2)
    data = json.loads(json.dumps(config_tree.to_dict(sampling)))
    assert config_tree.from_dict(MAROptions, data) == sampling


def test_categorical_head_needs_a_single_scale():
    with pytest.raises(InputError, match="has 2 scales"):
        dataclasses.replace(DISCRETE, tokenizer=dataclasses.replace(VQ, scales=(1, 4)))


def test_matching_rows_of_other_sizes():
    larger = dataclasses.replace(MODEL, latent_map=(8, 8), classes=3)
    rows = matching_mar_rows(larger, MODEL)
    assert rows["class_embed"] == ([], []) and rows["encoder_pos_embed"] == ([0, 1], [0, 1])
    assert not matching_mar_rows(MODEL, MODEL)


@pytest.mark.slow
@pytest.mark.parametrize("task", [TASK, DISCRETE], ids=["masked", "codes"])
def test_previews_show_samples_and_reconstructions(task):
    tokenizer, state = task.tokenizer, start(task)
    weights_ = frozen(tokenizer)
    images = jax.jit(task.preview)(state, weights_, batch())
    samples = np.asarray(images["samples"])
    assert samples.shape == (16, 8, 8, 1) and 0 <= samples.min() and samples.max() <= 1
    if task is TASK:  # as the pipeline samples ten classes, then the first six again
        model = MARPipeline(
            tokenizer, task.model, {"tokenizer": weights_, "mar": state.params}, FAST
        )
        labels = np.arange(16) % 10
        np.testing.assert_allclose(samples, model.sample(labels, seed=0), atol=2e-3)
        # The comparison must notice other labels and other seeds.
        for others in (model.sample(labels[::-1], seed=0), model.sample(labels, seed=1)):
            assert np.abs(others - samples).max() > 0.02
    rebuilt = jax.jit(
        lambda x_BHWC: tokenizer.decode(weights_, tokenizer.encode(weights_, x_BHWC))
    )(batch()["image_BHWC"])
    original, again = images["reconstructions"]
    np.testing.assert_allclose(original, batch()["image_BHWC"] / 255, atol=1e-6)
    np.testing.assert_allclose(again, rebuilt, atol=1e-4)
    assert np.std(rebuilt, axis=0).max() > 1e-3  # images differ
