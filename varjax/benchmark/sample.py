"""Measures how fast a transformer of a released size draws images; its weights are random.

varjax benchmark sample --preset=d16 --batch_size=8
varjax benchmark sample --preset=mar_b --batch_size=8 --steps=64
varjax benchmark sample --preset=d30 --dtype=bfloat16 --fits=16,24,40,80
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from varjax import trees
from varjax.benchmark.measure import MatmulPeak, compute_from_flags, model_parser, print_figures
from varjax.mar import pipeline as mar_pipeline
from varjax.mar.latents import decode_tokens
from varjax.mar.memory import mar_sampling_bytes
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions, check_sampling, make_setup, sample_mar_tokens
from varjax.nn.compute import ComputeConfig, without_repeated_work
from varjax.runtime import flops
from varjax.runtime.data_parallel import batch_mesh, data_parallel, replicate
from varjax.runtime.hardware import fastest_seconds, memory_usage
from varjax.sampling.batch_size import SIZES, fitting_batch_size
from varjax.sampling.sampler import image_keys
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.vq.model import VQConfig, decode_images
from varjax.trees import PyTree
from varjax.var import pipeline as var_pipeline
from varjax.var.memory import var_sampling_bytes
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions, sample_images, sample_tokens


def main(arguments: list[str]) -> None:
    """Reads the command line and prints the figures; raises InputError."""
    parser = model_parser("sample", __doc__)
    parser.add_argument(
        "--compile_only", action="store_true", help="only compile, which needs less memory"
    )
    help = "print only the batch size that auto chooses for devices with 16,24,… GB of memory"
    parser.add_argument("--fits", type=_gigabytes, metavar="GB,GB", help=help)
    parser.add_argument("--steps", type=int, default=64, help="number of MAR sampling steps (64)")
    flags = parser.parse_args(arguments)
    compute, sizes = compute_from_flags(flags), (flags.preset, flags.batch_size, flags.steps)
    if flags.fits:
        print_fitting_batch_sizes(flags.preset, flags.steps, compute, flags.fits)
        return
    measure_sampling(*sizes, compute, flags.repeats, flags.compile_only)


@dataclasses.dataclass(frozen=True)
class SamplingParts:
    """Holds the programs of a pipeline that are measured, without their weights.

    Attributes:
        classes: number of the model's classes.
        init: key -> params of tokenizer and transformer.
        cast: a pattern of the parameters that a pipeline holds in `compute.dtype`.
        options: second argument of the programs.
        latent_shape: shape of one image's latents, as the decoder takes them.
        sample: (params, options, label_B, key_B, compute) -> latents or tokens.
        decode: (params, latents, compute) -> images.
        whole: same arguments as `sample`; returns images.
        bytes_needed: (batch size, compute) -> bytes that a device needs in addition to the weights.
    """

    classes: int
    init: Callable[[jax.Array], PyTree]
    cast: str
    options: Any
    latent_shape: tuple[int, ...]
    sample: Callable[..., jax.Array]
    decode: Callable[..., jax.Array]
    whole: Callable[..., jax.Array]
    bytes_needed: Callable[[int, ComputeConfig], int]


def var_parts(preset: str, steps: int, guided: bool = True) -> SamplingParts:
    """Returns the programs of `VARPipeline`; `steps` are the model's own."""
    var = VARConfig.preset(preset)
    tokenizer = VQConfig(scales=var.scales)

    def sample(params, options, label_B, key_B, compute):
        token_BL, _ = sample_tokens(
            tokenizer, var, params, label_B, key_B, options, None, compute, guided
        )
        return token_BL

    def decode(params, f_hat_BhwZ, compute):
        return decode_images(tokenizer, params["tokenizer"], f_hat_BhwZ, compute)

    def whole(params, options, label_B, key_B, compute):
        return sample_images(tokenizer, var, params, label_B, key_B, options, None, compute, guided)

    return SamplingParts(
        var.classes,
        lambda key: {"tokenizer": tokenizer.init(key), "var": var.init(key)},
        var_pipeline.CAST_KERNELS,
        VAROptions(),
        (*tokenizer.pyramid.finest, tokenizer.code_channels),
        sample,
        decode,
        whole,
        lambda batch, compute: var_sampling_bytes(tokenizer, var, batch, compute, guided),
    )


