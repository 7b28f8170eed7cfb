"""Measures how fast a trained or converted model draws images with given options.

varjax benchmark model --weights=runs/digits --guidance=1 --batch_size=250
varjax benchmark model --weights=var_d30 --refiner=var_d16 --draft_scales=8 --batch_size=64

Prints one JSON line. model_gflop_per_image counts the multiply-adds of all matrix products and
convolutions in the program that runs, times two, with the decoder and without fused attention. It
is left out where their number is not fixed in the program, as with --diffusion_steps=50:5 (DiSA).
"""

import dataclasses
import functools
import time
from typing import Any

import jax
import numpy as np

from varjax.benchmark.measure import print_figures
from varjax.config.numbers import whole_number
from varjax.models import load, option_classes
from varjax.runtime import flops
from varjax.runtime.commands import command_parser
from varjax.runtime.hardware import fastest_seconds, memory_usage
from varjax.sampling.sampler import add_option_flags, given_options, image_keys

COMPANIONS = "guide", "refiner", "draft_scales"


def main(arguments: list[str]) -> None:
    """Reads the command line and prints the figures; raises InputError."""
    parser = command_parser("varjax benchmark model", __doc__)
    add = parser.add_argument
    about = "training run, converted directory, or published model: var_d16 …"
    add("--weights", required=True, help=about)
    add("--guide", help="weaker model that guides this one (autoguidance)")
    add("--refiner", help="smaller VAR that draws the fine scales (CoDe)")
    add("--draft_scales", type=int, help="number of scales before those of the refiner (8)")
    add("--batch_size", type=int, default=8, help="images at a time (8)")
    add("--dtype", default="auto", help="dtype: auto, float32 or bfloat16")
    add("--repeats", type=int, default=3, help="calls to time; the fastest one counts (3)")
    add_option_flags(parser.add_argument_group("options of the model"), option_classes())
    flags = parser.parse_args(arguments)
    for name in ("batch_size", "repeats"):
        whole_number(name, getattr(flags, name), 1)
    companions = {name: value for name in COMPANIONS if (value := getattr(flags, name)) is not None}
    model = load(flags.weights, flags.dtype, **companions)
    options = model.options(**given_options(flags, option_classes()))
    print_figures(
        benchmark="model",
        weights=flags.weights,
        **companions,
        batch_size=flags.batch_size,
        **measure_model(model, options, flags.batch_size, flags.repeats),
    )


def measure_model(model: Any, options: Any, batch_size: int, repeats: int) -> dict[str, Any]:
    """Times how a model draws a batch, and counts the FLOP.

    Args:
        model: a family's pipeline; its pure functions are those whose FLOP can be counted.
        options: sampling options, as `model.options()` returns them.
        batch_size: number of images in the batch.
        repeats: number of calls to time; the fastest one counts.

    Returns:
        The figures by name.
    """
    label_B = np.arange(batch_size) % model.classes
    named_options = dataclasses.asdict(options)

    def draw() -> jax.Array:
        return model.sample(label_B, seed=0, **named_options)

    begin = time.perf_counter()
    jax.block_until_ready(draw())
    first_seconds = time.perf_counter() - begin
    seconds = fastest_seconds(draw, repeats)
    figures = {
        "first_seconds": first_seconds,  # with compilation
        "seconds": seconds,
        "images_per_second": batch_size / seconds,
        "memory_peak_gb": memory_usage()["memory_peak_gb"],
    }
    pure_draw = functools.partial(model.pure.sample, **named_options)
    try:
        flop = flops.count(pure_draw, model.params, label_B, image_keys(0, np.arange(batch_size)))
        figures["model_gflop_per_image"] = flop / batch_size / 1e9
    except flops.UnknownIterations:
        pass
    return figures
