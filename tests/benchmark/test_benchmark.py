"""Tests what benchmarks print for tiny models; speed is not tested."""

import functools
import json
import re
import types

import jax
import jax.numpy as jnp
import pytest

from tests.helpers import runs
from tests.helpers.fake_sampler import FakeSampler
from tests.helpers.paths import ROOT
from varjax.benchmark import __main__ as benchmark
from varjax.benchmark import evaluate, measure, model, sample
from varjax.mar import benchmark as mar_benchmark
from varjax.mar.model import MARConfig
from varjax.metrics.features import pixel_network
from varjax.runtime import hardware
from varjax.tokenizers.vq.model import VQConfig
from varjax.var import benchmark as var_benchmark
from varjax.var.model import VARConfig

TINY = VARConfig(depth=1, width=32, heads=2, classes=3, scales=(1, 2))


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(VARConfig, "preset", lambda name: TINY)
    small = functools.partial(VQConfig, width=8, channel_mult=(1, 1), blocks=1, groups=4)
    monkeypatch.setattr(var_benchmark, "VQConfig", small)
    monkeypatch.setattr(MARConfig, "preset", lambda name: runs.MAR)
    monkeypatch.setattr(mar_benchmark, "KLConfig", lambda: runs.KL)
    short = functools.partial(mar_benchmark.MARTask, sampling=runs.MAR_SAMPLING)
    monkeypatch.setattr(mar_benchmark, "MARTask", short)
    monkeypatch.setattr(measure.MatmulPeak, "measure", lambda self: 1e9)


@pytest.fixture
def memory(monkeypatch):
    """Fakes the peak memory of a device: 1 GB, then 3 GB, and 9 GB after a matrix product."""
    used = [1.0, 3.0]

    def measure_product(self):
        used[:] = [9.0]
        return 1e9

    def memory_usage():
        return {"memory_peak_gb": used.pop(0) if len(used) > 1 else used[0]}

    monkeypatch.setattr(measure.MatmulPeak, "measure", measure_product)
    for module in (hardware, evaluate):
        monkeypatch.setattr(module, "memory_usage", memory_usage)


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


@pytest.mark.slow
def test_sample_times_the_transformer_the_decoder_and_the_whole(capsys):
    assert benchmark.main(["sample", "--batch_size=2", "--repeats=1"]) == 0
    whole, transformer, decoder = lines(capsys)
    assert [p["part"] for p in (whole, transformer, decoder)] == ["whole", "transformer", "decoder"]
    work = [p["model_gflop_per_image"] for p in (transformer, decoder, whole)]
    assert work[0] + work[1] == pytest.approx(work[2], rel=1e-3)
    for part in (transformer, decoder, whole):
        assert part["processor"] == hardware.processor_name() and part["cores"] >= 1
        seconds = part["model_gflop_per_image"] * 2 / part["efficiency"]
        assert seconds == pytest.approx(part["seconds"], rel=2e-3)


def test_sample_times_disa_without_counting_its_flop(capsys, memory):
    disa = "--steps=2", "--diffusion_steps=4:2"
    assert benchmark.main(["sample", "--preset=mar_b", "--batch_size=2", "--repeats=1", *disa]) == 0
    whole, transformer, decoder = lines(capsys)
    assert decoder["efficiency"] > 0
    assert whole["peak_memory_gb"] == 3.0  # the matrix product needs more, but comes later
    assert not (transformer | decoder).keys() & {"peak_memory_gb"}
    for part in (transformer, whole):
        assert part["diffusion_steps"] == "4:2" and part["seconds"] > 0
        assert not part.keys() & {"efficiency", "model_gflop_per_image"}


class Painter(FakeSampler):
    """Fakes a model; an image costs the product of (1, 100) and (100, guidance) matrices."""

    params = None

    @property
    def pure(self):
        def draw(params, label_B, key_B, **options):
            return self.sample(label_B, **options)

        return types.SimpleNamespace(sample=draw)

    def sample(self, labels, seed=0, *, guidance, **options):
        return jax.jit(jnp.matmul)(jnp.ones((len(labels), 100)), jnp.ones((100, int(guidance))))


