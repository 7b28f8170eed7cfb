"""The Python interface of a MAR model, `MARPipeline`, with a tiny run."""

import dataclasses
import functools

import numpy as np
import pytest

import varjax
from tests.helpers import runs
from tests.helpers.random_params import random_params
from varjax.errors import InputError
from varjax.mar.masking import UnmaskingSchedule
from varjax.models import read_model

pytestmark = pytest.mark.slow

KEEP = np.arange(16).reshape(4, 4) % 3 == 0


@functools.cache
def loaded() -> varjax.MARPipeline:
    model = varjax.load(runs.mar())
    assert isinstance(model, varjax.MARPipeline)
    return model


def images(count=2):
    return np.random.default_rng(0).integers(0, 256, (count, 8, 8, 1), np.uint8)


def test_pipeline_has_the_config_and_options_of_its_run():
    model = loaded()
    assert read_model(runs.mar())[0].name == "mar"
    assert model.config == {"tokenizer": runs.KL, "mar": runs.MAR}
    assert (model.classes, model.image_shape, model.edit_shape) == (10, (8, 8, 1), (4, 4))
    assert model.options() == runs.MAR_SAMPLING and model.options(guidance=3).guidance == 3.0


def test_samples_are_decoded_latents_and_follow_their_index():
    model = loaded()
    images_BHWC = np.asarray(model.sample([3, 1, 4], seed=5))
    assert images_BHWC.shape == (3, 8, 8, 1) and images_BHWC.std() > 0
    latents_BhwZ = model.sample_latents([3, 1, 4], seed=5)
    assert latents_BhwZ.shape == (3, 4, 4, 3)
    np.testing.assert_allclose(model.decode(latents_BhwZ), images_BHWC, atol=1e-5)
    again = model.sample_latents([4, 3, 1], seed=5, index=[2, 0, 1])
    np.testing.assert_allclose(again, latents_BhwZ[np.array([2, 0, 1])], rtol=1e-4, atol=1e-4)


def test_every_step_shows_the_tokens_drawn_so_far():
    model = loaded()
    steps = np.asarray(model.sample([3, 1, 4], seed=5, every_step=True))
    count = model.options().steps
    assert steps.shape == (count, 3, 8, 8, 1)
    np.testing.assert_allclose(steps[-1], model.sample([3, 1, 4], seed=5), atol=1e-5)
    # Pixels are gray until their token is known, and a known token stays known.
    unknown = (steps.reshape(count, 3, 4, 2, 4, 2, 1) == 0.5).all(axis=(3, 5, 6))
    known = UnmaskingSchedule(16, count).known[1:]
    assert np.array_equal(16 - unknown.sum(axis=(2, 3)), np.tile(known, (3, 1)).T)
    assert not (unknown[1:] & ~unknown[:-1]).any()


@functools.cache
def causal() -> varjax.MARPipeline:
    mar = dataclasses.replace(runs.MAR, causal=True)
    params = {"tokenizer": random_params(runs.KL.init), "mar": random_params(mar.init)}
    return varjax.MARPipeline(runs.KL, mar, params, runs.MAR_SAMPLING)


@pytest.mark.parametrize("make", [loaded, causal])
def test_a_step_listener_gets_every_step_without_changing_samples(make):
    model, steps = make(), []
    images_BHWC = model.sample([3, 1, 4], 5, every_step=lambda *step: steps.append(step))
    assert np.array_equal(images_BHWC, model.sample([3, 1, 4], 5))
    assert [number for number, _ in steps] == list(range(model.steps(model.options())))
    assert np.array_equal(steps[-1][1], images_BHWC)
    images_SBHWC = np.stack([x for _, x in steps])
    unknown_SBL = (images_SBHWC.reshape(-1, 3, 4, 2, 4, 2) == 0.5).all(axis=(3, 5))
    known = UnmaskingSchedule(16, len(steps)).known[1:]
    assert np.array_equal(16 - unknown_SBL.sum(axis=(2, 3)), np.tile(known, (3, 1)).T)
    if make is loaded:
        every = model.sample([3, 1, 4], 5, every_step=True)
        np.testing.assert_allclose(images_SBHWC, every, atol=1e-5)


def test_a_step_listener_of_an_edit_gets_only_the_drawing_steps():
    model, steps = loaded(), []
    given = {"seed": 3, "index": [0, 1, 2]}
    model.edit(images(1), KEEP, **given, every_step=lambda *step: steps.append(step))
    every = model.edit(images(1), KEEP, **given, every_step=True)
    np.testing.assert_allclose([x for _, x in steps], every, atol=1e-5)


def test_a_mix_of_one_class_equals_that_class():
    model = loaded()
    latents = model.sample_latents([3, 10, 4], seed=5)
    mixed = model.sample_latents([{3: 2}, "10:1", {4: 0.5}], seed=5)
    np.testing.assert_allclose(mixed, latents, rtol=1e-4, atol=1e-4)
    one, two = (model.hidden(latents[:1], KEEP, [label]) for label in ("4:1+5:1", 4))
    assert not np.array_equal(one, two)


