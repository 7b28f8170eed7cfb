"""Measures how fast a transformer of a released size trains on one device, on random images.

varjax benchmark train --preset=d16 --batch_size=8
varjax benchmark train --preset=mar_b --batch_size=8
varjax benchmark train --preset=d16 --batch_size=24 --cached
varjax benchmark train --preset=d16 --batch_size=24 --accumulate=3
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from varjax.benchmark.measure import (
    MatmulPeak,
    add_training_flags,
    compute_from_flags,
    measure_call,
    model_parser,
    print_figures,
)
from varjax.benchmark.pieces import training_gradient
from varjax.models import benchmark_of
from varjax.nn.compute import ComputeConfig
from varjax.runtime import flops
from varjax.training.task import Plan, TrainState
from varjax.training.train_step import check_microbatches


def main(arguments: list[str]) -> None:
    """Reads the command line and prints the figures; raises InputError."""
    parser = model_parser("train", __doc__)
    add_training_flags(parser)
    parser.add_argument(
        "--cached", action="store_true", help="only the step on cached latents, without encoder"
    )
    flags = parser.parse_args(arguments)
    compute = compute_from_flags(flags, remat=flags.remat, unroll=flags.unroll)
    measure_training(
        flags.preset, flags.batch_size, compute, flags.repeats, flags.cached, flags.accumulate
    )


def measure_training(
    preset: str,
    batch_size: int,
    compute: ComputeConfig,
    repeats: int,
    cached: bool = False,
    accumulate: int = 1,
) -> None:
    """Prints a line for the tokenizer's encoder, the gradient, the update, and the whole step.

    The step comes first, because peak memory is that of the process so far. With `cached`, prints a
    line for the step on cached latents only. efficiency: model FLOP ÷ (seconds × FLOP/s of a large
    matrix product, same run, same dtype). FLOP that a remat policy recomputes do not count.

    Args:
        preset: name of a released model's size.
        batch_size: number of images in a step.
        compute: dtype and execution.
        repeats: number of calls to time; the fastest one counts.
        cached: whether latents come from a cache, so that no encoder runs.
        accumulate: number of microbatches in a step.

    Raises:
        InputError: an unknown preset, or `accumulate` does not divide the batch.
    """
    check_microbatches(batch_size, accumulate)
    plan, task = Plan(1000, batch_size), benchmark_of(preset).training_task(preset, compute)
    task = dataclasses.replace(task, accumulate=accumulate)
    tokenizer, dropout = task.tokenizer, getattr(task, "attention_dropout", 0)
    dtype, peak = compute.jax_dtype, MatmulPeak(compute.jax_dtype)
    attention = compute.attention_implementation()
    setting = {
        "benchmark": "train",
        "preset": preset,
        "batch_size": batch_size,
        "dtype": str(dtype),
        # The fused kernel has no dropout.
        "attention": "xla" if dropout and attention == "cudnn" else attention,
        "accumulate": accumulate,
        "cached": cached,
        "remat": compute.remat,
        "unroll": compute.unroll,
    }
    key, label_B = jax.random.key(0), jnp.arange(batch_size) % task.model.classes
    shape = (batch_size, *tokenizer.image_shape)
    image_BHWC = jax.random.randint(key, shape, 0, 256, jnp.uint8)
    frozen = jax.device_put(task.frozen())
    state = jax.jit(task.init)(key)

    def report(part: str, call: Callable[[], Any], compile_seconds: float, work: int) -> None:
        figures = {"compile_seconds": compile_seconds} | measure_call(call, repeats)
        seconds, speed = figures["seconds"], peak.measure()
        figures |= {
            "images_per_second": batch_size / seconds,
            "model_gflop_per_image": work / batch_size / 1e9,
            "efficiency": work / seconds / speed,
            "matmul_gflops": speed / 1e9,
        }
        print_figures(**setting, part=part, **figures)

    def measure_step(batch, work):
        def step():  # the state is donated, as in training
            nonlocal state
            state, metrics = program(state, frozen, batch, key)
            return metrics

        train_step = functools.partial(task.train_step, plan=plan)
        program, compile_seconds = _compiled(train_step, state, frozen, batch, key)
        report("step", step, compile_seconds, work)

    shapes = jax.eval_shape(tokenizer.encode, frozen, image_BHWC)
    work = task.train_flops(state, frozen, shapes | {"label_B": label_B})
    if cached:  # their content does not change the speed
        latents = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return measure_step(latents | {"label_B": label_B}, work)

    def encode_images(params, image_BHWC):
        return tokenizer.encode(params, image_BHWC, compute)

    work_encode = flops.count(tokenizer.encode, frozen, image_BHWC)
    measure_step({"image_BHWC": image_BHWC, "label_B": label_B}, work + work_encode)

    encode, compile_seconds = _compiled(encode_images, frozen, image_BHWC)
    report("tokenize", lambda: encode(frozen, image_BHWC), compile_seconds, work_encode)

    encoded = encode(frozen, image_BHWC) | {"label_B": label_B}

    differentiate = functools.partial(training_gradient, preset, task)
    gradient, compile_seconds = _compiled(differentiate, state.params, frozen, encoded)
    report("gradient", lambda: gradient(state.params, frozen, encoded), compile_seconds, work)

    grads = gradient(state.params, frozen, encoded)

    def update():
        nonlocal state
        state, norms = update_program(state, grads)
        return norms

    update_program, compile_seconds = _compiled(
        lambda state, grads: task.update(state, grads, plan), state, grads
    )
    report("update", update, compile_seconds, 0)


def _compiled(function: Callable, *args: Any) -> tuple[Callable, float]:
    """Compiles a program, which a `TrainState` is donated to; returns it and the seconds."""
    begin = time.perf_counter()
    donated = (0,) if isinstance(args[0], TrainState) else ()
    program = jax.jit(function, donate_argnums=donated).lower(*args).compile()
    return program, time.perf_counter() - begin
