"""What the devices here can do, and how full their memory is."""

import functools
import re
import resource
import sys
import time

import jax
import jax.numpy as jnp

# Published TFLOP/s of dense matrix products in bfloat16 (T4, V100: float16), of what JAX calls one
# device: of TPU v2, v3 and 7x a half of a chip, of MI250 too. The first match in `device_kind`.
PEAKS = (
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
    (r"A(100|800)", 312),
    (r"L40S", 362),
    (r"L40\b", 181),
    (r"L4\b", 121),
    (r"A40\b", 150),
    (r"A10G", 70),
    (r"A10\b", 125),
    (r"RTX 6000 Ada", 364),
    (r"RTX A6000", 155),
    (r"RTX 5090", 209),
    (r"RTX 4090", 165),
    (r"RTX 3090", 71),
    (r"\bT4\b", 65),
    (r"V100", 125),
    (r"MI3[02]", 1307),
    (r"MI250", 191),
)


def peak_flops() -> float:
    """FLOP/s that one device here can reach at most: as published, else measured once."""
    return published_peak(jax.devices()[0].device_kind) or measured_peak()


def published_peak(device_kind: str) -> float | None:
    """FLOP/s by PEAKS; None for an unknown device."""
    found = (peak * 1e12 for pattern, peak in PEAKS if re.search(pattern, device_kind))
    return next(found, None)


@functools.cache
def measured_peak() -> float:
    """FLOP/s of a large matrix product, the best of three: bfloat16, on a CPU float32."""
    size, dtype = (2048, jnp.float32) if jax.default_backend() == "cpu" else (8192, jnp.bfloat16)
    x = jax.random.normal(jax.random.key(0), (size, size), dtype)
    product = jax.jit(lambda x: jnp.matmul(x, x))
    product(x).block_until_ready()
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        product(x).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * size**3 / min(seconds)


def memory() -> dict[str, float]:
    """GB in use now and at most so far, on the fullest device of this process.

    Where devices do not tell, as CPUs, only what the process had in use at most.
    """
    statistics = [s for device in jax.local_devices() if (s := device.memory_stats())]
    if statistics:
        names = {"memory_gb": "bytes_in_use", "memory_peak_gb": "peak_bytes_in_use"}
        return {
            name: max(s.get(field, 0) for s in statistics) / 1e9 for name, field in names.items()
        }
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"memory_peak_gb": peak / 1e9}
