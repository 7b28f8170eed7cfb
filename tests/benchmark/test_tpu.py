"""Tests TPU estimates: reading the compiler's cycles and, if libtpu is installed, compiling."""

import functools
import importlib.util
import json
import os
import sys

import jax
import pytest

from tests.helpers import forked
from tests.helpers.paths import ROOT
from varjax.benchmark import measure, pieces, tpu
from varjax.errors import InputError
from varjax.nn.compute import ComputeConfig
from varjax.runtime import flops
from varjax.tokenizers.vq.model import VQConfig
from varjax.var import benchmark
from varjax.var.model import VARConfig

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)

HLO = """
HloModule m

%fused.1 (p: f32[8]) -> f32[8] {
  %p = f32[8]{0} parameter(0)
  ROOT %tanh.1 = f32[8]{0} tanh(%p)
}

%body.1 (x: (s32[], f32[8])) -> (s32[], f32[8]) {
  %x = (s32[], f32[8]{0}) parameter(0)
  %g = f32[8]{0} get-tuple-element(%x), index=1
  %f.1 = f32[8]{0} fusion(%g), kind=kLoop, calls=%fused.1, metadata={op_name="jit(f)/while/body/attention/exp"}, backend_config={"estimated_cycles":"3000"}
  ROOT %t = (s32[], f32[8]{0}) tuple(%g, %f.1)
}

%condition.1 (y: (s32[], f32[8])) -> pred[] {
  %y = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%y), index=0
  %limit = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %limit), direction=LT
}

ENTRY %main (a: f32[8]) -> f32[8] {
  %a = f32[8]{0} parameter(0)
  %c.1 = bf16[8]{0} convert(%a), backend_config={"estimated_cycles":"1000"}
  %w = (s32[], f32[8]{0}) while(%a), condition=%condition.1, body=%body.1
  ROOT %r = f32[8]{0} get-tuple-element(%w), index=1
}
"""  # noqa: E501  (as the compiler writes it)


def test_cycles_in_loops_are_multiplied_and_keep_their_path():
    assert sorted(tpu.estimated_cycles(HLO)) == [
        ("", 1000), ("jit(f)/while/body/attention/exp", 30_000)
    ]  # fmt: skip


def test_kernels_without_an_estimate_are_counted_and_hide_peak_share():
    kernel = '%k = f32[8]{0} custom-call(%g), custom_call_target="tpu_custom_call", backend_config='
    other = '%o = f32[8]{0} custom-call(%g), custom_call_target="Sharding"'
    known, unknown = kernel + '{"estimated_cycles":"5"}', kernel + '{"custom_call_config":{}}'
    for line, count in ((unknown, 10), (known, 0), (other, 0)):
        hlo = HLO.replace("  %f.1 =", f"  {line}\n  %f.1 =")
        assert tpu.kernels_without_estimate(hlo) == count
    for kernels, shares in ((0, {"peak_share": 0.5}), (10, {})):
        figures = tpu.Estimate({"rest": 2.0}, kernels, 10**9, 1e12, 0, 0, 1.0).figures()
        assert figures["kernels_without_estimate"] == kernels
        assert {k: v for k, v in figures.items() if k == "peak_share"} == shares


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", "casts"),
        ("jit(f)/VAR/while/body/block/attn/attention/dot_general", "attention"),
        ("jit(f)/transpose(jvp(attention))/dot_general", "attention"),
        ("jit(f)/VAR/while/body/block/attn/cache/dynamic_update_slice", "cache"),
        ("jit(f)/VAR/while/body/block/attn/q/dot_general", "GEMMs"),
        ("jit(f)/VAR/while/body/block/attn/q/convert_element_type", "casts"),
        ("jit(f)/VAR/VAR._logits/head/dot_general", "head"),
        ("jit(f)/filters/while/body/reduce_sum", "filters"),
        ("jit(f)/VQTokenizer.features/encoder/conv_in/conv_general_dilated", "encoder"),
        ("jit(f)/VQTokenizer.decode_unclipped/decoder/mid_attn_1/attention/dot_general", "decoder"),
        ("jit(f)/Quantizer.add_scale/conv_general_dilated", "quantizer"),
        ("jit(f)/VAR/while/body/block/modulate/rsqrt", "norms"),
        ("jit(f)/VAR/while/body/dynamic_slice", "rest"),
    ],
)
def test_the_path_of_an_instruction_gives_its_category(path, expected):
    assert tpu.category(path) == expected


