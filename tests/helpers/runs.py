"""Trains tiny runs of both stages of both families on the digits, once for all tests."""

import dataclasses
import functools
import os
import pathlib
import tempfile

from tests.helpers.random_params import random_params
from varjax import trees
from varjax.convert.weights_dir import write_converted
from varjax.data.sources import Digits
from varjax.mar.heads import CategoricalHead, DiffusionHead
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions
from varjax.mar.task import MARTask
from varjax.storage import folders
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.kl.task import KLTask
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.task import VQTask
from varjax.training import loop
from varjax.training.experiment import Experiment
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask

TOKENIZER = VQConfig(
    scales=(1, 2, 4), image_channels=1, width=8, channel_mult=(1, 2), blocks=1, groups=4, vocab=16,
    code_channels=4,
)  # fmt: skip
VAR = VARConfig(depth=2, width=16, heads=2, classes=10, scales=(1, 2, 4), vocab=16, code_channels=4)
KL = KLConfig(
    image_size=8, image_channels=1, width=8, channel_mult=(1, 2), blocks=1, groups=4,
    latent_channels=3,
)  # fmt: skip
MAR = MARConfig(
    width=16, encoder_depth=1, decoder_depth=1, encoder_heads=2, decoder_heads=2,
    head=DiffusionHead(channels=3, depth=1, width=16), classes=10, latent_map=(4, 4), buffer_size=2,
)  # fmt: skip
MAR_SAMPLING = MAROptions(guidance=1.5, steps=2, diffusion_steps="3", clip_denoised=3.0)


@functools.cache
def root() -> pathlib.Path:
    """Returns the folder of the runs, which all processes of a test session share."""
    return pathlib.Path(os.environ.get("VARJAX_TEST_RUNS") or tempfile.mkdtemp(prefix="runs_"))


@functools.cache
def tokenizer() -> pathlib.Path:
    run = root() / "tokenizer"
    _train(VQTask(TOKENIZER), run)
    return run


@functools.cache
def var() -> pathlib.Path:
    run = root() / "var"
    options = VAROptions(guidance=1.5, top_k=7)
    task = VARTask(VAR, TOKENIZER, str(tokenizer()), ema_decay=0.5, sampling=options)
    _train(task, run, keep_best="eval_ema/loss")
    return run


@functools.cache
def untrained_var() -> pathlib.Path:
    """Returns a converted directory of random parameters, written in a second."""
    models = {"tokenizer": TOKENIZER, "var": VAR}
    return _write_random("untrained_var", models, VAROptions(guidance=1.5, top_k=7))


@functools.cache
def untrained_mar() -> pathlib.Path:
    """Returns a converted directory of random parameters, written in a second."""
    return _write_random("untrained_mar", {"tokenizer": KL, "mar": MAR}, MAR_SAMPLING)


@functools.cache
def untrained_mar_over_codes() -> pathlib.Path:
    """Returns a converted directory of random parameters, written in a second."""
    one_scale = dataclasses.replace(TOKENIZER, scales=(4,))
    mar = dataclasses.replace(MAR, head=CategoricalHead(TOKENIZER.vocab))
    return _write_random("mar_over_codes", {"tokenizer": one_scale, "mar": mar}, MAR_SAMPLING)


@functools.cache
def kl() -> pathlib.Path:
    run = root() / "kl"
    _train(KLTask(KL), run)
    return run


@functools.cache
def mar() -> pathlib.Path:
    run = root() / "mar"
    _train(MARTask(MAR, KL, str(kl()), ema_decay=0.5, sampling=MAR_SAMPLING), run)
    return run


def _write_random(name, models, sampling) -> pathlib.Path:
    folder = root() / name
    with folders.lock_folder(root(), wait=True):
        leaves = {
            part: (config, trees.paths(random_params(config.init)))
            for part, config in models.items()
        }
        # Another process may have written it; only a folder that names its sources is replaced.
        write_converted(folder, leaves, {"drawn": "at random"}, sampling)
    return folder


def _train(task, run, **settings) -> None:
    short = dict(batch_size=32, steps=2, eval_every=1)
    with folders.lock_folder(
        root(), wait=True
    ):  # another process may have made the run, or be making it
        loop.train(Experiment(task, Digits(), str(run), **short, **settings))
