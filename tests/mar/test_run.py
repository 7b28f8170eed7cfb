"""A MAR run on cached latents: exact resume, and the same tokens as from images."""

import dataclasses
import shutil

import chex
import jax
import numpy as np
import pytest

from tests.helpers import runs
from tests.helpers.tiny import lines, weights
from varjax.cli.cache_latents import cache_latents
from varjax.data.sources import CachedLatents, Digits
from varjax.errors import InputError
from varjax.mar.latents import encode_tokens
from varjax.mar.task import MARTask
from varjax.training import loop
from varjax.training.experiment import Experiment

pytestmark = pytest.mark.slow

DATA = Digits(shift=0.2)


@pytest.fixture(scope="module")
def task():
    return MARTask(runs.MAR, runs.KL, str(runs.kl()), ema_decay=0.5, sampling=runs.MAR_SAMPLING)


@pytest.fixture(scope="module")
def latents(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("latents")
    cache_latents(task, DATA, 3, 64, str(out), augmentations=2, dtype="float32")
    return CachedLatents(str(out))


def experiment(task, latents, run_dir):
    every = {"log_every": 1, "save_every": 2, "eval_every": 2}
    return Experiment(task, latents, str(run_dir), batch_size=16, steps=4, keep=9, seed=3, **every)


def test_exact_resume(task, latents, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    loop.train(experiment(task, latents, whole))
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / "4")
    loop.train(experiment(task, latents, cut))
    for ema in (False, True):
        chex.assert_trees_all_equal(weights(cut, ema), weights(whole, ema))
    assert lines(cut)[-1] == lines(whole)[-1]


def test_cached_latents_match_those_of_images(task, latents):
    frozen = task.frozen()
    images, cached = (data.make(8, seed=3).train_batch(0) for data in (DATA, latents))
    np.testing.assert_array_equal(images["label_B"], cached["label_B"])
    assert "image_BHWC" not in cached
    key_B = jax.random.split(jax.random.key(0), 8)
    tokens = [
        jax.jit(lambda batch: encode_tokens(runs.KL, runs.MAR, frozen, batch, key_B))(
            {name: x for name, x in batch.items() if name != "label_B"}
        )
        for batch in (images, cached)
    ]
    np.testing.assert_allclose(*tokens, rtol=1e-4, atol=1e-4)


def test_latents_of_another_tokenizer_are_refused(task, latents, tmp_path):
    other = dataclasses.replace(task, tokenizer_weights="random")
    with pytest.raises(
        InputError, match="the latents were made by a different tokenizer:\n  weights: "
    ):
        loop.train(experiment(other, latents, tmp_path / "run"))