def mar_parts(preset: str, steps: int, guided: bool = True) -> SamplingParts:
    """Returns the programs of `MARPipeline` for `steps` steps of 100 diffusion steps each."""
    mar, tokenizer = MARConfig.preset(preset), KLConfig()
    options = MAROptions(steps=steps) if guided else MAROptions(steps=steps, guidance=1.0)
    setup = make_setup(mar, check_sampling(mar, options))

    def sample(params, setup, label_B, key_B, compute):
        return sample_mar_tokens(mar, params["mar"], label_B, key_B, setup, None, compute)

    def decode(params, z_BhwZ, compute):
        return decode_tokens(tokenizer, mar, params["tokenizer"], mar.patchify(z_BhwZ), compute)

    def whole(params, setup, label_B, key_B, compute):
        token_BLZ = sample(params, setup, label_B, key_B, compute)
        return decode_tokens(tokenizer, mar, params["tokenizer"], token_BLZ, compute)

    return SamplingParts(
        mar.classes,
        lambda key: {"tokenizer": tokenizer.init(key), "mar": mar.init(key)},
        mar_pipeline.CAST_KERNELS,
        setup,
        tokenizer.latent_shape,
        sample,
        decode,
        whole,
        lambda batch, compute: mar_sampling_bytes(tokenizer, mar, batch, compute, setup),
    )


def print_fitting_batch_sizes(
    preset: str, steps: int, compute: ComputeConfig, gigabytes: Sequence[float]
) -> None:
    """Prints what --batch_size=auto is on devices of so much memory, by arithmetic."""
    of, dtype = model_parts(preset, steps), compute.jax_dtype
    params = jax.eval_shape(of.init, jax.random.key(0))
    weights = trees.nbytes(jax.eval_shape(lambda p: trees.cast(of.cast, p, dtype), params))

    def needed(size: int) -> int:
        return weights + of.bytes_needed(size, compute)

    for memory in gigabytes:
        size = fitting_batch_size(needed, int(memory * 1e9), max(SIZES))
        print_figures(
            benchmark="sample",
            preset=preset,
            dtype=str(dtype),
            memory_gb=memory,
            batch_size=size,
            weights_gb=weights / 1e9,
            needed_gb=needed(size) / 1e9,
        )


def model_parts(preset: str, steps: int, guided: bool = True) -> SamplingParts:
    """Returns the programs of a released model's pipeline; raises InputError for others."""
    return (mar_parts if preset.startswith("mar") else var_parts)(preset, steps, guided)


def measure_sampling(
    preset: str,
    batch_size: int,
    steps: int,
    compute: ComputeConfig,
    repeats: int,
    compile_only: bool,
) -> None:
    """Prints a line for the transformer, one for the decoder, and one for the whole.

    They are the programs that the pipelines run. efficiency: model FLOP ÷ (seconds × FLOP/s of a
    large matrix product, same run, same dtype). Raises InputError for an unknown preset.
    """
    of = model_parts(preset, steps)
    dtype, mesh = compute.jax_dtype, batch_mesh()
    index_B = jnp.arange(batch_size)
    label_B, key_B = index_B % of.classes, image_keys(0, index_B)

    def decode(params, _, latents, compute):
        return of.decode(params, latents, compute)

    parts = {
        "transformer": (of.sample, (label_B, key_B)),
        "decoder": (decode, (jnp.zeros((batch_size, *of.latent_shape)),)),
        "whole": (of.whole, (label_B, key_B)),
    }
    setting = {
        "benchmark": "sample",
        "preset": preset,
        "batch_size": batch_size,
        "dtype": str(dtype),
        "attention": compute.attention_implementation(cached=not preset.startswith("mar")),
    }
    if preset.startswith("mar"):
        setting["steps"] = steps

    def init(key):
        return trees.cast(of.cast, of.init(key), dtype)

    abstract = jax.eval_shape(init, jax.random.key(0))
    params = None if compile_only else replicate(jax.jit(init)(jax.random.key(0)), mesh)
    peak = MatmulPeak(dtype)
    plain = without_repeated_work(compute)
    for name, (function, batch) in parts.items():
        begin = time.perf_counter()
        program = data_parallel(lambda *a, f=function: f(*a, compute), mesh)
        compiled = program.lower(abstract, of.options, *batch).compile()
        figures = {"part": name, "compile_seconds": time.perf_counter() - begin}
        if params is not None:
            took = fastest_seconds(lambda: compiled(params, of.options, *batch), repeats)  # noqa: B023
            work = flops.count(lambda *a, f=function: f(*a, plain), abstract, of.options, *batch)
            speed = peak.measure()
            figures |= {
                "seconds": took,
                "images_per_second": batch_size / took,
                "model_gflop_per_image": work / batch_size / 1e9,
                "efficiency": work / took / speed / mesh.size,
                "matmul_gflops": speed / 1e9,
                "peak_memory_gb": memory_usage()["memory_peak_gb"],
            }
        print_figures(**setting, **figures)


def _gigabytes(text: str) -> tuple[float, ...]:
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text}: give numbers, as in 16,24,40,80") from None
    if not all(0 < value < float("inf") for value in values):
        raise argparse.ArgumentTypeError(f"{text}: give numbers above 0")
    return values
