"""Tests --batch_size=auto: memory estimates against compiled programs, and the size chosen."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

import varjax
from tests.helpers import runs
from varjax import trees
from varjax.benchmark import sample as benchmark
from varjax.cli.sample import main
from varjax.errors import InputError
from varjax.evaluation.evaluate import begun_batch_size_of_report
from varjax.mar.heads import CategoricalHead
from varjax.mar.memory import mar_sampling_bytes
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions, make_setup, sample_mar_tokens
from varjax.nn.compute import ComputeConfig
from varjax.runtime.hardware import device_memory
from varjax.sampling.batch_size import choose_batch_size, fitting_batch_size
from varjax.sampling.outputs import begun_batch_size
from varjax.sampling.sampler import image_keys
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.pyramid import SCALES_256, SCALES_512
from varjax.var.model import VARConfig
from varjax.var.network import VARModels, var_sampling_bytes
from varjax.var.sample import VAROptions, sample_images, sample_tokens

# Batches are computed whole, as on accelerators. Attention is grouped, because a CPU's compiler,
# unlike a GPU's, does not keep the attention matrices in memory.
COMPUTE = ComputeConfig("float32", attention_impl="grouped", platform="tpu")
BATCH = 8
FEW_SCALES = SCALES_256[::3]  # keeps the last scale, which needs the most memory


def temporaries(function, *arguments):
    """Returns the bytes that a compiled program needs besides its inputs and outputs."""
    abstract = jax.eval_shape(lambda: arguments)
    return jax.jit(function).lower(*abstract).compile().memory_analysis().temp_size_in_bytes


@pytest.fixture(scope="module")
def labels():
    return jnp.zeros(BATCH, jnp.int32), image_keys(0, jnp.arange(BATCH))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guided", "scales"), [(True, SCALES_256), (False, FEW_SCALES), (True, SCALES_512[::3])]
)
def test_var_memory_estimate_matches_the_compiled_program(labels, guided, scales):
    var = dataclasses.replace(VARConfig.preset("d16"), depth=2, scales=scales)
    tokenizer = VQConfig(scales=scales)
    params = jax.eval_shape(
        lambda key: {"tokenizer": tokenizer.init(key), "var": var.init(key)}, jax.random.key(0)
    )

    def tokens(params, label_B, key_B):
        models, streams = VARModels(tokenizer, var, COMPUTE), None if guided else 0
        return sample_tokens(models, params, label_B, key_B, VAROptions(), guided=streams)[0]

    needed = temporaries(tokens, params, *labels)
    # With a small tokenizer, the transformer needs more memory than the decoder.
    small = dataclasses.replace(tokenizer, width=32)
    reckoned = var_sampling_bytes(VARModels(small, var, COMPUTE), BATCH, None if guided else 0)
    assert 0.95 < reckoned / needed < 2


def attention_matrices(jaxpr, shape):
    """Returns the bytes of a traced program's largest 4-axis array (_, _, *shape), or 0."""
    largest = 0
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            if variable.aval.shape[-2:] == shape and len(variable.aval.shape) == 4:
                largest = max(largest, variable.aval.size * variable.aval.dtype.itemsize)
        for value in jax.tree.leaves(equation.params, is_leaf=is_jaxpr):
            if is_jaxpr(value):
                inner = getattr(value, "jaxpr", value)
                largest = max(largest, attention_matrices(inner, shape))
    return largest


def is_jaxpr(value):
    return isinstance(value, core.ClosedJaxpr | core.Jaxpr)


