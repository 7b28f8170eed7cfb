"""Runs of a VQ tokenizer with a discriminator: exact resume, export, and refused settings."""

import dataclasses
import shutil

import jax
import numpy as np
import pytest

from tests.helpers import runs
from tests.helpers.tiny import lines
from varjax.checkpoints.saved_steps import STATE_TREES, SavedSteps
from varjax.checkpoints.weights import open_weights, read_expected_tokenizer
from varjax.data.sources.noise import Noise
from varjax.data.sources.photos import Photos
from varjax.errors import InputError
from varjax.storage import files
from varjax.tokenizers.losses.gan import GANConfig
from varjax.tokenizers.losses.lpips import LPIPSConfig
from varjax.tokenizers.vq.codebook import CodebookConfig
from varjax.tokenizers.vq.task import VQTask
from varjax.training import loop
from varjax.training.experiment import Experiment
from varjax.training.run_dir import check_config, write_config
from varjax.training.sharding import make_mesh, shardings
from varjax.training.task import TrainState
from varjax.weight_files import convert_run

pytestmark = pytest.mark.slow

MODEL = dataclasses.replace(
    runs.TOKENIZER, scales=(1, (2, 3), (8, 16)), channel_mult=(1,), image_channels=3
)
GAN = GANConfig("patch", 8, 1, start=0.25, ramp=0.5, diffaugment=("color", "translation"))
CODEBOOK = CodebookConfig("kmeans", restart_every=3, scale_dropout=0.5, scales_kept=1, entropy=0.1)
TASK = VQTask(MODEL, codebook=CODEBOOK, gan=GAN, ema_decay=0.9)
PHOTOS = Photos((8, 16), images=64, flip=True)


def experiment(run_dir, task=TASK, data=PHOTOS):
    every = {"log_every": 1, "save_every": 2}
    return Experiment(task, data, str(run_dir), batch_size=16, steps=6, keep=9, **every)


def last_state(run_dir):
    abstract = jax.eval_shape(TASK.init, jax.random.key(0))
    saved = SavedSteps(run_dir / "checkpoints")
    assert saved.steps()[-1] == 6
    placement = shardings(abstract, make_mesh(experiment("").mesh))
    trees, where = ({n: getattr(s, n) for n in STATE_TREES} for s in (abstract, placement))
    return TrainState(np.int32(6), **saved.arrays(6, trees, where)[0])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    loop.train(experiment(run_dir))
    return run_dir


def test_an_interrupted_run_resumes_exactly(whole, tmp_path):
    """Log lines from after the last checkpoint must not count."""
    shutil.copytree(whole, tmp_path / "cut")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "cut" / "checkpoints" / str(step))
    loop.train(experiment(tmp_path / "cut"))
    state, expected = last_state(tmp_path / "cut"), last_state(whole)
    jax.tree.map(np.testing.assert_array_equal, state, expected)
    assert not np.allclose(state.opt_state["usage_V"], 1 / MODEL.vocab)
    # The discriminator was first updated in the run's third step.
    assert state.opt_state["discriminator"].train_state.step == 4
    assert lines(tmp_path / "cut") == lines(whole)


def test_weights_load_and_export_without_the_discriminator(whole, tmp_path):
    average = last_state(whole).ema
    convert_run(whole, tmp_path / "out")
    for location in (whole, tmp_path / "out"):
        params = read_expected_tokenizer(open_weights(location), MODEL)
        jax.tree.map(np.testing.assert_array_equal, params, average)
    plain = dataclasses.replace(TASK, gan=None)
    assert jax.tree.structure(plain.pretrained(str(whole))[0]) == jax.tree.structure(average)


def test_missing_lpips_weights_and_too_small_images_are_refused_before_training(tmp_path):
    model = dataclasses.replace(MODEL, scales=(1, 2, 16))
    task = VQTask(model, perceptual=LPIPSConfig(str(tmp_path / "lpips")))
    with pytest.raises(
        ValueError, match="no LPIPS weights in .*lpips; make them with: varjax convert"
    ):
        loop.train(experiment(tmp_path / "run", task, Noise(16)))
    with pytest.raises(ValueError, match="8×16 are too small for LPIPS.*task.perceptual=none"):
        loop.train(experiment(tmp_path / "small", dataclasses.replace(task, model=MODEL)))
    deep = dataclasses.replace(TASK, gan=GANConfig(layers=3))
    with pytest.raises(ValueError, match="too small for gan.kind='style'.*4 pixels a side$"):
        GANConfig("style").check((2, 8, 1))
    with pytest.raises(ValueError, match="too small for gan.kind='patch'.*fewer"):
        loop.train(experiment(tmp_path / "deep", deep))
    assert not (tmp_path / "small").exists() and not (tmp_path / "deep").exists()


def test_the_path_of_the_lpips_weights_may_change(tmp_path):
    """A run has its own copy of these weights. Dropping the perceptual loss is refused."""
    model = dataclasses.replace(MODEL, scales=(1, 2, 16))
    task, data = VQTask(model, perceptual=LPIPSConfig("here")), Noise(16)
    write_config(experiment(tmp_path, task, data))
    elsewhere = dataclasses.replace(task, perceptual=LPIPSConfig("there"))
    check_config(experiment(tmp_path, elsewhere, data))
    write_config(experiment(tmp_path, elsewhere, data))
    assert files.read_json(tmp_path / "config.json")["task"]["perceptual"]["weights"] == "there"
    with pytest.raises(ValueError, match="task.perceptual"):
        check_config(experiment(tmp_path, dataclasses.replace(task, perceptual=None), data))


def test_accumulation_may_change_only_without_the_entropy_loss(tmp_path):
    """The entropy loss is computed separately for each microbatch."""
    with_entropy = dataclasses.replace(TASK, gan=None)
    without = dataclasses.replace(with_entropy, codebook=CodebookConfig())
    for task, run_dir in ((with_entropy, tmp_path / "a"), (without, tmp_path / "b")):
        write_config(experiment(run_dir, task))
        changed = experiment(run_dir, dataclasses.replace(task, accumulate=2))
        if task is without:
            check_config(changed)
            continue
        with pytest.raises(InputError, match="task.accumulate: 1 in the run, 2 in the config"):
            check_config(changed)
