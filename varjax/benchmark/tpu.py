"""Prints what the TPU's compiler estimates for a model of a released size; no TPU is needed.

varjax benchmark tpu --preset=d16 --what=sample --batch_size=16
varjax benchmark tpu --preset=d16 --what=train --batch_size=8 --cached --topology=v6e:1x1
varjax benchmark tpu --preset=d16 --what=train --batch_size=8 --cached --unroll
varjax benchmark tpu --preset=d16 --what=train --batch_size=24 --accumulate=3 --cached
varjax benchmark tpu --preset=d30 --refiner=d16 --draft_scales=8 --batch_size=1
varjax benchmark tpu --preset=mar_b --batch_size=8 --diffusion_steps=50:5 --parts

Requires `pip install libtpu`. The compiler annotates each instruction with the cycles it expects.
They are added up, with loops counted as often as they run, and divided by the chip's clock. The sum
is an estimate: good for comparing two programs, not for predicting a speed (docs/benchmarks.md says
what it leaves out). Kernels have no cycles; kernels_without_estimate is how many of them run. There
is a line for each category, and a last one for the total.

--parts compiles the program in pieces and prints a line for each, with the number of times that it
runs. Use it if the whole takes too much time or memory, to see which scale takes the time, or for
DiSA, whose loops have lengths that the compiler does not know.
"""

import collections
import dataclasses
import re
import time
from collections.abc import Iterator
from typing import Any, Literal, get_args

import jax
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from varjax.benchmark.hlo_text import executed_instructions
from varjax.benchmark.measure import (
    add_refiner_flags,
    add_steps_flag,
    add_training_flags,
    check_sampler_flags,
    compute_from_flags,
    model_parser,
    print_figures,
    tpu_devices,
)
from varjax.benchmark.pieces import decoding, encoding, sampling, training
from varjax.errors import InputError
from varjax.models import benchmark_of, choose_draft_scales
from varjax.nn.compute import ComputeConfig, Precision, without_repeated_work
from varjax.runtime import flops
from varjax.runtime.hardware import published_peak_flops
from varjax.sampling.programs import Program

# GHz, by the first letters of `device_kind`.
CLOCKS = {"TPU v4": 1.05, "TPU v5 lite": 1.5, "TPU v5": 1.75, "TPU v6": 1.75}
# An instruction belongs to the first category whose pattern its path matches, otherwise to "rest".
CATEGORIES = (
    ("encoder", r"\bencoder\b"),
    ("decoder", r"\bdecoder\b"),
    ("quantizer", r"Quantizer|\bquantizer\b"),
    ("cache", r"\bcache\b"),
    ("filters", r"\bfilters\b"),
    ("casts", r"convert_element_type$|^$"),
    ("attention", r"\battention\b"),
    ("head", r"\bhead\b|_logits"),
    ("optimizer", r"\boptimizer\b"),
    ("GEMMs", r"dot_general"),
    ("norms", r"\bmodulate\b|/(norm|encoder_norm|decoder_norm)\w*\b"),
)
What = Literal["sample", "train", "encode", "decode"]
# Flags with an effect on some programs only.
USED_BY: dict[str, tuple[What, ...]] = {
    "parts": ("sample", "train"),
    "cached": ("train",),
    "unguided": ("sample",),
    "steps": ("sample",),
    "diffusion_steps": ("sample",),
    "accumulate": ("train",),
    "remat": ("train",),
    "unroll": ("sample", "train"),
}
STEPS = 64  # of MAR