@pytest.mark.slow
@pytest.mark.parametrize("guided", [True, False])
def test_var_memory_estimate_includes_the_matrices_of_plain_attention(labels, guided):
    """Measures the traced program, because a CPU's compiler does not keep the matrices."""
    vocab = 2**14  # makes the logits larger than the decoder's arrays
    var = VARConfig(depth=1, width=64, heads=2, scales=(1, 2, 16), vocab=vocab)
    tokenizer = VQConfig(scales=var.scales, width=32, vocab=vocab)
    params = jax.eval_shape(
        lambda key: {"tokenizer": tokenizer.init(key), "var": var.init(key)}, jax.random.key(0)
    )

    def matrices(compute):
        def tokens(params, label_B, key_B):
            models, streams = VARModels(tokenizer, var, compute), None if guided else 0
            return sample_tokens(models, params, label_B, key_B, VAROptions(), guided=streams)[0]

        return attention_matrices(jax.make_jaxpr(tokens)(params, *labels).jaxpr, (256, 261))

    plain, grouped = (
        dataclasses.replace(COMPUTE, dtype="bfloat16", attention_impl=kind)
        for kind in ("xla", "grouped")
    )
    rows = BATCH * (2 if guided else 1)
    assert matrices(plain) == rows * 2 * 256 * 261 * 4  # two heads, the last scale, float32
    needed = [
        var_sampling_bytes(VARModels(tokenizer, var, c), BATCH, None if guided else 0)
        for c in (plain, grouped)
    ]
    # Two matrices count: the products of queries and keys, and their softmax.
    assert needed[0] - needed[1] == 2 * matrices(plain)


@pytest.mark.slow
def test_decoder_memory_estimate_matches_the_compiled_program(labels):
    var = VARConfig(depth=1, width=64, heads=1, scales=FEW_SCALES)
    tokenizer = VQConfig(scales=FEW_SCALES)
    models = VARModels(tokenizer, var, COMPUTE)
    params = jax.eval_shape(
        lambda key: {"tokenizer": tokenizer.init(key), "var": var.init(key)}, jax.random.key(0)
    )

    def images(params, label_B, key_B):
        return sample_images(models, params, label_B, key_B, VAROptions())

    needed = temporaries(images, params, *labels)
    assert 0.95 < var_sampling_bytes(models, BATCH) / needed < 1.5


def test_a_batch_of_prime_size_is_decoded_whole():
    var, tokenizer = VARConfig(depth=1, width=64, heads=1), VQConfig()
    models = VARModels(tokenizer, var, COMPUTE)
    pieces, whole = (var_sampling_bytes(models, n) for n in (128, 127))
    assert whole > 4 * pieces


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "changes"),
    [(8, {}), (1, {}), (8, {"head": CategoricalHead(4096)}), (8, {"causal": True})],
)
def test_mar_memory_estimate_matches_the_compiled_program(labels, steps, changes):
    mar = dataclasses.replace(
        MARConfig.preset("mar_b"), encoder_depth=2, decoder_depth=2, **changes
    )
    setup = make_setup(mar, MAROptions(steps=steps))
    params = jax.eval_shape(mar.init, jax.random.key(0))

    def tokens(params, label_B, key_B):
        return sample_mar_tokens(mar, params, label_B, key_B, setup, None, COMPUTE)

    needed = temporaries(tokens, params, *labels)
    assert 0.95 < mar_sampling_bytes(None, mar, BATCH, COMPUTE, setup) / needed < 2.5


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
def test_mar_memory_estimate_includes_the_matrices_of_plain_attention_alone(labels, causal):
    mar = MARConfig(96, 1, 1, 2, 2, CategoricalHead(16), latent_map=(24, 24), causal=causal)
    setup = make_setup(mar, MAROptions(steps=2))
    params = jax.eval_shape(mar.init, jax.random.key(0))
    length = mar.buffer_size + mar.length
    queries = mar.buffer_size if causal else length

    def matrices(compute):
        def tokens(params, label_B, key_B):
            return sample_mar_tokens(mar, params, label_B, key_B, setup, None, compute)

        jaxpr = jax.make_jaxpr(tokens)(params, *labels).jaxpr
        return attention_matrices(jaxpr, (queries, queries))

    def needed(config, compute):
        return mar_sampling_bytes(None, config, BATCH, compute, setup)

    plain, grouped, loop = (
        ComputeConfig("bfloat16", attention_impl=kind, platform="cpu")
        for kind in ("xla", "grouped", "loop")
    )
    rows = BATCH * 2  # of two streams, with two heads each, in float32
    assert matrices(plain) == rows * 2 * queries * queries * 4
    assert matrices(grouped) == matrices(plain)  # groups are for a cache without a mask
    assert matrices(loop) == 0
    # The products of queries and keys, and their softmax; with a cache, as if it were full.
    both = rows * 2 * queries * length * 2 * 4
    assert needed(mar, plain) - needed(mar, loop) == both
    assert needed(mar, grouped) == needed(mar, plain)
    # JAX passes the encoder's mask to cuDNN's kernel as a bias, in the format of the queries.
    kernel = ComputeConfig("bfloat16", attention_impl="cudnn", platform="gpu")
    assert needed(mar, kernel) - needed(mar, loop) == rows * queries * length * 2
    wide = dataclasses.replace(mar, width=512)  # heads that the kernel does not take
    assert needed(wide, kernel) == needed(wide, plain)


