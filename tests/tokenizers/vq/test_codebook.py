"""Remedies for codebooks: k-means, restarts of dead codes, scale dropout and an entropy loss."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import forked
from tests.helpers.paths import ROOT
from tests.tokenizers.vq.test_model import small, small_config
from varjax.tokenizers.vq import codebook
from varjax.tokenizers.vq.codebook import (
    CodebookConfig,
    entropy_loss,
    init_codebook,
    init_usage,
    kmeans,
    restart_dead_codes,
    sample_inputs,
    sample_scale_dropout,
    scale_residuals,
)
from varjax.tokenizers.vq.model import make_quantizer
from varjax.tokenizers.vq.pyramid import Pyramid
from varjax.tokenizers.vq.quantizer import quantizer_loss
from varjax.tokenizers.vq.task import VQTask
from varjax.training.task import TrainState

KEY = jax.random.key(0)
EIGHT_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import dataclasses
import functools
import numpy as np
from varjax.tokenizers.vq.codebook import CodebookConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.task import VQTask
from varjax.training.sharding import put_batch
from varjax.training.sharding import MeshShape, make_mesh, on_mesh, shardings
from varjax.training.task import Plan

CONFIG = VQConfig(scales=(1, (2, 1), (4, 2)), image_channels=2, width=8, channel_mult=(1, 1),
                         blocks=1, groups=4, vocab=16, code_channels=4)
book = CodebookConfig("kmeans", restart_every=1, scale_dropout=0.5, scales_kept=1)
TASK = VQTask(CONFIG, codebook=book, ema_decay=0.5)
IMAGES = np.random.default_rng(0).integers(0, 256, (16, *CONFIG.image_shape), np.uint8)
FIRST = jax.device_get(jax.jit(TASK.init)(jax.random.key(0)))
FIRST.opt_state["usage_V"] = np.float32(np.where(np.arange(16) % 2, 1 / 16, -1))
BEFORE = FIRST.params["quantizer"]["codebook"]

def train(accumulate, devices):
    mesh = make_mesh(MeshShape(), devices)
    task = dataclasses.replace(TASK, accumulate=accumulate)
    placement = shardings(FIRST, mesh)
    state = jax.device_put(FIRST, placement)
    step = on_mesh(functools.partial(task.train_step, plan=Plan()), mesh)
    step = jax.jit(step, out_shardings=(placement, None))
    batch = put_batch({"image_BHWC": IMAGES}, mesh, 16)
    return jax.device_get(step(state, {}, batch, jax.random.key(1)))

(one, metrics), (other, _) = train(1, jax.devices()[:1]), train(2, jax.devices())
codes = [s.params["quantizer"]["codebook"] for s in (one, other)]
assert metrics["restarted"] == 8, metrics
assert np.abs(codes[0] - BEFORE).max(axis=1).min() > 1e-3  # k-means moved the living ones, too
np.testing.assert_allclose(*codes, rtol=1e-3, atol=1e-4)
np.testing.assert_allclose(one.opt_state["usage_V"], other.opt_state["usage_V"], rtol=1e-4)
moment = one.opt_state["tokenizer"][1].mu["quantizer"]["codebook"]
assert not moment[::2].any() and moment[1::2].any(), moment
np.testing.assert_array_equal(one.ema["quantizer"]["codebook"][::2], codes[0][::2])
"""


@pytest.mark.slow
def test_k_means_and_restarts_are_the_same_on_eight_devices():
    forked.run([sys.executable, "-c", EIGHT_DEVICES], check=True, timeout=400, cwd=ROOT)


