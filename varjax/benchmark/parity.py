"""Compares what this device computes with what a CPU computes in float32; weights are random.

varjax benchmark parity --preset=d16
varjax benchmark parity --preset=mar_b --steps=8

Prints a JSON line "sample" that compares images with each other: those of a second call, and one
drawn alone. Then prints lines for each part, first in float32 and then in the device's own dtype:
the encoder, the decoder, the training loss and its gradient. On a CPU in float32, tests compare
varjax with the official code (README.md has the tolerances), so these lines show the error that a
device and a dtype add.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax import trees
from varjax.benchmark.measure import (
    add_steps_flag,
    check_sampler_flags,
    compute_from_flags,
    model_parser,
    print_figures,
)
from varjax.models import benchmark_of
from varjax.nn.compute import ComputeConfig
from varjax.sampling.sampler import image_keys
from varjax.trees import PyTree

STEPS = 8  # of MAR
REFERENCE = ComputeConfig(
    "float32", attention_impl="xla", encoder_precision="highest", platform="cpu"
)


def main(arguments: list[str]) -> None:
    """Reads the command line and prints the figures; raises InputError."""
    parser = model_parser("parity", __doc__)
    add_steps_flag(parser, STEPS)
    flags = parser.parse_args(arguments)
    steps = STEPS if flags.steps is None else flags.steps
    check_sampler_flags(
        flags, benchmark_of(flags.preset).sampling_programs(flags.preset, steps).setting
    )
    compute = compute_from_flags(flags)
    setting = {"benchmark": "parity", "preset": flags.preset}
    images = compared_images(flags.preset, flags.batch_size, compute, steps)
    print_figures(**setting, **images)
    for figures in compared_with_cpu(flags.preset, compute):
        print_figures(**setting, **figures)


def compared_with_cpu(preset: str, compute: ComputeConfig) -> Iterator[dict[str, Any]]:
    """Compares the encoder, the decoder and the gradient of one image with those of a CPU.

    Args:
        preset: name of a released model's size.
        compute: dtype, in addition to float32, and execution.

    Yields:
        Figures of each part. "relative_error" is the norm of the difference divided by that of the
        CPU's result; "equal_tokens" is the fraction of tokens that are equal.
    """
    benchmark = benchmark_of(preset)
    task: Any = benchmark.training_task(preset, REFERENCE)
    tokenizer = task.tokenizer
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    exact = dataclasses.replace(compute, dtype="float32", encoder_precision="highest")
    formats = [exact, *[compute] * (compute != exact)]

    def loss(latents, compute, params, frozen):
        return benchmark.training_loss(
            dataclasses.replace(task, compute=compute), params, frozen, latents
        )

    with jax.default_device(cpu):
        key = jax.random.key(0)
        frozen, params = jax.jit(tokenizer.init)(key), jax.jit(task.init)(key).params
        image_BHWC = jax.random.randint(key, (1, *tokenizer.image_shape), 0, 256, jnp.uint8)
        latents = jax.jit(tokenizer.encode)(frozen, image_BHWC)
        label_B = {"label_B": jnp.zeros(1, jnp.int32)}

    def run(function: Callable[..., PyTree], where: Any, *arrays: PyTree) -> PyTree:
        return jax.device_get(jax.jit(function)(*jax.device_put(arrays, where)))

    def encode(compute, frozen, image_BHWC):
        return tokenizer.encode(frozen, image_BHWC, compute)

    def decode(compute, frozen, latents):
        return tokenizer.decode(frozen, latents, compute)

    def value_and_gradient(compute, params, frozen, batch):
        return jax.value_and_grad(functools.partial(loss, batch, compute))(params, frozen)

    parts = {
        "encoder": (encode, (frozen, image_BHWC)),
        "decoder": (decode, (frozen, latents)),
        "loss and gradient": (value_and_gradient, (params, frozen, latents | label_B)),
    }
    for part, (function, arrays) in parts.items():
        expected = run(functools.partial(function, REFERENCE), cpu, *arrays)
        for chosen in formats:
            found = run(functools.partial(function, chosen), device, *arrays)
            line = {"part": part, "dtype": str(chosen.jax_dtype)}
            if part == "encoder":
                line["precision"] = chosen.frozen_encoder
            yield line | _difference(found, expected)


def compared_images(
    preset: str, batch_size: int, compute: ComputeConfig, steps: int
) -> dict[str, Any]:
    """Compares images of a batch with those of a second call, and with the first one drawn alone.

    Args:
        preset: name of a released model's size.
        batch_size: number of images.
        compute: dtype and execution.
        steps: number of MAR sampling steps.

    Returns:
        Whether they are bit-identical, and their largest difference in 1/255.
    """
    programs = benchmark_of(preset).sampling_programs(preset, steps)

    @jax.jit
    def init(key):
        return trees.cast(programs.cast, programs.init(key), compute.jax_dtype)

    params, index_B = init(jax.random.key(0)), jnp.arange(batch_size)
    label_B, key_B = index_B % programs.classes, image_keys(0, index_B)
    sample = jax.jit(functools.partial(programs.whole, compute=compute))
    first, second = (np.asarray(sample(params, programs.options, label_B, key_B)) for _ in range(2))
    alone = np.asarray(sample(params, programs.options, label_B[:1], key_B[:1]))
    return {
        "part": "sample",
        "dtype": str(compute.jax_dtype),
        "batch_size": batch_size,
        "repeated_equal": bool((first == second).all()),
        "repeated_difference_255": float(255 * np.abs(first - second).max()),
        "alone_equal": bool((first[:1] == alone).all()),
        "alone_difference_255": float(255 * np.abs(first[:1] - alone).max()),
    }


def _difference(found: PyTree, expected: PyTree) -> dict[str, float]:
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True))
    if all(np.issubdtype(b.dtype, np.integer) for _, b in pairs):
        return {"equal_tokens": float(np.mean([np.mean(a == b) for a, b in pairs]))}
    norm = lambda arrays: np.sqrt(sum(np.sum(np.square(x, dtype=np.float64)) for x in arrays))  # noqa: E731
    difference = norm([np.asarray(a, np.float64) - np.asarray(b, np.float64) for a, b in pairs])
    return {"relative_error": float(difference / norm([b for _, b in pairs]))}