def test_fused_attention_lets_large_token_maps_be_drawn_in_large_batches():
    mar = dataclasses.replace(MARConfig.preset("mar_l"), latent_map=(32, 32))
    setup = make_setup(mar, MAROptions())

    def fitting(kind):
        compute = ComputeConfig("bfloat16", attention_impl=kind, platform="gpu")
        return fitting_batch_size(
            lambda n: 10**9 + mar_sampling_bytes(None, mar, n, compute, setup), 16 * 10**9, 128
        )

    assert (fitting("xla"), fitting("cudnn")) == (16, 128)


def test_the_largest_batch_size_that_fits_is_chosen():
    def needed(size):
        return 100 + 10 * size

    assert fitting_batch_size(needed, 10**9, largest=128) == 128
    assert fitting_batch_size(needed, 10**9, largest=32) == 32
    assert fitting_batch_size(needed, 525, largest=128) == 32  # needs 420, which is 0.8 * 525
    assert fitting_batch_size(needed, 524, largest=128) == 16
    assert fitting_batch_size(needed, 10**9, largest=40) == 40
    assert fitting_batch_size(needed, 10, largest=128) == 1  # the estimate may be too high


def test_device_memory_of_a_gpu_and_of_a_cpu_in_a_container(monkeypatch, tmp_path):
    def gpu(statistics):
        return types.SimpleNamespace(platform="gpu", memory_stats=lambda: statistics)

    assert device_memory(gpu({"bytes_limit": 12 * 10**9})) == 12 * 10**9
    assert device_memory(gpu(None)) is None
    cpu = jax.devices()[0]
    limits = tmp_path / "max", tmp_path / "limit", tmp_path / "missing"
    monkeypatch.setattr("varjax.runtime.hardware.CONTAINER_LIMITS", limits)
    limits[0].write_text("max\n")
    limits[1].write_text(str(2**62))
    machine = device_memory(cpu)
    assert machine is not None and 2**28 < machine < 2**45
    limits[1].write_text(f"{2**26}\n")
    assert device_memory(cpu) == 2**26 // jax.local_device_count()


