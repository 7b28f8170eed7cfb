"""Strictness for all tests: no silent promotion of dtypes or ranks."""

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Nothing a test writes by a relative name stays."""
    monkeypatch.chdir(tmp_path)
