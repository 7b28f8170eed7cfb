"""Measures how fast a transformer of a released size draws images; its weights are random.

varjax benchmark sample --preset=d16 --batch_size=8
"""

import dataclasses
import time

import jax
import jax.numpy as jnp

from varjax.benchmark.measure import MatmulPeak, compute_from_flags, model_parser, print_figures
from varjax.core import flops
from varjax.core.hardware import fastest_seconds, memory_usage
from varjax.nn.compute import Compute
from varjax.sampling.data_parallel import batch_mesh, data_parallel, replicate
from varjax.sampling.sampler import image_keys
from varjax.tokenizers.vq.model import VQConfig, decode_images
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions, sample_images, sample_tokens


def main(arguments: list[str]) -> None:
    """Reads the command line and prints the figures; raises InputError."""
    parser = model_parser("sample", __doc__)
    parser.add_argument("--compile_only", action="store_true", help="where memory is short")
    flags = parser.parse_args(arguments)
    compute = compute_from_flags(flags)
    measure_sampling(flags.preset, flags.batch_size, compute, flags.repeats, flags.compile_only)


def measure_sampling(
    preset: str, batch_size: int, compute: Compute, repeats: int, compile_only: bool
) -> None:
    """Prints a line for the transformer, one for the decoder, and one for the whole.

    They are the programs that `VARPipeline` runs. efficiency: model FLOP ÷ (seconds × FLOP/s of a
    large matrix product, same run, same dtype). Raises InputError for an unknown preset.
    """
    var = VARConfig.preset(preset)
    tokenizer = VQConfig(scales=var.scales)
    dtype, options, mesh = compute.jax_dtype, VAROptions(), batch_mesh()
    index_B = jnp.arange(batch_size)
    label_B, key_B = index_B % var.classes, image_keys(0, index_B)

    def init(key):
        return {"tokenizer": tokenizer.init(key), "var": var.init(key)}

    def tokens(params, options, label_B, key_B, compute=compute):
        return sample_tokens(tokenizer, var, params, label_B, key_B, options, compute=compute)[0]

    def decoded(params, _, f_hat_BhwZ, compute=compute):
        return decode_images(tokenizer, params["tokenizer"], f_hat_BhwZ, compute.jax_dtype)

    def whole(params, options, label_B, key_B, compute=compute):
        return sample_images(tokenizer, var, params, label_B, key_B, options, compute=compute)

    f_hat_BhwZ = jnp.zeros((batch_size, *tokenizer.pyramid.finest, tokenizer.code_channels))
    parts = {
        "transformer": (tokens, (label_B, key_B)),
        "decoder": (decoded, (f_hat_BhwZ,)),
        "whole": (whole, (label_B, key_B)),
    }
    setting = {
        "benchmark": "sample",
        "preset": preset,
        "batch_size": batch_size,
        "dtype": str(dtype),
        "attention": compute.attention_implementation,
    }
    abstract = jax.eval_shape(init, jax.random.key(0))
    params = None if compile_only else replicate(jax.jit(init)(jax.random.key(0)), mesh)
    peak = MatmulPeak(dtype)
    for name, (function, batch) in parts.items():
        begin = time.perf_counter()
        compiled = data_parallel(function, mesh).lower(abstract, options, *batch).compile()
        figures = {"part": name, "compile_seconds": time.perf_counter() - begin}
        if params is not None:
            took = fastest_seconds(lambda: compiled(params, options, *batch), repeats)  # noqa: B023
            # What a fused attention kernel computes cannot be seen in the program: count without.
            plain = dataclasses.replace(compute, attention="xla")
            work = flops.count(
                lambda params, *rest: function(params, *rest, compute=plain),  # noqa: B023
                abstract, options, *batch,
            )  # fmt: skip
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
