"""Tests which weights of a run are read, and that invalid config.json files are refused."""

import json

import jax.numpy as jnp
import pytest

import varjax
from varjax.checkpoints.weights import open_weights, restore_weights
from varjax.errors import InputError
from varjax.models import read_model
from varjax.training.checkpoint import Checkpoints
from varjax.training.task import TrainState

CONFIGS = [
    "5",
    "[1]",
    "{}",
    "{" * 10**5,
    '{"task": [1]}',
    '{"task": 5}',
    '{"task": {}}',
    '{"task": {"_type": []}}',
    '{"task": {"_type": {"a": 1}}}',
    '{"task": {"_type": "VARTask"}}',
    '{"task": {"_type": "VARTask"}, "steps": "x"}',
    '{"task": {"_type": "VARTask", "model": [1], "sampling": {}, "tokenizer": {}}}',
    '{"task": {"_type": "VARTask", "model": {"depth": [1]}, "sampling": {}, "tokenizer": {}}}',
    '{"task": {"_type": "VARTask", "model": {}, "sampling": 5, "tokenizer": {}}}',
    '{"task": {"_type": "VQTask"}}',
    '{"task": {"_type": "VQTask", "model": {"width": "x"}}}',
    '{"task": {"_type": "MARTask", "model": {}, "tokenizer": 5}}',
    '{"sources": 5}',
    '{"sources": {}, "var": [1], "tokenizer": {}}',
    '{"sources": {}, "var": {"depth": 1e30}, "tokenizer": {}}',
    '{"sources": {}, "tokenizer": 5}',
    '{"sources": {}, "tokenizer": {"scales": [[[[1]]]]}, "var": {}}',
]


@pytest.mark.parametrize("config", CONFIGS)
def test_loading_an_invalid_config_json_is_refused(tmp_path, config):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(config)
    for read in (varjax.load, varjax.load_tokenizer):
        with pytest.raises(InputError) as caught:
            read(run)
        assert len(str(caught.value)) < 1000
    for read in (open_weights, read_model):
        try:
            read(run)
        except InputError as error:
            assert str(run) in str(error)


@pytest.mark.parametrize(("metric", "expected"), [("eval/loss", 0), ("eval_ema/loss", 1)])
@pytest.mark.parametrize("folders", [["best"], ["best", "checkpoints"]])
def test_the_best_step_has_the_same_weights_by_its_number(tmp_path, metric, expected, folders):
    weights = {"params": {"w": jnp.zeros(1)}, "ema": {"w": jnp.ones(1)}}
    for folder in folders:
        with Checkpoints(tmp_path / folder) as checkpoints:
            state = TrainState(jnp.int32(1), **weights, opt_state=None)
            checkpoints.save(1, state, {"keep_best": metric})
    (tmp_path / "config.json").write_text(json.dumps({"task": {}, "keep_best": metric}))
    for step in (None, 1, "best"):
        assert restore_weights(tmp_path, step=step)["w"] == expected, step
    assert restore_weights(tmp_path, ema=True, step=1)["w"] == 1
