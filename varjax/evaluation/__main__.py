"""Measures samples: FID, sFID, Inception Score, precision, recall, KID.

varjax evaluate samples.npz --reference=REF.npz --inception=weights/inception
varjax evaluate --weights=var_d16 --count=50 --reference=REF.npz --inception=weights/inception
varjax evaluate --weights=var_d16 --sweep guidance=1,2,2.5,3 --reference=REF.npz --inception=…
varjax evaluate --weights=runs/digits --count=100 --features=pixels --reference=digits
varjax evaluate --weights=var_d16 --sweep guidance=1,2 seed=0,1,2,3,4 --reference=REF.npz …
varjax evaluate --weights=runs/fashion_mnist_28 --features=weights/classifier --reference=idx:DIR
varjax evaluate --weights=var_d30 --sweep accept=1,0.5,0.1 --classifier=weights/resnet101 …

SAMPLES is an .npz (arr_0) or a folder of images. With --weights, the command draws the samples,
--count of each class, with the model's default options unless you give others; a MAR of a released
size takes 256 steps, as published. --reference is an .npz of statistics (ADM's) or of images, a
folder of images, or a dataset (folder:PATH, tfds:NAME, idx:PATH, digits, photos), whose fields may
follow (tfds:NAME,held_out=test). Images of a dataset are cropped to the samples' size, as in the
model's recipe unless you set --crop. If the command is interrupted, run it again to continue.
docs/evaluation.md describes how published numbers are measured.
"""

import argparse
import dataclasses
import itertools
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import jax

from varjax.analysis.pyplot import load_pyplot
from varjax.cli.sample import add_sampling_flags, check_sampling_flags, companions
from varjax.data.sources import Folder
from varjax.errors import InputError
from varjax.evaluation.evaluate import (
    begun_batch_size_of_report,
    evaluate_images,
    evaluate_model,
    print_report,
    transformer_config,
)
from varjax.evaluation.image_crop import AUTO, CROP_HELP, CROPS, choose_crop
from varjax.evaluation.published import evaluation_options
from varjax.evaluation.references import (
    EvaluationSettings,
    check_reference,
    dataset_of,
    is_dataset,
)
from varjax.evaluation.sweep import (
    SweepPoint,
    check_sweep_output,
    options_text,
    point_path,
    split_sweep,
    sweep_table,
    write_sweep,
)
from varjax.metrics.features import FeatureExtractor, feature_network
from varjax.metrics.image_sets import open_image_set
from varjax.metrics.references import default_cache
from varjax.models import load, option_classes
from varjax.runtime.commands import command_parser
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.runtime.distributed import (
    add_process_flags,
    connect_by_flags,
    on_first_process,
    run_on_processes,
)
from varjax.sampling.batch_size import choose_batch_size
from varjax.sampling.guidance import check_guide_is_used
from varjax.sampling.job import SamplingJob
from varjax.sampling.option_sweep import check_given_or_swept, parse_sweep
from varjax.sampling.rejection import add_rejection_flags, check_classifier, classifier_of_flags
from varjax.sampling.sampler import given_options
from varjax.storage.buckets import as_path
from varjax.storage.folders import check_writable

# Flags that say how samples are drawn, besides the options of the model.
DRAWING = (
    *("ema", "guide", "refiner", "draft_scales", "count", "seed", "batch_size", "dtype"),
    *("sweep", "accept", "classifier"),
)


