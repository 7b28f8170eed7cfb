"""Measures the speed and memory of this machine's devices."""

import functools
import os
import pathlib
import platform
import re
import resource
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# Linux's control groups, version 2 and 1. The former contains "max" if there is no limit.
CONTAINER_LIMITS = (
    pathlib.Path("/sys/fs/cgroup/memory.max"),
    pathlib.Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
# Published TFLOP/s of dense matmuls in bfloat16 (T4, V100: float16) for one JAX device,
# which is half a chip for TPU v2, v3 and 7x and MI250. The first match in `device_kind` counts.
PUBLISHED_TFLOPS = (
    (r"TPU v2", 23),
    (r"TPU v3", 61.5),
    (r"TPU v4 lite", 137),
    (r"TPU v4", 275),
    (r"TPU v5( lite|e)", 197),
    (r"TPU v5", 459),
    (r"TPU v6", 918),
    (r"TPU7x", 1153),
    (r"GB200", 2500),
    (r"B200", 2250),
    (r"H[12]00 NVL", 835),
    (r"H100 PCIe", 756),
    (r"H(100|200|800)", 989),
    (r"A(100|800)(?!0)", 312),  # not the RTX A1000
    (r"L40S", 362),
    (r"L40\b", 181),
    (r"L4\b", 121),
    (r"A40\b", 150),
    (r"A10G", 70),
    (r"A10\b", 125),
    (r"RTX 6000 Ada", 364),
    (r"RTX A6000", 155),
    (r"RTX 5090(?! Laptop| D\b)", 209),
    (r"RTX 4090(?! Laptop| D\b)", 165),
    (r"RTX 3090", 71),
    (r"\bT4\b", 65),
    (r"V100", 125),
    (r"MI3[02]", 1307),
    (r"MI250", 191),
)


def peak_flops() -> float:
    """Returns the peak FLOP/s of one device: the published number, otherwise a measured one."""
    return published_peak_flops(jax.devices()[0].device_kind) or measured_peak_flops()


def published_peak_flops(device_kind: str) -> float | None:
    """Returns FLOP/s from PUBLISHED_TFLOPS; None for an unknown device."""
    matches = (tera for pattern, tera in PUBLISHED_TFLOPS if re.search(pattern, device_kind))
    return next((tera * 1e12 for tera in matches), None)


@functools.cache
def measured_peak_flops() -> float:
    """Measures the FLOP/s of one device once, in bfloat16 or, on a CPU, in float32."""
    if jax.default_backend() == "cpu":
        return matmul_flops(2048, jnp.float32)
    return matmul_flops(8192, jnp.bfloat16)


def matmul_flops(size: int, dtype: Any, precision: Any = None, repeats: int = 3) -> float:
    """Measures the FLOP/s of a product of two (size, size) matrices on one device.

    Args:
        size: rows and columns of each square matrix.
        dtype: dtype of both matrices.
        precision: precision of the product, as `jnp.matmul` takes it.
        repeats: number of products to time; the fastest one counts.
    """
    # Drawn again at each call, because they take up to a gigabyte of a device; compiled once.
    a, b = (
        jax.random.normal(key, (size, size), dtype) for key in jax.random.split(jax.random.key(0))
    )
    return 2 * size**3 / fastest_seconds(lambda: _matmul(a, b, precision), repeats)


@functools.partial(jax.jit, static_argnums=2)
def _matmul(a: jax.Array, b: jax.Array, precision: Any) -> jax.Array:
    return jnp.matmul(a, b, precision=precision)


def fastest_seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """Times a function until its result is ready: the fastest of `repeats` calls, after a first."""
    jax.block_until_ready(function())
    seconds = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def memory_usage() -> dict[str, float]:
    """Returns memory_gb, in use now, and memory_peak_gb, the largest so far.

    Both are of the fullest device of this process, in units of 1e9 bytes. For devices that do not
    report memory, such as CPUs, only the memory_peak_gb of the process is returned.
    """
    statistics = [s for device in jax.local_devices() if (s := device.memory_stats())]
    if statistics:
        names = {"memory_gb": "bytes_in_use", "memory_peak_gb": "peak_bytes_in_use"}
        return {
            name: max(s.get(field, 0) for s in statistics) / 1e9 for name, field in names.items()
        }
    return {"memory_peak_gb": process_peak_gb()}


def device_memory(device: Any) -> int | None:
    """Returns the bytes that JAX may use on a device; None if the device does not report it.

    For a CPU, this is the machine's memory or the container's limit, divided by the CPU devices.
    """
    if device.platform != "cpu":
        return (device.memory_stats() or {}).get("bytes_limit")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for path in CONTAINER_LIMITS:
        text = path.read_text().strip() if path.exists() else ""
        memory = min(memory, int(text)) if text.isdigit() else memory
    return memory // jax.local_device_count()


@functools.cache
def processor_name() -> str:
    """Returns the name of the processor, which Python does not know on Linux."""
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    text = cpuinfo.read_text() if cpuinfo.exists() else ""
    match = re.search(r"model name\s*:\s*(.*)", text)
    return match[1] if match else platform.processor()


def process_peak_gb() -> float:
    """Returns the peak host memory of this process so far, in units of 1e9 bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9