def test_encode_and_decode_match_the_tokenizer():
    model = loaded()
    latents_BhwZ = model.encode(images())
    tokenizer = varjax.load_tokenizer(runs.kl())
    scale = np.asarray(tokenizer.params["latent_std"])
    mean_BhwZ = tokenizer.encode(images())["mean"]
    np.testing.assert_allclose(latents_BhwZ, mean_BhwZ / scale, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.decode(latents_BhwZ), tokenizer.decode(mean_BhwZ), atol=1e-5)


def test_edits_keep_latents_exactly():
    model = loaded()
    latents_BhwZ = np.asarray(model.encode(images()))
    edited_BhwZ = np.asarray(model.edit_latents(latents_BhwZ, KEEP, [1, 2], seed=3))
    np.testing.assert_array_equal(edited_BhwZ[:, KEEP], latents_BhwZ[:, KEEP])
    assert (edited_BhwZ[:, ~KEEP] != latents_BhwZ[:, ~KEEP]).all()
    results = model.edit(images(1), KEEP, seed=3, index=[0, 1, 2])
    assert results.shape == (3, 8, 8, 1) and (results[0] != results[1]).any()
    steps = np.asarray(model.edit(images(1), KEEP, seed=3, index=[0, 1, 2], every_step=True))
    np.testing.assert_allclose(steps[-1], results, atol=1e-5)
    # Kept tokens are visible from the first step on, when others are still gray.
    gray = (steps.reshape(-1, 3, 4, 2, 4, 2) == 0.5).all(axis=(3, 5))
    assert not gray[:, :, KEEP].any() and gray[0].any() and len(steps) <= model.options().steps


def test_hidden_vectors_depend_only_on_known_tokens():
    model, rng = loaded(), np.random.default_rng(1)
    latents_BhwZ = rng.normal(size=(2, 4, 4, 3)).astype(np.float32)
    z_BLC = model.hidden(latents_BhwZ, KEEP, [1, 2])
    assert z_BLC.shape == (2, 16, 16)
    other = np.where(KEEP[None, :, :, None], latents_BhwZ, 9.0)
    np.testing.assert_allclose(model.hidden(other, KEEP, [1, 2]), z_BLC, rtol=1e-5, atol=1e-6)
    assert (model.hidden(latents_BhwZ, KEEP) != z_BLC).any()  # no class
    out_N2Z = model.denoise(latents_BhwZ.reshape(-1, 3)[:16], np.arange(16) * 60, z_BLC[0])
    assert out_N2Z.shape == (16, 6)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda m: m.sample([10, 11]), "labels .11.: allowed are 0 … 9, and 10 for no class"),
        (lambda m: m.sample([]), "labels are empty: allowed are 0 … 9"),
        (lambda m: m.sample([True]), "labels .True.: allowed"),
        (lambda m: m.sample([1], seed=-1), "seed=-1: must be 0 or more"),
        (lambda m: m.sample_latents([1], index=[2**32]), "index .4294967296.: allowed"),
        (lambda m: m.edit(images(), KEEP, seed=2**32), "seed=4294967296: must be"),
        (lambda m: m.decode(np.zeros((0, 4, 4, 3))), "needed is .B, .*4, 4, 3"),
        (lambda m: m.sample([1], steps=17), "steps=17: must be at most 16"),
        (lambda m: m.sample([1], top_k=3), "top_k: not an option of this model; it has guidance"),
        (lambda m: m.sample([1], diffusion_steps=1), "diffusion_steps=1: give one number"),
        (lambda m: m.decode(np.zeros((2, 4, 4, 4))), "needed is .B, .*4, 4, 3"),
        (lambda m: m.hidden(np.zeros((2, 4, 4, 3)), np.ones((4, 3))), "known has shape .4, 3."),
        (lambda m: m.hidden(np.zeros((2, 4, 4, 3)), KEEP, [1]), "labels have shape .1,.; expected"),
        (lambda m: m.edit(images(), np.ones(16)), "keep has shape .16,.; allowed are"),
        (lambda m: m.edit(images(2), KEEP, index=[0, 1, 2]), "2 images and 3 of index"),
        (lambda m: m.denoise(np.zeros((2, 3)), np.zeros(3), np.zeros((2, 16))), "x_t, t and z"),
        (lambda m: m.encode(np.zeros((1, 8, 9, 1))), "images have shape .1, 8, 9, 1."),
        (lambda m: m.logits(np.zeros((1, 16, 16))), "this model's tokens are continuous"),
    ],
)
def test_invalid_input_is_refused(call, says):
    with pytest.raises(InputError, match=says):
        call(loaded())
