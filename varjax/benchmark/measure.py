"""What every benchmark needs: seconds, memory, and the machine's own speed."""

import argparse
import json
import resource
import time
from collections.abc import Callable
from typing import Any, get_args

import jax
import jax.numpy as jnp

from varjax.core.errors import InputError
from varjax.nn.compute import Attention, Compute, precision_of


def seconds(function: Callable[[], Any], repeats: int = 3) -> float:
    """The fastest of `repeats` calls after a first one, until the result is there."""
    jax.block_until_ready(function())
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        jax.block_until_ready(function())
        times.append(time.perf_counter() - begin)
    return min(times)


class Peak:
    """FLOP/s of a large square matrix product in `dtype` on one device: what one could hope for."""

    def __init__(self, dtype: Any):
        self._size = 4096 if jax.default_backend() == "cpu" else 16384
        self._dtype, self._best = jnp.dtype(dtype), 0.0

    def measure(self) -> float:
        """The best so far. Ask next to what it is held against: shared machines change speed."""
        keys, shape = jax.random.split(jax.random.key(0)), (self._size, self._size)
        a, b = (jax.random.normal(key, shape, self._dtype) for key in keys)
        precision = precision_of(self._dtype)
        product = jax.jit(lambda a, b: jnp.matmul(a, b, precision=precision))
        self._best = max(self._best, 2 * self._size**3 / seconds(lambda: product(a, b), 5))
        return self._best


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


def parser_of(name: str, about: str | None) -> argparse.ArgumentParser:
    """The flags that benchmarks of models share."""
    parser = argparse.ArgumentParser(f"varjax.benchmark {name}", description=about)
    parser.add_argument("--preset", default="d16", help="d16, d20, d24, d30 or d36")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto")
    parser.add_argument("--attention", choices=get_args(Attention), default="auto")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cache", help="a folder for compiled programs, for the next run to use")
    return parser


def compute_of(flags: argparse.Namespace, **others: Any) -> Compute:
    """What the flags say, after checking them and turning the cache on; ValueError."""
    if flags.batch_size < 1 or flags.repeats < 1:
        raise InputError("batch_size and repeats must be 1 or more")
    if flags.cache:
        jax.config.update("jax_compilation_cache_dir", flags.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return Compute(dtype=flags.dtype, attention=flags.attention, **others)