def main(arguments: list[str]) -> None:
    """Reads the command line and prints the figures; raises InputError."""
    parser = model_parser("tpu", __doc__)
    add = parser.add_argument
    about = (
        "what to compile: sampling, a training step, the tokenizer's encoder or decoder (sample)"
    )
    add("--what", choices=get_args(What), default="sample", help=about)
    add("--topology", default="v5e:1x1", help="type and grid of the chips; one is used (v5e:1x1)")
    about = "precision of the products in the tokenizer's encoder (auto)"
    precisions = ("auto", *get_args(Precision))
    add("--encoder_precision", choices=precisions, default="auto", help=about)
    add_training_flags(parser)
    add("--cached", action="store_true", help="train on cached tokens instead of images")
    add("--unguided", action="store_true", help="sample without guidance")
    add_steps_flag(parser, STEPS)
    about = "denoising steps of a MAR token; FIRST:LAST (DiSA) needs --parts (100)"
    add("--diffusion_steps", help=about)
    add("--parts", action="store_true", help="compile the program in pieces")
    add_refiner_flags(parser)
    flags = parser.parse_args(arguments)
    for name, uses in USED_BY.items():
        if flags.what not in uses and getattr(flags, name) != parser.get_default(name):
            raise InputError(
                f"{name}={getattr(flags, name)}: has no effect with --what={flags.what}; leave "
                f"--{name} out, or use it with --what={' or '.join(uses)}"
            )
    draft_scales = choose_draft_scales(flags.refiner, flags.draft_scales)
    if flags.refiner and (flags.what != "sample" or flags.parts):
        raise InputError(f"refiner={flags.refiner}: needs --what=sample, without --parts")
    if ":" in (flags.diffusion_steps or "") and not flags.parts:
        raise InputError(
            f"diffusion_steps={flags.diffusion_steps}: the compiler does not know how often DiSA's "
            "loops run; add --parts"
        )
    jax.config.update("jax_platforms", "cpu")
    steps = STEPS if flags.steps is None else flags.steps
    denoising = "100" if flags.diffusion_steps is None else flags.diffusion_steps
    sampler = benchmark_of(flags.preset).sampling_programs(
        flags.preset, steps, not flags.unguided, flags.refiner, draft_scales, denoising
    )
    check_sampler_flags(flags, sampler.setting)
    compute = compute_from_flags(
        flags,
        remat=flags.remat,
        unroll=flags.unroll,
        platform="tpu",
        encoder_precision=flags.encoder_precision,
    )
    device = tpu_devices(flags.topology)[0]
    size = flags.batch_size, compute
    if flags.what == "sample":
        programs = sampling(sampler, *size, flags.parts)
    elif flags.what == "train":
        programs = training(flags.preset, *size, flags.cached, flags.parts, flags.accumulate)
    elif flags.what == "encode":
        programs = encoding(flags.preset, *size)
    else:
        programs = decoding(sampler, *size)
    options: dict[str, Any] = {}
    if flags.what == "train":
        options = {name: getattr(flags, name) for name in ("accumulate", "cached", "remat")}
    elif flags.what == "sample":
        options = {**sampler.setting, "unguided": flags.unguided}
    if flags.what in USED_BY["unroll"]:
        options["unroll"] = flags.unroll
    setting = {
        "benchmark": "tpu",
        "what": flags.what,
        "preset": flags.preset,
        "batch_size": flags.batch_size,
        "dtype": str(compute.jax_dtype),
        **options,
        "compiled_for": device.device_kind,
    }
    total, kernels, by_category = 0.0, 0, collections.defaultdict(float)
    for program in programs:
        estimate = estimate_program(program, compute, device)
        times = program.times
        total += times * estimate.ms
        kernels += times * estimate.kernels
        for name, ms in estimate.by_category.items():
            by_category[name] += times * ms
        figures = {"times": times, "ms_per_image": times * estimate.ms / flags.batch_size}
        print_figures(**setting, part=program.name, **estimate.figures(), **figures)
    for name, ms in sorted(by_category.items(), key=lambda item: -item[1]):
        print_figures(**setting, part=name, ms=ms, share=ms / total)
    figures = {"ms": total, "ms_per_image": total / flags.batch_size}
    print_figures(**setting, part="total", **figures, kernels_without_estimate=kernels)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Holds the compiler's estimates for one program.

    Attributes:
        by_category: milliseconds for each name in CATEGORIES, and for "rest".
        kernels: number of kernels that run, whose time is not in `by_category`.
        flop: FLOP of matrix products and convolutions, with those of kernels.
        peak: FLOP/s of the chip.
        temporaries: bytes of temporary arrays.
        arguments: bytes of the program's arguments.
        compile_seconds: seconds that the compilation took on this machine.
    """

    by_category: dict[str, float]
    kernels: int
    flop: int
    peak: float
    temporaries: int
    arguments: int
    compile_seconds: float

    @property
    def ms(self) -> float:
        """Milliseconds of one run, without kernels."""
        return sum(self.by_category.values())

    def figures(self) -> dict[str, float]:
        """Returns the figures to print, the share of the peak only if all of the time is known."""
        share = {"peak_share": self.flop / (self.ms / 1e3) / self.peak}
        return {
            "ms": self.ms,
            **({} if self.kernels else share),
            "kernels_without_estimate": self.kernels,
            "temporaries_gb": self.temporaries / 1e9,
            "arguments_gb": self.arguments / 1e9,
            "compile_seconds": self.compile_seconds,
        }


def estimate_program(program: Program, compute: ComputeConfig, device: Any) -> Estimate:
    """Compiles a program for a device and adds up the cycles that the compiler expects."""
    # The compiler chooses all layouts, because one piece passes its outputs to the next.
    layout, clock = Format(Layout.AUTO, SingleDeviceSharding(device)), _clock(device)
    begin = time.perf_counter()
    jitted = jax.jit(
        lambda *a: program.function(*a, compute),
        in_shardings=layout,
        out_shardings=layout,
        donate_argnums=program.donated,
    )
    compiled = jitted.lower(*program.arguments).compile()
    seconds = time.perf_counter() - begin
    memory = compiled.memory_analysis()
    assert memory is not None
    by_category, hlo = collections.defaultdict(float), compiled.as_text() or ""
    for path, cycles in estimated_cycles(hlo):
        by_category[category(path)] += cycles / clock / 1e6
    plain = without_repeated_work(compute)
    return Estimate(
        dict(by_category),
        kernels_without_estimate(hlo),
        flops.count(lambda *a: program.function(*a, plain), *program.arguments),
        published_peak_flops(device.device_kind) or float("nan"),
        memory.temp_size_in_bytes,
        memory.argument_size_in_bytes,
        seconds,
    )


def estimated_cycles(hlo: str) -> Iterator[tuple[str, int]]:
    """Yields (path in the program that JAX traced, cycles) for each instruction with an estimate.

    hlo: text of a program that was compiled for a TPU.
    """
    for instruction in executed_instructions(hlo):
        cycles = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        if cycles:
            path = re.search(r'op_name="([^"]*)"', instruction.attributes)
            yield path[1] if path else "", int(cycles[1]) * instruction.times


def kernels_without_estimate(hlo: str) -> int:
    """Counts how often a program runs kernels, such as splash attention, that have no estimate.

    hlo: text of a program that was compiled for a TPU.
    """
    return sum(
        instruction.times
        for instruction in executed_instructions(hlo)
        if 'custom_call_target="tpu_custom_call"' in instruction.attributes
        and '"estimated_cycles"' not in instruction.attributes
    )


def category(path: str) -> str:
    """Returns the category of an instruction by its path in the program."""
    return next((name for name, pattern in CATEGORIES if re.search(pattern, path)), "rest")


def _clock(device: Any) -> float:
    for kind, ghz in CLOCKS.items():
        if device.device_kind.startswith(kind):
            return ghz
    raise InputError(f"the clock of {device.device_kind} is unknown; known are {list(CLOCKS)}")
