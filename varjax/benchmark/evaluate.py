"""Measures how fast samples are evaluated: Inception's features, and the metrics.

varjax benchmark evaluate --images=10000

Prints a JSON line for the features, which are computed with random weights, and one for each
metric, which is computed from random features. efficiency is model FLOP ÷ (seconds × FLOP/s of a
large matrix product in the same run). 0.4 % of the FLOP are of rows and columns that are computed
and dropped (varjax/nn/conv_norm.py).
"""

import time

import jax
import jax.numpy as jnp
import numpy as np

from varjax.benchmark.measure import MatmulPeak, print_figures
from varjax.errors import InputError
from varjax.metrics import fid
from varjax.metrics.features import FeatureExtractor, random_inception_network
from varjax.metrics.inception import FEATURES
from varjax.metrics.references import COMPARED_IMAGES
from varjax.runtime import flops
from varjax.runtime.commands import command_parser
from varjax.runtime.hardware import fastest_seconds, memory_usage


def measure_features(side: int, repeats: int) -> None:
    """Prints how fast features of images of `side` pixels are computed, and the compile time."""
    extract = FeatureExtractor(random_inception_network())
    images_NHWC = np.random.default_rng(0).integers(0, 256, (extract.at_once, side, side, 3))
    images_NHWC = images_NHWC.astype(np.uint8)
    begin = time.perf_counter()
    extract(images_NHWC)
    compile_seconds = time.perf_counter() - begin
    seconds = fastest_seconds(lambda: extract(images_NHWC), repeats)
    memory = memory_usage()["memory_peak_gb"]  # before the matrix product, which needs some
    network = extract.network
    abstract = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, network.params))
    work = flops.count(network.apply, abstract, images_NHWC)
    speed = MatmulPeak(jnp.float32).measure()
    print_figures(
        benchmark="evaluate",
        part="features",
        pixels=side,
        images_at_once=extract.at_once,
        compile_seconds=compile_seconds - seconds,
        images_per_second=extract.at_once / seconds,
        model_gflop_per_image=work / extract.at_once / 1e9,
        efficiency=work / seconds / speed / len(jax.local_devices()),
        matmul_gflops=speed / 1e9,
        peak_memory_gb=memory,
    )


def measure_metrics(images: int) -> None:
    """Prints the seconds of each metric, of `images` random samples and a reference of 10,000."""
    rng = np.random.default_rng(0)
    sample_ND = rng.normal(size=(images, FEATURES)).astype(np.float32)
    reference_MD = rng.normal(size=(COMPARED_IMAGES, FEATURES)).astype(np.float32)
    reference = fid.Moments.of(reference_MD)
    for name, metric in {
        "fid": lambda: fid.frechet_distance(fid.Moments.of(sample_ND), reference),
        "inception_score": lambda: fid.inception_score(sample_ND[:, :1008]),
        "precision_recall": lambda: fid.precision_recall(sample_ND, reference_MD),
        "kid": lambda: fid.kernel_inception_distance(sample_ND, reference_MD),
    }.items():
        begin = time.perf_counter()
        metric()
        seconds = time.perf_counter() - begin
        print_figures(benchmark="evaluate", part=name, images=images, seconds=seconds)


def main(arguments: list[str]) -> int:
    """Runs the benchmark and returns 0; raises InputError for a number below its minimum."""
    parser = command_parser("varjax benchmark evaluate", __doc__)
    add = parser.add_argument
    add("--images", type=int, default=10_000, help="number of images in the metrics (10000)")
    add("--side", type=int, default=256, help="side length of an image in pixels (256)")
    add("--repeats", type=int, default=3, help="calls to time; the fastest one counts (3)")
    flags = parser.parse_args(arguments)
    for name, least in (("images", 4), ("side", 1), ("repeats", 1)):
        if getattr(flags, name) < least:
            raise InputError(f"{name}={getattr(flags, name)}: must be {least} or more")
    measure_features(flags.side, flags.repeats)
    measure_metrics(flags.images)
    return 0