def test_model_passes_on_the_given_options_and_companions(capsys, monkeypatch):
    given = []
    monkeypatch.setattr(model, "load", lambda *args, **kw: given.append((args, kw)) or Painter())
    flags = ["--weights=a", "--guide=b", "--guidance=3", "--batch_size=12", "--repeats=1"]
    assert benchmark.main(["model", *flags]) == 0
    assert given == [(("a", "auto"), {"guide": "b"})]
    (line,) = lines(capsys)
    assert line["weights"] == "a" and line["guide"] == "b"
    assert line["model_gflop_per_image"] == 2 * 100 * 3 / 1e9
    assert line["images_per_second"] * line["seconds"] == pytest.approx(12, rel=2e-3)
    assert benchmark.main(["model", "--weights=a", "--repeats=0"]) == 1
    assert "repeats" in capsys.readouterr().err


@pytest.mark.slow
def test_model_counts_the_flop_of_a_real_model(capsys):
    flags = [f"--weights={runs.untrained_var()}", "--batch_size=2", "--repeats=1"]
    assert benchmark.main(["model", *flags]) == 0
    (line,) = lines(capsys)
    assert line["model_gflop_per_image"] > 0


def test_model_omits_flop_if_a_loop_has_an_unknown_length(capsys, monkeypatch):
    def sample(self, labels, seed=0, **options):
        x_BZ = jnp.ones((len(labels), 5))
        return jax.jit(
            lambda n: jax.lax.fori_loop(0, n, lambda i, x_BZ: x_BZ @ x_BZ.T @ x_BZ, x_BZ)
        )(2)

    monkeypatch.setattr(Painter, "sample", sample)
    monkeypatch.setattr(model, "load", lambda *args, **kw: Painter())
    assert benchmark.main(["model", "--weights=a", "--repeats=1"]) == 0
    (line,) = lines(capsys)
    assert line["seconds"] > 0 and "model_gflop_per_image" not in line


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["d16", "mar_b"])
def test_train_times_the_parts_of_a_step(capsys, preset):
    accumulate = {"d16": 2, "mar_b": 1}[preset]
    flags = [f"--preset={preset}", "--batch_size=2", "--repeats=1", "--remat=block"]
    flags.append(f"--accumulate={accumulate}")
    assert benchmark.main(["train", *flags]) == 0
    parts = {part["part"]: part for part in lines(capsys)}
    assert list(parts) == ["step", "tokenize", "gradient", "update"]
    work = {name: part["model_gflop_per_image"] for name, part in parts.items()}
    assert work["tokenize"] + work["gradient"] == pytest.approx(work["step"], rel=1e-3)
    assert (parts["step"]["remat"], parts["step"]["attention"]) == ("block", "loop")  # on CPUs
    assert parts["gradient"]["accumulate"] == accumulate


def test_evaluate_times_features_and_metrics(capsys, monkeypatch, memory):
    monkeypatch.setattr(evaluate, "random_inception_network", pixel_network)
    monkeypatch.setattr(evaluate, "FEATURES", 12)
    monkeypatch.setattr(evaluate, "COMPARED_IMAGES", 30)
    assert benchmark.main(["evaluate", "--images=20", "--side=4", "--repeats=1"]) == 0
    features, *metrics = lines(capsys)
    assert features["part"] == "features" and features["images_at_once"] > 0
    assert features["peak_memory_gb"] == 1.0  # read before the matrix product
    names = ["fid", "inception_score", "precision_recall", "kid"]
    assert [part["part"] for part in metrics] == names
    assert benchmark.main(["evaluate", "--images=3"]) == 1
    assert "images=3: must be 4 or more" in capsys.readouterr().err


@pytest.mark.slow
def test_checksum_compares_checksums_with_reading(capsys, tmp_path):
    assert benchmark.main(["checksum", "--gigabytes=0.01", f"--folder={tmp_path}"]) == 0
    found = lines(capsys)
    assert [line["part"] for line in found] == ["checkpoint", "safetensors"]
    for line in found:
        assert line["gigabytes"] == pytest.approx(0.0168, rel=1e-2)
        assert line["ratio"] == pytest.approx(
            line["checksum_seconds"] / line["read_seconds"], rel=1e-2
        )
    assert not list(tmp_path.iterdir())


