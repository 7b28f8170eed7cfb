"""Tests step listeners, which get the images of each step in order, without recompilation."""

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.paths import ROOT
from varjax.errors import InputError
from varjax.sampling import step_listener
from varjax.sampling.step_listener import sample_with_listener, sender

SHAPE = (2, 3, 4, 1)


@jax.jit
def program(x_BHWC, call):
    """Sends x + 1, x + 2 and x + 3, and returns x + 4."""

    def step(x_BHWC, _):
        x_BHWC = x_BHWC + 1
        return sender(call, "cpu")(x_BHWC, x_BHWC), None

    return jax.lax.scan(step, x_BHWC, None, length=3)[0] + 1


def heard(shape, listener=None):
    steps = []
    listener = listener or (lambda step, images_BHWC: steps.append((step, images_BHWC)))

    def run(call):  # in a JAX thread, because the argument is still being computed
        return program(jnp.ones(shape) - 1, call)

    images_BHWC = sample_with_listener(run, listener, shape, jax.local_devices()[:1])
    assert np.array_equal(images_BHWC, np.full(shape, 4))
    return steps


@pytest.mark.parametrize("piece", [step_listener.CPU_PIECE, 24, 5, 1])
def test_images_of_every_step_arrive_in_order(piece, monkeypatch):
    monkeypatch.setattr(step_listener, "CPU_PIECE", piece)
    program.clear_cache()
    for number, (step, images_BHWC) in enumerate(heard(SHAPE)):
        assert step == number and images_BHWC.dtype == np.float32
        assert np.array_equal(images_BHWC, np.full(SHAPE, 1.0 + number))
    assert number == 3


def test_a_new_listener_causes_no_recompilation():
    program.clear_cache()
    steps = [heard(SHAPE) for _ in range(3)]
    assert [len(x) for x in steps] == [4, 4, 4] and program._cache_size() == 1


def test_an_error_in_the_listener_is_raised_after_all_steps_are_computed():
    steps = []

    def refuse(step, images_BHWC):
        steps.append(step)
        if step == 1:
            raise KeyError("no more")

    with pytest.raises(KeyError, match="no more"):
        heard(SHAPE, refuse)
    assert steps == [0, 1]
    assert len(heard(SHAPE)) == 4


def test_a_listener_may_compute_with_jax():
    means = []
    heard(SHAPE, lambda step, images_BHWC: means.append(float(jnp.mean(images_BHWC))))
    assert means == [1, 2, 3, 4]


def test_an_error_in_the_program_reaches_the_caller():
    def fail(call):
        raise InputError("out of memory")

    with pytest.raises(InputError, match="out of memory"):
        sample_with_listener(fail, print, SHAPE, jax.local_devices()[:1])
    assert not step_listener._received


def test_several_devices_are_refused_with_advice():
    with pytest.raises(InputError, match=r"has 2: load it with .*or give every_step=True"):
        sample_with_listener(lambda call: jnp.zeros(SHAPE), print, SHAPE, [None, None])


@pytest.mark.slow
def test_large_images_arrive_when_jax_has_a_single_thread():
    """A callback that waits for a copy by the only thread, its own, would deadlock."""
    code = """
import os
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from tests.sampling.test_step_listener import heard
for _ in range(20):
    assert len(heard((8, 64, 64, 3))) == 4
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment, cwd=ROOT)
