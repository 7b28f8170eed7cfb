"""Tests batches that are split over several devices, and how their programs are compiled."""

import os
import sys
import types

import jax
import numpy as np
import pytest

from tests.helpers import forked
from tests.helpers.paths import ROOT
from varjax.errors import InputError
from varjax.runtime.data_parallel import _compiler_options, batch_mesh, data_parallel

SCRIPT = """
import jax, numpy as np
from varjax.runtime.data_parallel import batch_mesh, data_parallel
mesh, rows = batch_mesh(), []

def double(params, _, key_B, x_BC):
    rows.append(len(x_BC))  # as traced: of one device
    return params * x_BC + jax.vmap(jax.random.uniform)(key_B)[:, None] * 0

for B in (0, 1, 4, 5, 7):
    x_BC = np.arange(2.0 * B, dtype=np.float32).reshape(B, 2)
    key_B = jax.random.split(jax.random.key(0), B)
    y_BC = data_parallel(double, mesh)(np.float32(2), None, key_B, x_BC)
    np.testing.assert_array_equal(y_BC, 2 * x_BC)
print(rows)
"""


@pytest.mark.slow
def test_each_device_computes_its_share_of_a_padded_batch():
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "4", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", SCRIPT]
    done = forked.run(command, env=environment, capture_output=True, text=True)
    assert done.stdout.split("\n")[0] == "[0, 1, 1, 2, 2]", done.stderr


def test_an_empty_list_of_devices_is_refused():
    with pytest.raises(InputError, match="devices is empty"):
        batch_mesh([])


def test_other_parameters_do_not_recompile():
    double = data_parallel(lambda params, _, x_BC: params * x_BC, batch_mesh(jax.devices()[:1]))
    for factor in (1.0, 2.0):
        np.testing.assert_array_equal(
            double(np.float32(factor), None, np.ones((3, 2), np.float32)), factor * np.ones((3, 2))
        )
    assert double._cache_size() == 1


@pytest.mark.parametrize(
    "flags, options",
    [
        ("", {"xla_backend_optimization_level": 1}),
        ("--xla_force_host_platform_device_count=1", {"xla_backend_optimization_level": 1}),
        ("--xla_backend_optimization_level=3", None),
    ],
)
def test_cpu_programs_compile_quickly_unless_xla_flags_set_the_level(flags, options, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", flags)
    found, jit = [], jax.jit
    monkeypatch.setattr(jax, "jit", lambda f, **given: found.append(given) or jit(f, **given))
    double = data_parallel(lambda params, _, x_BC: params * x_BC, batch_mesh(jax.devices()[:1]))
    assert found == [{"compiler_options": options}]
    np.testing.assert_array_equal(double(np.float32(2), None, np.ones((3, 2), np.float32)), 2)


def test_other_platforms_have_no_compiler_options(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "")
    device = types.SimpleNamespace(platform="gpu")
    mesh = types.SimpleNamespace(devices=np.array([device]))
    assert _compiler_options(mesh) is None
