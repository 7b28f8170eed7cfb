"""Tests measurements of this machine's devices."""

import jax
import jax.numpy as jnp
import pytest

from varjax.runtime import hardware


def test_a_matmul_is_compiled_only_for_its_first_measurement(caplog):
    hardware.matmul_flops(24, jnp.float32, "highest")
    with jax.log_compiles():
        assert hardware.matmul_flops(24, jnp.float32, "highest") > 0
        assert not [record for record in caplog.records if "Compiling" in record.getMessage()]
        hardware.matmul_flops(40, jnp.float32, "highest")
        assert [record for record in caplog.records if "Compiling" in record.getMessage()]


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("TPU v2", 23),
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A100X", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA B200", 2250),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
        ("NVIDIA GeForce RTX 4090", 165),
    ],
)
def test_known_devices_have_their_published_peak(kind, tflops):
    assert hardware.published_peak_flops(kind) == tflops * 1e12


@pytest.mark.parametrize(
    "kind", ["NVIDIA RTX A1000", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D"]
)
def test_a_device_is_not_taken_for_a_faster_one_with_a_similar_name(kind):
    assert hardware.published_peak_flops(kind) is None


@pytest.mark.slow
def test_an_unknown_device_is_measured_once():
    assert hardware.published_peak_flops("cpu") is None
    peak = hardware.peak_flops()
    assert 1e9 < peak < 1e15 and peak == hardware.peak_flops()


def test_memory_usage_reports_the_peak_of_the_process():
    found = hardware.memory_usage()
    assert found.keys() <= {"memory_gb", "memory_peak_gb"}
    before = found["memory_peak_gb"]
    held = bytearray(300_000_000)
    assert len(held) and hardware.memory_usage()["memory_peak_gb"] >= max(before, 0.3)


def test_memory_usage_is_that_of_the_fullest_device(monkeypatch):
    class Device:
        def __init__(self, now, most):
            self.memory_stats = lambda: {"bytes_in_use": now, "peak_bytes_in_use": most}

    devices = [Device(3e9, 5e9), Device(2e9, 8e9)]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    assert hardware.memory_usage() == {"memory_gb": 3.0, "memory_peak_gb": 8.0}