def test_auto_depends_on_options_weights_and_the_number_of_images(capsys, monkeypatch):
    model = varjax.load(runs.untrained_var())
    weights = trees.nbytes(model.params)
    assert model.sampling_bytes(1, model.options(guidance=1)) > weights
    grows = [model.sampling_bytes(n, model.options()) for n in (1, 2, 3)]
    assert grows[2] - grows[1] == grows[1] - grows[0] > 0
    unguided, guided = (model.sampling_bytes(16, model.options(guidance=s)) for s in (1, 3))
    assert unguided < guided
    memory = int((unguided + guided) / 2 / 0.8)
    monkeypatch.setattr("varjax.sampling.batch_size.device_memory", lambda device: memory)
    without, with_guidance = model.options(guidance=1), model.options(guidance=3)
    assert choose_batch_size("auto", model, without, 1000) == 16
    assert choose_batch_size("auto", model, with_guidance, 1000) == 8
    assert "batch_size=auto: 8 per device" in capsys.readouterr().err
    assert choose_batch_size("auto", model, with_guidance, 5) == 5
    assert not capsys.readouterr().err  # not limited by memory
    assert choose_batch_size("auto", model, without, 1000, begun=lambda: 3) == 3
    assert choose_batch_size(50, model, without, 1000) == 50
    assert choose_batch_size(50, model, without, 7) == 7
    monkeypatch.setattr("varjax.sampling.batch_size.device_memory", lambda device: None)
    assert choose_batch_size("auto", model, without, 1000) == 32
    assert "does not report its memory" in capsys.readouterr().err
    assert choose_batch_size("auto", model, without, 31) == 31
    assert not capsys.readouterr().err
    monkeypatch.setattr("varjax.sampling.batch_size.device_memory", lambda device: weights)
    assert choose_batch_size("auto", model, without, 1) == 1
    assert "batch_size=auto: 1 per device, which needs" in capsys.readouterr().err  # too much


def test_auto_leaves_no_device_idle():
    model = types.SimpleNamespace(devices=jax.devices() * 8, sampling_bytes=lambda n, options: n)
    assert choose_batch_size("auto", model, None, 40) == 5
    assert choose_batch_size("auto", model, None, 41) == 6


def test_auto_keeps_the_batch_size_of_an_existing_output(tmp_path):
    assert begun_batch_size(tmp_path / "a.npz") is None
    (tmp_path / ".a.npz.parts").mkdir()
    for folder in (".a.npz.parts", "."):
        (tmp_path / folder / "request.json").write_text('{"batch_size": 7}')
    assert begun_batch_size(tmp_path / "a.npz") == begun_batch_size(tmp_path) == 7
    (tmp_path / "a.npz").write_text("mine")
    assert begun_batch_size(tmp_path / "a.npz") is None
    (tmp_path / ".r.json.parts").mkdir()
    (tmp_path / ".r.json.parts" / "request.json").write_text('{"batch_size": 9}')
    assert begun_batch_size_of_report(tmp_path / "r.json") == 9
    request = {"samples": {"batch_size": 11}}
    (tmp_path / "r.json").write_text(json.dumps({"request": request}))
    assert begun_batch_size_of_report(tmp_path / "r.json") == 11
    (tmp_path / "r.json").write_text("[]")
    assert begun_batch_size_of_report(tmp_path / "r.json") is None


def test_the_benchmark_prints_the_batch_size_that_fits_each_memory(capsys):
    benchmark.main(["--preset=d30", "--dtype=bfloat16", "--fits=16,24"])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(line["memory_gb"], line["batch_size"]) for line in lines] == [(16, 16), (24, 32)]
    assert all(line["needed_gb"] <= 0.8 * line["memory_gb"] for line in lines)
    with pytest.raises(SystemExit):
        benchmark.main(["--fits=0,x"])
    with pytest.raises(InputError, match="draft_scales=8: a refiner draws the other scales"):
        benchmark.main(["--preset=d30", "--draft_scales=8", "--fits=16"])


@pytest.mark.slow
def test_batch_size_flag_takes_auto_or_a_number(tmp_path, capsys):
    out = tmp_path / "a.npz"
    flags = [f"--weights={runs.mar()}", "--labels=1", "--count=2", "--steps=2"]
    assert main([*flags, f"--out={out}", "--batch_size=auto"]) == 0
    assert "batch_size" not in capsys.readouterr().err
    assert np.load(out)["arr_0"].shape[0] == 2
    assert main([*flags, f"--out={out}"]) == 0
    assert "batch_size=auto: 2, as in the existing output" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        main([*flags, f"--out={out}", "--batch_size=many"])
    assert stop.value.code == 2
    assert "many: must be a number or auto" in capsys.readouterr().err