def test_k_means_finds_clusters(monkeypatch):
    rng = np.random.default_rng(0)
    centers = rng.normal(size=(8, 3)) * 5
    z_NZ = np.float32(np.repeat(centers, 50, axis=0) + 0.1 * rng.normal(size=(400, 3)))

    def distortion(codes_VZ):
        return ((z_NZ[:, None] - np.asarray(codes_VZ)[None]) ** 2).sum(-1).min(1).mean()

    found = jax.jit(kmeans, static_argnums=1)(z_NZ, 16, KEY)
    assert distortion(found) < 0.5 * distortion(z_NZ[rng.permutation(400)[:16]])
    monkeypatch.setattr(codebook, "KMEANS_PIECE", 64)
    by_pieces = jax.jit(lambda z_NZ: kmeans(z_NZ, 16, KEY))
    np.testing.assert_allclose(by_pieces(z_NZ), found, rtol=1e-5)
    assert "f32[400,16]" not in str(jax.make_jaxpr(by_pieces)(z_NZ))  # distances of all vectors
    # With more codes than vectors, some codes are copies, but noise makes them differ.
    few = jax.jit(kmeans, static_argnums=1)(z_NZ[:3], 8, KEY)
    assert len(np.unique(few, axis=0)) == 8 and np.isfinite(few).all()


def test_new_codes_are_sampled_equally_from_all_scales():
    pyramid = Pyramid((1, 2, (3, 4)))
    z_BLZ = np.tile(np.float32(pyramid.level_L)[None, :, None], (5, 1, 2))
    scale_N = np.rint(jax.jit(sample_inputs, static_argnums=(0, 2))(pyramid, z_BLZ, 600, KEY)[:, 0])
    np.testing.assert_allclose(np.bincount(scale_N.astype(int)), [200] * 3, atol=40)


def test_only_dead_codes_restart_and_only_at_intervals():
    pyramid, old_VZ = Pyramid((1, 2)), jnp.ones((4, 2))
    z_BLZ = jnp.full((3, 5, 2), 7.0)
    params = {"quantizer": {"codebook": old_VZ}}
    moments = {"mu": params, "nu": params}
    # Code 1 would be dead after this batch, if one image in ten did not use it in the first scale.
    usage_V = jnp.array([0.5, 0.025, 0.5, 0.0])
    frequency_KV = jnp.array([[0.9, 0.1, 0, 0], [2.0, 0, 2.0, 0]])

    @jax.jit
    def restart(step):
        state = TrainState(step, params, params, moments)
        config = CodebookConfig(restart_every=3)
        return restart_dead_codes(
            config, pyramid, state, usage_V, frequency_KV, lambda params, ideal: z_BLZ, KEY
        )

    state, after_V, metrics = restart(jnp.int32(6))
    assert metrics["restarted"] == 1 and after_V[3] == 0.25
    for tree in (state.params, state.ema):
        codes_VZ = tree["quantizer"]["codebook"]
        np.testing.assert_array_equal(codes_VZ[:3], old_VZ[:3])
        np.testing.assert_allclose(codes_VZ[3], 7, atol=0.5)
    for tree in state.opt_state.values():
        np.testing.assert_array_equal(tree["quantizer"]["codebook"][:, 0], [1, 1, 1, 0])
    state, after_V, metrics = restart(jnp.int32(7))
    assert metrics["restarted"] == 0 and after_V[3] == 0
    np.testing.assert_array_equal(state.params["quantizer"]["codebook"], old_VZ)


@pytest.mark.slow
def test_dropped_scales_add_nothing_to_features_and_loss():
    config, variables = small()
    params = {"params": variables["params"]["quantizer"]}
    quantizer, kept_B = make_quantizer(config), jnp.array([1, 3])
    f_BhwZ = jax.random.normal(KEY, (2, 4, 4, config.code_channels))

    @jax.jit
    def quantize(kept_B):
        return quantizer.apply(params, f_BhwZ), quantizer.apply(params, f_BhwZ, kept_B)

    whole, some = quantize(kept_B)
    for k in range(3):
        np.testing.assert_array_equal(some.f_hats[k][0], whole.f_hats[0][0])
        np.testing.assert_array_equal(some.f_hats[k][1], whole.f_hats[k][1])
    loss_B, partial_B = (
        quantizer_loss(f_BhwZ, f_hats, 0.25, kept)
        for f_hats, kept in ((whole.f_hats, None), (some.f_hats, kept_B))
    )
    first_B = quantizer_loss(f_BhwZ, whole.f_hats[:1], 0.25)
    np.testing.assert_allclose(partial_B, [first_B[0], loss_B[1]], rtol=1e-6)