@pytest.fixture
def small(monkeypatch):
    """Replaces the presets by a transformer of two layers."""
    small = VARConfig(2, 256, 4, classes=10, scales=(1, 8, 16))
    monkeypatch.setattr(VARConfig, "preset", lambda name: small)
    return small


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_pieces_of_sampling_and_training_have_the_flop_of_the_whole(small, dtype):
    """Compares counted FLOP; nothing is compiled."""
    compute = ComputeConfig(dtype, attention_impl="xla", platform="tpu")

    def work(programs):
        return sum(
            flops.count(lambda *a, p=p: p.function(*a, compute), *p.arguments) for p in programs
        )

    guided, unguided = (benchmark.sampling_programs("d16", 1, value) for value in (True, False))
    sampling = [pieces.sampling(guided, 2, compute, parts) for parts in (False, True)]
    assert [p.name for p in sampling[1]][:3] == ["condition", "transformer 1x1", "tokens 1x1"]
    assert work(sampling[0]) == work(sampling[1])
    training = [pieces.training("d16", 2, compute, False, parts) for parts in (False, True)]
    assert [p.name for p in training[1]] == ["encoder", "gradient", "update"]
    # The gradient piece rebuilds the inputs from tokens, at about 1 % of the FLOP. In the whole
    # step, the quantizer returns them.
    assert work(training[0]) == pytest.approx(work(training[1]), rel=0.02)
    cached = pieces.training("d16", 2, compute, True, False)
    assert work(cached) == pytest.approx(work(training[1][1:]), rel=1e-6)
    half = work(pieces.sampling(unguided, 2, compute, False))
    decoder = work(pieces.decoding(guided, 2, compute))
    assert half - decoder == pytest.approx((work(sampling[0]) - decoder) / 2, rel=0.05)
    assert work(pieces.encoding("d16", 2, compute)) == work(training[1][:1])


@pytest.mark.slow
def test_the_step_and_its_gradient_loop_over_microbatches(monkeypatch):
    tiny = VARConfig(1, 16, 2, classes=3, scales=(1, 2))
    monkeypatch.setattr(VARConfig, "preset", lambda name: tiny)
    tokenizer = functools.partial(VQConfig, width=8, channel_mult=(1, 1), blocks=1, groups=4)
    monkeypatch.setattr(benchmark, "VQConfig", tokenizer)
    compute = ComputeConfig("bfloat16", attention_impl="xla", platform="tpu")

    def loops(program):
        function = lambda *a: program.function(*a, compute)  # noqa: E731
        return str(jax.make_jaxpr(function)(*program.arguments)).count("length=3")

    (step,) = pieces.training("d16", 6, compute, True, False, accumulate=3)
    gradient, update = pieces.training("d16", 6, compute, True, True, accumulate=3)
    assert (loops(step), loops(gradient), loops(update)) == (1, 1, 0)
    with pytest.raises(InputError, match="batch of 6 cannot be split into 4"):
        pieces.training("d16", 6, compute, True, True, accumulate=4)


@pytest.mark.slow
def test_a_refiner_replaces_the_model_at_the_fine_scales(monkeypatch):
    depths = {"d20": 3, "d16": 1}
    monkeypatch.setattr(
        VARConfig, "preset", lambda name: VARConfig(depths[name], 64, 2, classes=10, scales=(1, 2))
    )
    tokenizer = functools.partial(VQConfig, width=8, channel_mult=(1, 1), blocks=1, groups=4)
    monkeypatch.setattr(benchmark, "VQConfig", tokenizer)
    compute = ComputeConfig("bfloat16", attention_impl="xla", platform="tpu")

    def work(preset, *refiner):
        programs = benchmark.sampling_programs(preset, 1, True, *refiner)
        (program,) = pieces.sampling(programs, 2, compute, False)
        return flops.count(lambda *a: program.function(*a, compute), *program.arguments)

    assert 0 < work("d20", "d16", 1) < work("d20")


