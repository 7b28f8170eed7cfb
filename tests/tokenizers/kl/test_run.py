"""Runs of a KL tokenizer with a discriminator: exact resume, loading and conversion."""

import shutil

import chex
import numpy as np
import pytest

import varjax
from tests.helpers.tiny import lines, weights
from tests.tokenizers.kl.test_model import small_config
from varjax.convert.pth.read import read_checkpoint
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.tokenizers.kl.task import KLTask
from varjax.tokenizers.losses.gan import GANConfig
from varjax.training import loop
from varjax.training.experiment import Experiment
from varjax.weight_files import convert_run, convert_to_torch

pytestmark = pytest.mark.slow

MODEL = small_config(image_size=8, image_channels=1)
TASK = KLTask(MODEL, gan=GANConfig("patch", 8, 1, start=0.25), ema_decay=0.9)


def experiment(run_dir):
    every = {"log_every": 1, "save_every": 2}
    return Experiment(TASK, Digits(), str(run_dir), batch_size=16, steps=4, keep=9, **every)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    loop.train(experiment(run_dir))
    return run_dir


def test_an_interrupted_run_resumes_exactly(whole, tmp_path):
    run_dir = tmp_path / "cut"
    shutil.copytree(whole, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "4")
    loop.train(experiment(run_dir))
    for ema in (False, True):
        chex.assert_trees_all_equal(weights(run_dir, ema), weights(whole, ema))
    assert lines(run_dir)[-1] == lines(whole)[-1]


def test_a_run_loads_and_converts_with_its_latent_std(whole, tmp_path):
    tokenizer = varjax.load_tokenizer(whole)
    assert tokenizer.config == MODEL
    scales = [line["latent_std"] for line in lines(whole) if "latent_std" in line]
    np.testing.assert_allclose(tokenizer.params["latent_std"], scales[-1], rtol=1e-6)
    assert scales[-1] != 1
    images_BHWC = np.zeros((2, 8, 8, 1), np.uint8)
    assert tokenizer.decode(tokenizer.encode(images_BHWC)["mean"]).shape == (2, 8, 8, 1)
    convert_run(whole, tmp_path / "weights")
    found = varjax.load_tokenizer(tmp_path / "weights")
    chex.assert_trees_all_equal(found.params, tokenizer.params)
    convert_to_torch(whole, tmp_path / "torch")
    official = read_checkpoint(tmp_path / "torch/tokenizer.pth")
    assert "encoder.mid.attn_1.q.weight" in official and "latent_std" not in official
    with pytest.raises(InputError, match="KLTask, not of a transformer"):
        varjax.load(whole)
