"""Strictness for all tests: no silent promotion of dtypes or ranks."""

import jax
import pytest

from tests.helpers import tiny
from varjax.training import loop

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Nothing a test writes by a relative name stays."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """(directory, metrics) of a tiny run that nothing interrupted, made once."""
    run_dir = tmp_path_factory.mktemp("runs") / "whole"
    metrics = loop.train(tiny.experiment(run_dir, keep_best="eval/loss", preview_every=20))
    return run_dir, metrics