def test_scale_dropout_draws_the_number_of_scales_of_each_image():
    key_B = jax.random.split(KEY, 4000)
    config = CodebookConfig(scale_dropout=0.4, scales_kept=2)
    sample = jax.jit(sample_scale_dropout, static_argnums=(0, 1))
    kept_B = sample(config, Pyramid((1, 2, 3, 4)), key_B)
    shares = np.bincount(np.asarray(kept_B), minlength=5) / 4000
    np.testing.assert_allclose(shares, [0, 0, 0.2, 0.2, 0.6], atol=0.03)
    assert sample_scale_dropout(CodebookConfig(), Pyramid((1, 2)), key_B) is None


def test_entropy_loss_is_low_for_confident_choices_of_many_codes():
    codes_VZ, loss = jnp.array([[0.0, 4.0], [4.0, 0.0]]), jax.jit(entropy_loss, static_argnums=2)
    both, one = codes_VZ[None], jnp.tile(codes_VZ[:1], (2, 1))[None]
    for cosine in (False, True):
        np.testing.assert_allclose(loss(codes_VZ, [both], cosine), -np.log(2), atol=1e-3)
        np.testing.assert_allclose(loss(codes_VZ, [one], cosine), 0, atol=1e-3)
    between = jnp.full((1, 2, 2), 2.0)
    np.testing.assert_allclose(loss(codes_VZ, [between], False), 0, atol=1e-3)


def test_entropy_loss_of_zero_vectors_has_a_finite_gradient():
    zeros_VZ = jnp.zeros((3, 2)).at[0].set(1)
    grad = jax.jit(jax.grad(lambda *x: entropy_loss(x[0], [x[1]], True), (0, 1)))
    grads = grad(zeros_VZ, zeros_VZ[None])
    assert all(np.isfinite(x).all() for x in grads)


@pytest.mark.slow
def test_scale_residuals_are_the_vectors_that_the_quantizer_encodes():
    config, variables = small()
    quantizer = make_quantizer(config).bind({"params": variables["params"]["quantizer"]})

    @jax.jit
    def both(f_BhwZ):
        quantized = quantizer(f_BhwZ)
        inputs = scale_residuals(config.pyramid, f_BhwZ, quantized.f_hats)
        tokens = [quantizer.nearest_codes(z_BlZ) for z_BlZ in inputs]
        return jnp.concatenate(tokens, axis=1), quantized.tokens_BL

    found_BL, expected_BL = both(jax.random.normal(KEY, (2, 4, 4, config.code_channels)))
    np.testing.assert_array_equal(found_BL, expected_BL)


def test_normal_codes_have_about_unit_length():
    config, fresh = small_config(vocab=256), {"quantizer": {"codebook": np.zeros((256, 4))}}
    codes_VZ = init_codebook(CodebookConfig("normal"), config, fresh, KEY)["quantizer"]["codebook"]
    assert codes_VZ.shape == (256, 4)
    np.testing.assert_allclose(jnp.mean(jnp.sum(codes_VZ**2, axis=-1)), 1, atol=0.2)
    assert init_codebook(CodebookConfig(), config, fresh, KEY) is fresh
    assert init_usage(CodebookConfig(), 4) is None


def test_initial_usage_is_not_weakly_typed():
    """Steps return a strong type, so with a weak one the second step would be compiled again."""
    assert not init_usage(CodebookConfig(restart_every=3), 4).weak_type


@pytest.mark.parametrize(
    ("field", "value"),
    [("restart_every", -1), ("scale_dropout", 1.5), ("scales_kept", 0), ("entropy", -0.1)],
)
def test_invalid_settings_are_refused(field, value):
    with pytest.raises(ValueError, match=f"codebook.{field}={value}: must be"):
        CodebookConfig(**{field: value})


def test_scale_dropout_needs_scales_to_drop():
    config = small_config()
    with pytest.raises(ValueError, match="scales_kept=3 of 3 scales: nothing is left"):
        VQTask(config, codebook=CodebookConfig(scale_dropout=0.1))
    assert CodebookConfig() == VQTask(config).codebook
