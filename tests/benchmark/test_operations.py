"""Tests which operations are measured on each platform, and how their FLOP are counted."""

import contextlib
import importlib.machinery
import importlib.util
import itertools
import json
import sys
import types

import pytest

from varjax.benchmark import __main__ as benchmark
from varjax.benchmark.operations import operations
from varjax.models import benchmark_of
from varjax.nn.compute import ComputeConfig
from varjax.runtime import flops

TRAINING = "attention in training, {} tokens"
DROPOUT = "attention with dropout, 320 tokens"


def attention(platform, dtype):
    """Returns the attention operations measured with d16, by (part, implementation)."""
    compute = ComputeConfig(dtype, platform=platform)
    task = benchmark_of("d16").training_task("d16", compute)
    found = (o for o in operations(task, 8, compute) if "attention" in o.part)
    return {(o.part, o.labels["implementation"]): o for o in found}


@pytest.mark.parametrize(
    ("platform", "dtype", "tokens", "implementations", "dropout"),
    [
        ("cpu", "float32", (680,), ("xla", "loop"), "loop"),
        ("gpu", "bfloat16", (680, 2240), ("xla", "cudnn"), "xla"),
        ("gpu", "float32", (680, 2240), ("xla",), "xla"),
        ("tpu", "bfloat16", (680, 2240), ("xla", "splash"), "xla"),
        ("tpu", "float32", (680, 2240), ("xla",), "xla"),
    ],
)
def test_attention_is_measured_with_the_implementations_of_the_platform(
    platform, dtype, tokens, implementations, dropout
):
    found = attention(platform, dtype)
    training = {(TRAINING.format(n), name) for n in tokens for name in implementations}
    sampling = {("attention, 256 queries", name) for name in {*implementations, "loop"}}
    assert set(found) == training | sampling | {(DROPOUT, dropout)}


def test_training_flop_cover_values_and_gradients_within_the_mask():
    found = attention("tpu", "bfloat16")

    def work(part, implementation):
        operation = found[part, implementation]
        return flops.count(operation.plain, *operation.shapes)

    product = 2 * 8 * 12 * 320**2 * 64  # one product in MAR-B's decoder, for 8 images
    assert work(DROPOUT, "xla") == 6 * product  # two forward, four backward
    whole = 6 * 2 * 8 * 16 * 680**2 * 64
    assert 0.5 * whole < work(TRAINING.format(680), "xla") < 0.8 * whole
    assert work(TRAINING.format(680), "splash") == work(TRAINING.format(680), "xla")


class Tensor:
    """Stands in for a PyTorch tensor; it has only a shape."""

    def __init__(self, *shape):
        self.shape = shape

    def __mul__(self, factor):
        return self

    def __matmul__(self, other):
        return Tensor(self.shape[0], other.shape[1])

    def to(self, memory_format):
        assert memory_format == "channels_last"
        return self

    def requires_grad_(self):
        return self

    def detach(self):
        return self


@pytest.fixture
def torch(monkeypatch):
    """Installs a PyTorch that computes nothing, and returns the list of its calls."""
    called = []

    def function(name):
        def call(*tensors, **options):
            called.append((name, *(t.shape for t in tensors if isinstance(t, Tensor)), options))
            return Tensor()

        return call

    module = types.ModuleType("torch")
    module.__spec__ = importlib.machinery.ModuleSpec("torch", None)
    names = ("conv2d", "scaled_dot_product_attention")
    functional = types.SimpleNamespace(**{name: function(name) for name in names})
    vars(module).update(
        __version__="2.13.0",
        float32="float32",
        channels_last="channels_last",
        cuda=types.SimpleNamespace(is_available=lambda: False),
        randn=lambda shape, device, dtype: Tensor(*shape),
        no_grad=contextlib.nullcontext,
        nn=types.SimpleNamespace(functional=functional),
        autograd=types.SimpleNamespace(grad=function("grad")),
    )
    monkeypatch.setitem(sys.modules, "torch", module)
    return called


def test_pytorch_operations_have_the_same_names_shapes_and_flop(capsys, torch):
    flags = ["--preset=d16", "--torch", "--batch_size=2", "--repeats=1", "--dtype=float32"]
    assert benchmark.main(["operations", *flags]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(x["library"], x["torch_device"]) for x in lines} == {("torch 2.13.0", "cpu")}
    compute = ComputeConfig("float32", platform="cpu")
    task = benchmark_of("d16").training_task("d16", compute)
    first = itertools.takewhile(lambda o: "top-k" not in o.part, operations(task, 2, compute))
    ours = {operation.part: operation for operation in first}
    product, *others = lines
    assert product["part"] == "matrix product 4096x4096"
    assert {x["part"] for x in others} == {
        part for part in ours if "convolution" in part or "queries" in part
    }
    for line in others:
        operation = ours[line["part"]]
        work = flops.count(operation.plain, *operation.shapes)
        assert line["tflops"] * line["milliseconds"] * 1e9 == pytest.approx(work, rel=2e-3)
    shapes = (4, 16, 256, 64), (4, 16, 680, 64), (4, 16, 680, 64)  # two streams for guidance
    assert ("scaled_dot_product_attention", *shapes, {}) in torch
    assert ("conv2d", (2, 160, 256, 256), (160, 160, 3, 3), {"padding": 1}) in torch


def test_missing_pytorch_is_reported(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["operations", "--torch"]) == 1
    assert "PyTorch is not installed" in capsys.readouterr().err