def test_flags_without_effect_are_refused():
    for flags, problem in (
        (["--what=encode", "--parts"], "parts=True: .* --what=sample or train"),
        (["--what=decode", "--parts"], "parts=True: .* --what=sample or train"),
        (["--remat=none"], "remat=none: has no effect with --what=sample; .* --what=train"),
        (["--what=decode", "--unroll"], "unroll=True: .* --what=sample or train"),
        (["--cached"], "cached=True: has no effect with --what=sample; .* --what=train"),
        (["--what=train", "--unguided"], "unguided=True: .* --what=train; .* --what=sample"),
        (["--accumulate=2"], "accumulate=2: has no effect with --what=sample"),
        (["--what=train", "--steps=8"], "steps=8: has no effect with --what=train"),
        (["--steps=8"], "steps=8: has no effect on d30; .* such as mar_b"),
        (["--refiner=d16", "--what=train"], "refiner=d16: needs --what=sample, without --parts"),
        (["--refiner=d16", "--parts"], "refiner=d16: needs --what=sample, without --parts"),
        (["--draft_scales=6"], "draft_scales=6: a refiner draws the other scales"),
        (["--diffusion_steps=8"], "diffusion_steps=8: has no effect on d30; .* such as mar_b"),
        (["--preset=mar_b", "--diffusion_steps=50:5"], "diffusion_steps=50:5: .* add --parts"),
    ):
        with pytest.raises(InputError, match=problem):
            tpu.main(["--preset=d30", *flags])


def test_pieces_are_counted_as_often_as_they_run(monkeypatch, capsys):
    def estimate(program, compute, device):
        return tpu.Estimate({"rest": 1.0}, 0, 0, 1.0, 0, 0, 0.0)

    monkeypatch.setattr(tpu, "estimate_program", estimate)
    monkeypatch.setattr(tpu, "tpu_devices", lambda topology: jax.devices())
    flags = ["--preset=mar_b", "--batch_size=2", "--steps=4", "--diffusion_steps=6:2", "--parts"]
    tpu.main(flags)
    *parts, _, total = map(json.loads, capsys.readouterr().out.splitlines())
    denoising = [6, 4, 3, 2]  # 2 + floor((3 - k) / 3 · 4) for step k
    assert sum(x["times"] for x in parts if x["part"].startswith("denoising")) == sum(denoising)
    assert total["ms"] == 4 + sum(denoising) + 1  # transformer, denoising, decoder


ESTIMATE = """
import sys
from varjax.benchmark import tpu
from varjax.var import benchmark
from varjax.tokenizers.vq.model import VQConfig
from varjax.var.model import VARConfig

small = VARConfig(2, 256, 4, classes=10, scales=(1, 8, 16))
VARConfig.preset = lambda name: small
benchmark.VQConfig = lambda scales: VQConfig(scales=scales, width=32)
tpu.main(sys.argv[1:])
"""


@needs_libtpu
@pytest.mark.slow
def test_pieces_take_as_long_as_the_whole():
    def total(*flags):
        command = [sys.executable, "-c", ESTIMATE, "--preset=d16", "--batch_size=8", *flags]
        # libtpu aborts the process on XLA flags that it does not know.
        environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
        done = forked.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        assert lines[-1]["part"] == "total" and lines[-1]["compiled_for"] == "TPU v5 lite"
        assert lines[-1]["ms_per_image"] == pytest.approx(lines[-1]["ms"] / 8, rel=1e-3)
        assert all(0 < line["peak_share"] < 1 for line in lines if "peak_share" in line)
        return lines[-1]["ms"]

    assert total("--parts") == pytest.approx(total(), rel=0.15)


def test_without_libtpu_the_error_says_what_to_install(monkeypatch):
    def missing(*_):
        raise RuntimeError("JAX TPU support not installed")

    monkeypatch.setattr(measure.topologies, "get_topology_desc", missing)
    with pytest.raises(ValueError, match="compile for --topology=v5e:1x1: JAX TPU .*pip install l"):
        measure.tpu_devices("v5e:1x1")
    assert jax.default_backend() == "cpu"
