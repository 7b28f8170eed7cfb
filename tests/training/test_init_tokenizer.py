"""Tests that a run started from a model trains on that model's tokenizer by default."""

import dataclasses

import chex
import jax
import numpy as np
import pytest

from tests.helpers import runs
from tests.helpers.random_params import random_params
from varjax import trees
from varjax.checkpoints.weights import abstract_params, open_weights
from varjax.cli import train
from varjax.convert.weights_dir import write_converted
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.mar.task import MARTask
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.tokenizers.kl.task import KLTask
from varjax.tokenizers.vq.task import VQTask
from varjax.training import loop
from varjax.training.experiment import Experiment
from varjax.training.initial_weights import frozen_weights
from varjax.training.setup import set_up
from varjax.var.task import VARTask

OTHER = "runs/other_tokenizer"  # does not exist, and need not exist
TASK = VARTask(runs.VAR, runs.TOKENIZER, OTHER)
WIDE = dataclasses.replace(runs.TOKENIZER, scales=(1, 2, 3, 4))  # the same parameters


@pytest.fixture
def model():
    return str(runs.untrained_var())


@pytest.fixture
def start(tmp_path):
    return lambda **fields: Experiment(
        **dict(task=TASK, data=Digits(), run_dir=str(tmp_path / "run"), batch_size=8, steps=1)
        | fields
    )


def write_model(folder, **parts):
    write_converted(folder, {name: (config, params(config)) for name, config in parts.items()}, {})
    return str(folder)


def params(config):
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), abstract_params(config))
    return trees.paths(zeros)


def test_the_frozen_copy_is_the_tokenizer_of_init_from(model, start, capfd):
    experiment = start(init_from=model)
    setup = set_up(experiment)
    assert capfd.readouterr().err == (
        f"the tokenizer is that of init_from={model}, not {OTHER}; to train on the latter, set "
        "init_tokenizer=false\n"
    )
    frozen = frozen_weights(setup.experiment.task.frozen, as_path(experiment.run_dir))
    chex.assert_trees_all_equal(frozen, open_weights(model).read_tokenizer_params())


def test_config_json_names_the_tokenizer_in_use(model, start, monkeypatch, tmp_path):
    def stop(*_, **__):
        raise InterruptedError

    monkeypatch.setattr(loop, "start_run", stop)

    def named(**fields):
        with pytest.raises(InterruptedError):
            loop.train(start(**fields))
        return files.read_json(tmp_path / "run/config.json")["task"]["tokenizer_weights"]

    assert named() == OTHER
    assert named(init_from=model) == model
    assert named(init_from=model, init_tokenizer=False) == OTHER
    # A run with a checkpoint has its own copy, so the original may be gone.
    assert named(init_from=model) == model
    (tmp_path / "run/checkpoints/1").mkdir(parents=True)
    assert named(init_from=str(tmp_path / "gone")) == model


def test_init_tokenizer_false_keeps_the_named_tokenizer(model, start, capfd):
    asked = start(init_from=model, init_tokenizer=False)
    assert set_up(asked).experiment.task.tokenizer_weights == OTHER
    assert "note: the tokenizer is runs/other_tokenizer, because" in capfd.readouterr().err
    set_up(start(task=dataclasses.replace(TASK, tokenizer_weights=model), init_from=model))
    assert not capfd.readouterr().err


def test_a_tokenizer_named_on_the_command_line_is_used(model, start):
    experiment, name = start(init_from=model), f"--config.task.tokenizer_weights={OTHER}"
    assert train.with_named_tokenizer(experiment, ["--config.seed=1"]).init_tokenizer
    for words in ([name], name.split("=")):
        assert not train.with_named_tokenizer(experiment, words).init_tokenizer
    both = [name, "--config.init_tokenizer=true"]
    assert train.with_named_tokenizer(experiment, both).init_tokenizer


def test_a_tokenizer_that_does_not_fit_is_refused(model, start):
    grouped = dataclasses.replace(runs.TOKENIZER, groups=2)
    task = dataclasses.replace(TASK, tokenizer=grouped)
    with pytest.raises(InputError, match="groups: 4 there, 2 expected\n.*init_tokenizer=false"):
        set_up(start(task=task, init_from=model))
    with pytest.raises(InputError, match="init_from: nowhere does not exist"):
        set_up(start(init_from="nowhere"))


def test_the_same_tokenizer_may_have_other_scales(model, tmp_path):
    folder, var = tmp_path / "wide", dataclasses.replace(runs.VAR, scales=WIDE.scales)
    equal = trees.paths(random_params(WIDE.init))
    write_converted(folder, {"tokenizer": (WIDE, equal)}, {})
    task = VARTask(var, WIDE, str(folder))
    assert task.with_tokenizer_of(model) == task
    other = dataclasses.replace(task, tokenizer_weights=write_model(tmp_path / "x", tokenizer=WIDE))
    with pytest.raises(InputError, match=r"scales: \[1, 2, 4\] there, \[1, 2, 3, 4\] exp"):
        other.with_tokenizer_of(model)


def test_tasks_stay_the_same_if_there_is_no_tokenizer_to_take(tmp_path, start, capfd):
    alone = write_model(tmp_path / "alone", var=runs.VAR)
    assert set_up(start(init_from=alone)).experiment.task == TASK
    assert f"the tokenizer is {OTHER}; init_from={alone} has" in capfd.readouterr().err
    for task in (VQTask(runs.TOKENIZER), KLTask(runs.KL)):
        assert task.with_tokenizer_of(alone) is task
    untrained = dataclasses.replace(TASK, tokenizer_weights="random")
    assert untrained.with_tokenizer_of(alone) is untrained


def test_mar_takes_the_tokenizer_too(tmp_path):
    folder = write_model(tmp_path / "mar", mar=runs.MAR, tokenizer=runs.KL)
    task = MARTask(runs.MAR, runs.KL, OTHER, sampling=runs.MAR_SAMPLING)
    assert task.with_tokenizer_of(folder).tokenizer_weights == folder


@pytest.mark.slow
def test_the_tokenizer_of_a_run_is_its_frozen_copy():
    """`tokenizer_weights` may name a run that does not exist, as in configs/small.py."""
    frozen = TASK.with_tokenizer_of(str(runs.var())).frozen()
    chex.assert_trees_all_equal(frozen, files.read_tensors(runs.var() / "frozen.safetensors")[0])
