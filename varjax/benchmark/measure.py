"""What every benchmark needs: seconds, memory, and the machine's own speed."""

import json
import resource
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """The fastest of `repeats` calls, until the result is there. Warm up first."""
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return min(times)


def matmul_flops(dtype: Any) -> float:
    """FLOP/s of a large square matrix product in `dtype` here and now: what one could hope for."""
    size = 4096 if jax.default_backend() == "cpu" else 16384
    a, b = (jax.random.normal(jax.random.key(i), (size, size), dtype) for i in range(2))
    precision = "highest" if dtype == jnp.float32 else None
    product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
    jax.block_until_ready(product(a, b))
    return 2 * size**3 / seconds(lambda: product(a, b), 5)


def peak_memory() -> int:
    """Bytes: the device's peak where it tells, else the process's (on a CPU they are the same)."""
    statistics = jax.devices()[0].memory_stats()
    if statistics:
        return statistics["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def show(**figures: Any) -> None:
    """One JSON line, with the machine that it was measured on."""
    machine = {"device": jax.devices()[0].device_kind, "jax": jax.__version__}
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded | machine), flush=True)
