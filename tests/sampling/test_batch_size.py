"""--batch_size=auto: the arithmetic beside what compiled programs need."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varjax
from tests.helpers import runs
from varjax.cli.sample import main
from varjax.core import trees
from varjax.core.hardware import device_memory
from varjax.mar.model import MARConfig
from varjax.mar.options import MAROptions, make_plan
from varjax.mar.sample import mar_sampling_bytes, sample_mar_tokens
from varjax.nn.compute import Compute
from varjax.sampling.batch_size import choose_batch_size, fitting_batch_size
from varjax.sampling.sampler import image_keys
from varjax.tokenizers.vq.model import VQConfig
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions, sample_images, sample_tokens, var_sampling_bytes

# Batches are computed whole, as on accelerators.
COMPUTE = Compute("float32", platform="gpu")
BATCH = 8


def temporaries(function, *arguments):
    """Bytes that a compiled program needs beside what goes in and comes out."""
    abstract = jax.eval_shape(lambda: arguments)
    return jax.jit(function).lower(*abstract).compile().memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def labels():
    return jnp.zeros(BATCH, jnp.int32), image_keys(0, jnp.arange(BATCH))


@pytest.mark.parametrize("guided", [True, False])
def test_var_needs_what_the_arithmetic_says(labels, guided):
    var = dataclasses.replace(VARConfig.preset("d16"), depth=2)
    tokenizer = VQConfig()
    params = jax.eval_shape(
        lambda key: {"tokenizer": tokenizer.init(key), "var": var.init(key)}, jax.random.key(0)
    )

    def tokens(params, label_B, key_B):
        given = label_B, key_B, VAROptions(), None, COMPUTE, guided
        return sample_tokens(tokenizer, var, params, *given)[0]

    needed = temporaries(tokens, params, *labels)
    # A small tokenizer, so that the transformer is what counts.
    small = dataclasses.replace(tokenizer, width=32)
    reckoned = var_sampling_bytes(small, var, BATCH, jnp.float32, guided)
    assert 0.8 < reckoned / needed < 1.5


def test_a_decoder_needs_what_the_arithmetic_says(labels):
    var, tokenizer = VARConfig(depth=1, width=64, heads=1), VQConfig()
    params = jax.eval_shape(
        lambda key: {"tokenizer": tokenizer.init(key), "var": var.init(key)}, jax.random.key(0)
    )

    def images(params, label_B, key_B):
        given = label_B, key_B, VAROptions(), None, COMPUTE, True
        return sample_images(tokenizer, var, params, *given)

    needed = temporaries(images, params, *labels)
    assert 0.9 < var_sampling_bytes(tokenizer, var, BATCH, jnp.float32, True) / needed < 1.5


@pytest.mark.parametrize("steps", [8, 1])
def test_mar_needs_what_the_arithmetic_says(labels, steps):
    mar = dataclasses.replace(MARConfig.preset("mar_b"), encoder_depth=2, decoder_depth=2)
    plan = make_plan(mar, MAROptions(steps=steps))
    params = jax.eval_shape(mar.init, jax.random.key(0))

    def tokens(params, label_B, key_B):
        return sample_mar_tokens(mar, params, label_B, key_B, plan, None, COMPUTE)

    needed = temporaries(tokens, params, *labels)
    assert 0.8 < mar_sampling_bytes(None, mar, BATCH, jnp.float32, plan) / needed < 2.5


def test_the_largest_that_fits_is_taken():
    def needed(size):
        return 100 + 10 * size

    assert fitting_batch_size(needed, 10**9, largest=128) == 128
    assert fitting_batch_size(needed, 10**9, largest=32) == 32
    assert fitting_batch_size(needed, 525, largest=128) == 32  # 420 of 0.8 * 525
    assert fitting_batch_size(needed, 524, largest=128) == 16
    assert fitting_batch_size(needed, 10, largest=128) == 1  # the arithmetic may be wrong


def test_a_device_tells_its_memory_and_a_cpu_has_the_machines():
    gpu = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 12 * 10**9})
    assert device_memory(gpu) == 12 * 10**9
    assert 2**28 < device_memory(jax.devices()[0]) < 2**45


def test_auto_looks_at_all_options_and_at_the_weights(capsys, monkeypatch):
    model = varjax.load(runs.var())
    weights = trees.nbytes(model.params)
    assert model.sampling_bytes(1, model.options(cfg=0)) > weights
    grows = [model.sampling_bytes(n, model.options()) for n in (1, 2, 3)]
    assert grows[2] - grows[1] == grows[1] - grows[0] > 0
    unguided, guided = (model.sampling_bytes(16, model.options(cfg=cfg)) for cfg in (0, 2))
    assert unguided < guided
    memory = int((unguided + guided) / 2 / 0.8)
    monkeypatch.setattr("varjax.sampling.batch_size.device_memory", lambda device: memory)
    options = [model.options(cfg=0), model.options(cfg=2)]
    assert choose_batch_size("auto", model, options[:1]) == 16
    assert choose_batch_size("auto", model, options) == 8
    assert choose_batch_size(5, model, options) == 5
    assert "batch_size=auto: 8 images at a time on each device" in capsys.readouterr().err


def test_the_command_takes_auto_a_number_and_nothing_else(tmp_path, capsys):
    out = tmp_path / "a.npz"
    flags = [f"--weights={runs.mar()}", "--labels=1", "--count=2", "--steps=2"]
    assert main([*flags, f"--out={out}", "--batch_size=auto"]) == 0
    assert "batch_size=auto: 32 images" in capsys.readouterr().err
    assert np.load(out)["arr_0"].shape[0] == 2
    with pytest.raises(SystemExit) as stop:
        main([*flags, f"--out={out}", "--batch_size=many"])
    assert stop.value.code == 2
    assert "many: allowed are a number and auto" in capsys.readouterr().err