def test_wrong_commands_are_refused(capsys):
    assert benchmark.main(["paint"]) == 2
    assert "sample|model|train|operations|parity|report|table|evaluate|" in capsys.readouterr().err
    assert benchmark.main(["sample", "--batch_size=0"]) == 1
    assert "1 or more" in capsys.readouterr().err


@pytest.mark.parametrize(
    "flag", ["fsdp=-1", "tensor=0", "batch_size=-8", "accumulate=0", "devices=0", "devices=8,-1"]
)
def test_partitioning_refuses_numbers_that_are_too_small(capsys, flag):
    assert benchmark.main(["partitioning", "--sizes_only", f"--{flag}"]) == 1
    name = flag.partition("=")[0]
    assert re.search(f"{name}=.*: must be [01] or more", capsys.readouterr().err)


def test_mar_settings_are_refused_for_var(capsys):
    for command in ("sample --steps=64", "sample --diffusion_steps=9", "parity --steps=8"):
        assert benchmark.main([*command.split(), "--preset=d16"]) == 1
        assert f"{command.split('--')[1]}: has no effect on d16" in capsys.readouterr().err


def test_data_times_each_stage_for_each_number_of_threads(capsys):
    config = ROOT / "configs" / "digits.py"
    flags = ["--batches=2", "--threads=2,1", "--workers=0", "--config.batch_size=30"]
    assert benchmark.main(["data", f"--config={config}", *flags]) == 0
    found = lines(capsys)
    parts = [(line["threads"], line["part"]) for line in found]
    assert parts == [(n, part) for n in (1, 2) for part in ("decode", "augment", "loader")]
    for line in found:
        assert line["images_per_second"] * line["seconds"] == pytest.approx(30, rel=2e-3)
        assert line["batch_mb"] == pytest.approx(30 * (64 + 4) / 1e6)
    for flags, message in {
        ("--threads=many",): "threads is 'many'; give numbers",
        ("--batches=0",): "batches=0: must be at least 1",
        ("--batch_size=8",): "settings are --config.FIELD=VALUE",
    }.items():
        assert benchmark.main(["data", f"--config={config}", *flags]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_train_times_only_the_step_with_cached_latents(capsys):
    assert benchmark.main(["train", "--batch_size=2", "--repeats=1", "--cached"]) == 0
    (step,) = lines(capsys)
    assert (step["part"], step["cached"]) == ("step", True) and step["model_gflop_per_image"] > 0


def test_train_refuses_microbatches_that_do_not_divide_the_batch(capsys):
    assert benchmark.main(["train", "--batch_size=8", "--accumulate=3"]) == 1
    assert "batch of 8 cannot be split into 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("platform", "devices", "memory", "images"),
    [
        ("gpu", 1, 10**12, 128),
        ("gpu", 4, 10**12, 4 * 128),
        ("gpu", 4, 10**9, 4 * 8),  # 100 MB per image, in 80 % of the memory
        ("gpu", 2, None, 2 * 32),
        ("cpu", 1, 10**12, 32),
    ],
)
def test_auto_gives_each_device_the_batch_size_of_sampling(
    monkeypatch, platform, devices, memory, images
):
    monkeypatch.setattr(sample, "device_memory", lambda device: memory)
    device = types.SimpleNamespace(platform=platform)
    assert sample.auto_batch_size(lambda n: n * 10**8, [device] * devices) == images


@pytest.mark.slow
def test_sample_accepts_batch_size_auto(capsys, monkeypatch):
    monkeypatch.setattr(sample, "device_memory", lambda device: 10**7)
    assert benchmark.main(["sample", "--batch_size=auto", "--repeats=1"]) == 0
    for line in lines(capsys):
        assert line["batch_size"] in sample.SIZES[1:]  # limited by the memory
        assert 0 < line["needed_gb"] <= 0.8e-2 < 2 * line["needed_gb"]
