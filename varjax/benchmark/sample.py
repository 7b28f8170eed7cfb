"""How fast a transformer of a released size draws images; random weights serve as well."""

import functools
import time

import jax
import jax.numpy as jnp

from varjax import flops
from varjax.benchmark.measure import matmul_flops, peak_memory, seconds, show
from varjax.nn.compute import Compute
from varjax.tokenizer.model import TokenizerConfig, decode_images, init_tokenizer
from varjax.var.model import VARConfig, init_var
from varjax.var.sample import Options, image_keys, sample, sample_images


def run(preset: str, batch_size: int, compute: Compute, repeats: int, lower_only: bool) -> None:
    """Prints a line for the transformer, one for the decoder, and one for the whole.

    efficiency: model FLOP ÷ (seconds × FLOP/s of a large matrix product, same run, same dtype).
    """
    var = VARConfig.preset(preset)
    tokenizer = TokenizerConfig(scales=var.scales)
    dtype = compute.jax_dtype
    label_B = jnp.arange(batch_size) % var.classes
    index_B = jnp.arange(batch_size)
    options = Options()

    def init(key):
        return {"tokenizer": init_tokenizer(tokenizer, key), "var": init_var(var, key)}

    def tokens(params, seed):
        keys = image_keys(seed, index_B)
        return sample(tokenizer, var, params, label_B, keys, options, compute=compute)[1]

    def decoded(params, f_hat_BhwZ):
        return decode_images(tokenizer, params["tokenizer"], f_hat_BhwZ, dtype)

    def whole(params, seed):
        keys = image_keys(seed, index_B)
        return sample_images(tokenizer, var, params, label_B, keys, options, compute=compute)

    abstract = jax.eval_shape(init, jax.random.key(0))
    f_hat = jax.ShapeDtypeStruct(
        (batch_size, *tokenizer.pyramid.finest, tokenizer.code_channels), jnp.float32
    )
    setting = {
        "benchmark": "sample",
        "preset": preset,
        "batch_size": batch_size,
        "dtype": str(dtype),
        "attention": compute.attention,
    }
    parts = {"transformer": (tokens, 0), "decoder": (decoded, f_hat), "whole": (whole, 0)}
    params = None if lower_only else jax.jit(init)(jax.random.key(0))
    peak = 0.0 if lower_only else matmul_flops(dtype)
    for name, (function, second) in parts.items():
        begin = time.perf_counter()
        compiled = jax.jit(function).lower(abstract, second).compile()
        compile_seconds = time.perf_counter() - begin
        figures = {"part": name, "compile_seconds": compile_seconds}
        if params is not None:
            given = jnp.zeros(f_hat.shape) if name == "decoder" else 0
            call = functools.partial(compiled, params, given)
            jax.block_until_ready(call())
            took = seconds(call, repeats)
            work = flops.count(function, abstract, second)
            figures |= {
                "seconds": took,
                "images_per_second": batch_size / took,
                "model_gflop_per_image": work / batch_size / 1e9,
                "efficiency": work / took / peak,
                "matmul_gflops": peak / 1e9,
                "peak_memory_gb": peak_memory() / 1e9,
            }
        show(**setting, **figures)
