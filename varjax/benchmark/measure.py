"""Holds what benchmarks share: flags, output, and the speed of the machine."""

import argparse
import json
import os
from collections.abc import Callable, Mapping
from typing import Any, get_args

import jax
import jax.numpy as jnp
from jax.experimental import topologies

from varjax.data.workers import available_cpus
from varjax.errors import InputError
from varjax.nn.compute import AttentionImpl, ComputeConfig, Remat, matmul_precision
from varjax.runtime import hardware
from varjax.runtime.commands import command_parser


class MatmulPeak:
    """Measures the FLOP/s of a large square matrix product, as an upper bound for programs.

    peak = MatmulPeak(jnp.bfloat16)
    efficiency = flop / seconds / peak.measure()

    Attributes:
        size: rows and columns of both matrices.
    """

    def __init__(self, dtype: Any):
        self.size = 4096 if jax.default_backend() == "cpu" else 16384
        self._dtype, self._best = jnp.dtype(dtype), 0.0

    def measure(self) -> float:
        """Measures again and returns the best FLOP/s so far.

        Call it next to the measurement that it is compared with, because shared machines change
        speed.
        """
        precision = matmul_precision(self._dtype)
        measured = hardware.matmul_flops(self.size, self._dtype, precision, repeats=5)
        self._best = max(self._best, measured)
        return self._best


def measure_call(function: Callable[[], Any], repeats: int) -> dict[str, float]:
    """Times a function, and reads the memory before anything else needs some.

    Args:
        function: function to call, once more than `repeats`.
        repeats: number of calls to time; the fastest one counts.

    Returns:
        "seconds", and "peak_memory_gb", the most memory in use, in 1e9 bytes. The latter is left
        out where this process has already used as much for something else, because devices report
        only the largest number since the start.
    """
    before = hardware.memory_usage()["memory_peak_gb"]
    seconds = hardware.fastest_seconds(function, repeats)
    peak = hardware.memory_usage()["memory_peak_gb"]
    return {"seconds": seconds} | ({"peak_memory_gb": peak} if peak > before else {})


def print_figures(**figures: Any) -> None:
    """Prints one JSON line: the figures, and the machine that they were measured on."""
    machine = {
        "device": jax.devices()[0].device_kind,
        "processor": hardware.processor_name(),
        "cores": available_cpus(),
        "jax": jax.__version__,
    }
    rounded = {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps(rounded | machine), flush=True)


def model_parser(
    name: str, description: str | None, batch_size: Callable[[str], Any] = int
) -> argparse.ArgumentParser:
    """Makes the parser of `varjax benchmark NAME`, with the flags that models' benchmarks share.

    batch_size: function that reads --batch_size.
    """
    parser = command_parser(f"varjax benchmark {name}", description)
    add = parser.add_argument
    add("--preset", default="d16", help="d16, d20, d24, d30, d36, mar_b, mar_l or mar_h (d16)")
    add("--batch_size", type=batch_size, default=8, help="images at a time (8)")
    add(
        "--dtype",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="dtype of the matmuls (auto)",
    )
    add(
        "--attention_impl",
        choices=get_args(AttentionImpl),
        default="auto",
        help="implementation of attention (auto)",
    )
    add("--repeats", type=int, default=3, help="calls to time; the fastest one counts (3)")
    add("--cache", help="folder that keeps compiled programs for the next run")
    return parser


def add_refiner_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of collaborative decoding."""
    parser.add_argument("--refiner", default="", help="size of a VAR that draws the fine scales")
    about = "number of scales before those of the refiner (8); only with --refiner"
    parser.add_argument("--draft_scales", type=int, help=about)


def add_steps_flag(parser: argparse.ArgumentParser, default: int) -> None:
    """Adds --steps of MAR's sampler, None if it is not given; see `check_sampler_flags`."""
    parser.add_argument("--steps", type=int, help=f"number of MAR sampling steps ({default})")


def check_sampler_flags(flags: argparse.Namespace, setting: Mapping[str, Any]) -> None:
    """Raises InputError for a flag of a sampler that the chosen model's sampler does not have.

    setting: `SamplingPrograms.setting` of the model.
    """
    for name in ("steps", "diffusion_steps"):
        value = getattr(flags, name, None)
        if value is not None and name not in setting:
            raise InputError(
                f"{name}={value}: has no effect on {flags.preset}; leave --{name} out, or choose a "
                "preset of MAR, such as mar_b"
            )


def add_training_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --accumulate, and the flags of `ComputeConfig` that only training uses."""
    parser.add_argument("--accumulate", type=int, default=1, help="microbatches in a step (1)")
    about = "what the backward pass recomputes (dots, as in most recipes)"
    parser.add_argument("--remat", choices=get_args(Remat), default="dots", help=about)
    parser.add_argument("--unroll", action="store_true", help="unroll the layers")


def compute_from_flags(flags: argparse.Namespace, **others: Any) -> ComputeConfig:
    """Checks the flags of `model_parser`, turns on the compilation cache, returns the config.

    Raises InputError for a number below 1.
    """
    if flags.batch_size != "auto" and flags.batch_size < 1 or flags.repeats < 1:
        raise InputError("batch_size and repeats must be 1 or more")
    if flags.cache:
        jax.config.update("jax_compilation_cache_dir", flags.cache)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    return ComputeConfig(dtype=flags.dtype, attention_impl=flags.attention_impl, **others)


def tpu_devices(topology: str) -> list[Any]:
    """Returns devices to compile for, without any TPU in this machine.

    Raises InputError for an unknown topology, or if libtpu is missing.
    """
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # the query takes minutes outside a cloud VM
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # compiling opens no TPU
    try:
        return list(topologies.get_topology_desc(topology, "tpu").devices)
    except Exception as error:  # libtpu raises several types
        raise InputError(
            f"cannot compile for --topology={topology}: {str(error)[:300]}. Compiling needs "
            "`pip install libtpu`, and a TPU type with its grid, such as v5e:2x4 or v4:2x2x2"
        ) from error
