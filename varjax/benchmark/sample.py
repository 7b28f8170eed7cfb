"""Measures how fast a transformer of a released size draws images; its weights are random.

varjax benchmark sample --preset=d16 --batch_size=8
varjax benchmark sample --preset=d16 --batch_size=auto
varjax benchmark sample --preset=mar_b --batch_size=8 --steps=64 --diffusion_steps=50:5
varjax benchmark sample --preset=d30 --dtype=bfloat16 --fits=16,24,40,80
varjax benchmark sample --preset=d30 --refiner=d16 --draft_scales=8 --batch_size=1
"""

import argparse
import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from varjax import trees
from varjax.benchmark.measure import (
    MatmulPeak,
    add_refiner_flags,
    add_steps_flag,
    check_sampler_flags,
    compute_from_flags,
    measure_call,
    model_parser,
    print_figures,
)
from varjax.models import benchmark_of, choose_draft_scales
from varjax.nn.compute import ComputeConfig, without_repeated_work
from varjax.runtime import flops
from varjax.runtime.data_parallel import batch_mesh, data_parallel, replicate
from varjax.runtime.hardware import device_memory
from varjax.sampling.batch_size import (
    LARGEST_ON_CPU,
    SIZES,
    WITHOUT_MEMORY,
    fitting_batch_size,
    size_or_auto,
)
from varjax.sampling.programs import SamplingPrograms
from varjax.sampling.sampler import image_keys

STEPS = 64  # of MAR


def main(arguments: list[str]) -> None:
    """Reads the command line and prints the figures; raises InputError."""
    parser = model_parser("sample", __doc__, size_or_auto)
    parser.add_argument(
        "--compile_only", action="store_true", help="only compile, which needs less memory"
    )
    about = "print only the batch size that auto chooses for devices with 16,24,… GB of memory"
    parser.add_argument("--fits", type=_gigabytes, metavar="GB,GB", help=about)
    add_steps_flag(parser, STEPS)
    about = "MAR's denoising steps of a token; FIRST:LAST for DiSA, with uncounted FLOP (100)"
    parser.add_argument("--diffusion_steps", help=about)
    add_refiner_flags(parser)
    flags = parser.parse_args(arguments)
    draft_scales = choose_draft_scales(flags.refiner, flags.draft_scales)
    programs = benchmark_of(flags.preset).sampling_programs(
        flags.preset,
        STEPS if flags.steps is None else flags.steps,
        refiner=flags.refiner,
        draft_scales=draft_scales,
        diffusion_steps="100" if flags.diffusion_steps is None else flags.diffusion_steps,
    )
    check_sampler_flags(flags, programs.setting)
    compute = compute_from_flags(flags)
    if flags.fits:
        print_fitting_batch_sizes(programs, flags.preset, compute, flags.fits)
        return
    measure_sampling(
        programs, flags.preset, flags.batch_size, compute, flags.repeats, flags.compile_only
    )


def print_fitting_batch_sizes(
    programs: SamplingPrograms, preset: str, compute: ComputeConfig, gigabytes: Sequence[float]
) -> None:
    """Prints what --batch_size=auto chooses on devices with this much memory, by arithmetic."""
    dtype, (weights, needed) = compute.jax_dtype, memory_needed(programs, compute)
    for memory in gigabytes:
        size = fitting_batch_size(needed, int(memory * 1e9), max(SIZES))
        print_figures(
            benchmark="sample",
            preset=preset,
            dtype=str(dtype),
            **programs.setting,
            memory_gb=memory,
            batch_size=size,
            weights_gb=weights / 1e9,
            needed_gb=needed(size) / 1e9,
        )


def memory_needed(
    programs: SamplingPrograms, compute: ComputeConfig
) -> tuple[int, Callable[[int], int]]:
    """Returns the bytes of the weights, and a function of the batch size for all bytes needed."""
    params = jax.eval_shape(programs.init, jax.random.key(0))
    cast = jax.eval_shape(lambda p: trees.cast(programs.cast, p, compute.jax_dtype), params)
    weights = trees.nbytes(cast)
    return weights, lambda size: weights + programs.bytes_needed(size, compute)


def auto_batch_size(needed: Callable[[int], int], devices: Sequence[Any]) -> int:
    """Returns how many images all devices draw at a time, each as many as sampling chooses.

    Args:
        needed: number of images on a device -> bytes needed; see `memory_needed`.
        devices: devices that sample.
    """
    memory = [device_memory(device) for device in devices]
    if None in memory:
        return WITHOUT_MEMORY * len(devices)
    largest = LARGEST_ON_CPU if devices[0].platform == "cpu" else max(SIZES)
    return fitting_batch_size(needed, min(x for x in memory if x), largest) * len(devices)


def measure_sampling(
    programs: SamplingPrograms,
    preset: str,
    batch_size: int | Literal["auto"],
    compute: ComputeConfig,
    repeats: int,
    compile_only: bool,
) -> None:
    """Prints a line for the whole program, one for its transformer, and one for its decoder.

    These are the programs that the pipelines run. needed_gb is the arithmetic by which "auto"
    chooses the batch size; peak_memory_gb is left out of parts that need less than earlier ones.
    efficiency: model FLOP ÷ (seconds × FLOP/s of a large matrix product, same run, same dtype).
    """
    dtype, mesh = compute.jax_dtype, batch_mesh()
    _, needed = memory_needed(programs, compute)
    if batch_size == "auto":
        batch_size = auto_batch_size(needed, list(mesh.devices.flat))
    per_device = -(-batch_size // mesh.size)
    index_B = jnp.arange(batch_size)
    label_B, key_B = index_B % programs.classes, image_keys(0, index_B)

    def decode(params, _, latents, compute):
        return programs.decode(params, latents, compute)

    parts = {
        "whole": (programs.whole, (label_B, key_B)),
        "transformer": (programs.sample, (label_B, key_B)),
        "decoder": (decode, (jnp.zeros((batch_size, *programs.latent_shape)),)),
    }
    setting = {
        "benchmark": "sample",
        "preset": preset,
        "batch_size": batch_size,
        "devices": mesh.size,
        "dtype": str(dtype),
        "attention": compute.attention_implementation(cached=programs.cached),
        **programs.setting,
    }

    def init(key):
        return trees.cast(programs.cast, programs.init(key), dtype)

    abstract = jax.eval_shape(init, jax.random.key(0))
    params = None if compile_only else replicate(jax.jit(init)(jax.random.key(0)), mesh)
    peak = MatmulPeak(dtype)
    plain = without_repeated_work(compute)
    for name, (function, batch) in parts.items():
        begin = time.perf_counter()
        program = data_parallel(lambda *a, f=function: f(*a, compute), mesh)
        compiled = program.lower(abstract, programs.options, *batch).compile()
        figures = {"part": name, "compile_seconds": time.perf_counter() - begin}
        if params is not None:
            figures |= measure_call(lambda: compiled(params, programs.options, *batch), repeats)  # noqa: B023
            seconds, speed = figures["seconds"], peak.measure()
            figures["images_per_second"] = batch_size / seconds
            with contextlib.suppress(flops.UnknownIterations):
                work = flops.count(
                    lambda *a, f=function: f(*a, plain), abstract, programs.options, *batch
                )
                figures |= {
                    "model_gflop_per_image": work / batch_size / 1e9,
                    "efficiency": work / seconds / speed / mesh.size,
                }
            figures |= {"matmul_gflops": speed / 1e9, "needed_gb": needed(per_device) / 1e9}
        print_figures(**setting, **figures)


def _gigabytes(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give numbers such as 16,24,40,80") from None
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text}: give numbers above 0")
    return values