def evaluate(arguments: list[str]) -> None:
    """Reads the command line, measures, writes and prints.

    Raises InputError, before any long work, if the request is invalid.
    """
    parser = _parser()
    flags = parser.parse_args(arguments)
    check_sampling_flags(flags)
    out = as_path(flags.out)
    if (flags.samples is None) == (flags.weights is None):
        raise InputError("give SAMPLES (an .npz or a folder), or --weights to draw them")
    if out.suffix != ".json":
        raise InputError(f"out={flags.out}: give a name that ends in .json")
    check_writable(out.parent)
    given = given_options(flags, option_classes())
    names = [name for name in DRAWING if getattr(flags, name) != parser.get_default(name)]
    if flags.weights is None and (names or given):
        wrong = [f"--{name}" for name in (*names, *given)]
        raise InputError(f"{', '.join(wrong)}: needs --weights, which draws the samples")
    check_reference(flags.reference, flags.split, None if flags.crop == AUTO else flags.crop)
    accepts, seeds, sweep = split_sweep(flags.sweep)
    check_given_or_swept(given, sweep)
    if seeds and flags.seed:
        raise InputError(f"seed={flags.seed} and a sweep of seed: give one of them")
    connect_by_flags(flags)
    use_compilation_cache()
    classifier = classifier_of_flags(flags, accepts)
    extract = FeatureExtractor(feature_network(flags.features, flags.inception))
    cache = as_path(flags.cache)
    crop = choose_crop(flags.crop, flags.weights) if is_dataset(flags.reference) else "random"
    split = flags.split or "train"
    settings = EvaluationSettings(extract, flags.reference, split, cache, crop)
    first = jax.process_index() == 0
    if flags.weights is None:
        samples = flags.samples
        report = on_first_process(
            lambda: evaluate_images(settings, open_image_set(samples), samples, out)
        )
        if first:
            print_report(report)
        return
    model = load(flags.weights, flags.dtype, **companions(flags))
    given = evaluation_options(transformer_config(model), given)
    options = model.options(**given)
    labels = tuple(range(model.classes))

    if classifier is not None:
        check_classifier(classifier, model)

    def reports_at(outs: Sequence[pathlib.Path], options: Any, seed: int) -> list[dict[str, Any]]:
        """Samples with these options; returns a report per acceptance."""
        job = SamplingJob(labels, flags.count, seed, options, batch_size=1)
        jobs = dict.fromkeys(outs, job)
        if classifier is not None:
            jobs = {
                out: dataclasses.replace(job, accept=accept, classifier=classifier.identity)
                for out, accept in zip(outs, accepts or [flags.accept], strict=True)
            }
        images = max(len(job.label_M) for job in jobs.values())
        # Reports that share what is drawn share its batch size, so any of them tells it.
        sizes = map(begun_batch_size_of_report, outs)
        size = choose_batch_size(
            flags.batch_size, model, options, images, lambda: next(filter(None, sizes), None)
        )
        jobs = {out: dataclasses.replace(job, batch_size=size) for out, job in jobs.items()}
        return evaluate_model(settings, model, flags.weights, jobs, classifier)

    if not flags.sweep:
        check_guide_is_used(flags.guide, [options])
        (report,) = reports_at([out], options, flags.seed)
        if first:
            print_report(report)
        return
    # The picture would become an image of the reference.
    if is_dataset(flags.reference):
        data = dataset_of(settings, model.image_shape)
        if isinstance(data, Folder):
            data.check_outside("out", out)
    # The options of all points are checked before the first one is drawn.
    chosen = [(p, model.options(**{**given, **p})) for p in parse_sweep(sweep, options)]
    check_guide_is_used(flags.guide, [options for _, options in chosen])
    groups = []
    for (option_values, options), seed in itertools.product(chosen, seeds or [flags.seed]):
        # The points of a group differ in their acceptances, and share what is drawn.
        shared = option_values | ({"seed": seed} if seeds else {})
        group = [shared | {"accept": accept} for accept in accepts] or [shared]
        groups.append((group, options, seed))
    points = [point for group, *_ in groups for point in group]

    def begun_points() -> list[str]:
        check_sweep_output(out, points)
        return [options_text(point) for point in points if point_path(out, point).exists()]

    begun = on_first_process(begun_points)
    load_pyplot()  # the picture comes last, after all samples
    # Existing reports come first, so that those of other samples or of another reference are
    # refused before anything is drawn.
    groups.sort(key=lambda group: not any(options_text(point) in begun for point in group[0]))
    reports = {}
    for group, options, seed in groups:
        for point in group:
            print(", ".join(f"{name}={value}" for name, value in point.items()), file=sys.stderr)
        names = map(options_text, group)
        outs = [point_path(out, point) for point in group]
        reports |= zip(names, reports_at(outs, options, seed), strict=True)
    measured = [SweepPoint(point, reports[options_text(point)]) for point in points]
    if first:
        picture = write_sweep(measured, out)
        print(f"\n{sweep_table(measured)}\n\nthe curve: {picture}\nall points: {out}")


def _parser() -> argparse.ArgumentParser:
    parser = command_parser("varjax evaluate", __doc__)
    add = parser.add_argument
    add("samples", nargs="?", metavar="SAMPLES", help="an .npz or a folder of images")
    add("--reference", required=True, help="statistics or images to compare with")
    add("--inception", default="", metavar="DIR", help="converted weights of Inception")
    add(
        "--features",
        default="inception",
        help="inception, pixels for tiny images, or the directory of a classifier (inception)",
    )
    add("--split", choices=("train", "held_out"), help="split of a reference dataset (train)")
    add("--crop", default=AUTO, choices=(AUTO, *CROPS), help=CROP_HELP)
    add("--cache", default=str(default_cache()), help="folder for statistics of references")
    add(
        "--sweep",
        nargs="+",
        default=[],
        metavar="OPTION=V,V",
        help="options to vary, in all combinations; accept varies the acceptance, seed the seed: "
        "the table then shows means and standard deviations",
    )
    about = "report, .json; --sweep writes more reports and a picture next to it (report.json)"
    add_sampling_flags(parser, "report.json", about, weights_required=False)
    add_rejection_flags(parser)
    parser.set_defaults(count=50)
    add_process_flags(parser)
    return parser


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    return run_on_processes("varjax evaluate", lambda: evaluate(arguments))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
