"""Draws images of given classes from a trained or converted model.

varjax sample --weights=runs/digits --labels=0,1,2 --count=8 --out=grid.png
varjax sample --weights=runs/digits --labels=all --count=100 --out=digits.npz
varjax sample --weights=runs/digits --labels=0,1,2 --out=steps.gif
varjax sample --weights=var_d16 --labels=207,"lesser panda" --sweep guidance=1,2,4 --out=grid.png

--accept=0.1 --classifier=DIR draws ten times as many images and keeps those to which a classifier
gives the highest probability of their class. --sweep draws a row for each value of an option, or
for each combination of several. A folder or an .npz may be large: all devices share
the work. If the command is interrupted, run it again to continue. Options that you leave out take
the model's default values.
"""

import argparse
import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from varjax.checkpoints.class_names import ClassNames
from varjax.cli.captions import class_titles, picture_title
from varjax.config.arguments import split_argument
from varjax.config.numbers import seed_number, whole_number
from varjax.errors import InputError
from varjax.models import load, option_classes
from varjax.runtime.commands import command_parser
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.runtime.distributed import add_process_flags, connect_by_flags, run_on_processes
from varjax.sampling.batch_size import add_batch_size_flag, choose_batch_size
from varjax.sampling.grid_output import PictureWords, grid_columns
from varjax.sampling.guidance import check_guide_is_used
from varjax.sampling.job import SamplingJob, locked_for_job, run_job
from varjax.sampling.option_sweep import check_given_or_swept
from varjax.sampling.outputs import (
    FILM_SUFFIXES,
    begun_batch_size,
    check_out,
    check_out_holds,
    file_suffix,
    open_output,
    work_folder,
)
from varjax.sampling.pipeline import checked_labels
from varjax.sampling.rejection import (
    add_rejection_flags,
    candidates_folder,
    check_classifier,
    classifier_of_flags,
    run_rejection_job,
)
from varjax.sampling.sampler import add_option_flags, given_options
from varjax.sampling.sweep_grid import draw_rows, point_name, sweep_points
from varjax.storage.picture_text import command_text

MOST_SHOWN_CLASSES = 10  # in the line about the result


def add_model_flags(parser: argparse.ArgumentParser, weights_required: bool = True) -> None:
    """Adds the flags that name a model and its helpers; see `companions`.

    weights_required: whether --weights must be given.
    """
    add = parser.add_argument
    about = (
        "training run (also RUN@STEP, RUN@best), converted weights, or published model: var_d16 …"
    )
    add("--weights", required=weights_required, help=about)
    about = "whether a run's EMA weights are used (default: unless the others were the best)"
    add("--ema", choices=("true", "false"), help=about)
    add("--guide", help="weaker model that guides this one (autoguidance); default: no class")
    add("--refiner", help="smaller VAR that draws the fine scales, faster (CoDe); default: none")
    about = "number of scales before those of the refiner (8); only with --refiner"
    add("--draft_scales", type=int, help=about)


def add_sampling_flags(
    parser: argparse.ArgumentParser, out: str, out_help: str, weights_required: bool = True
) -> None:
    """Adds the flags that `varjax sample`, `varjax edit` and `varjax evaluate` share.

    Args:
        parser: parser of the command, which gets the flags.
        out: default value of --out.
        out_help: help text of --out.
        weights_required: whether --weights must be given.
    """
    add_model_flags(parser, weights_required)
    add = parser.add_argument
    about = "number of images of each class, or of variations (%(default)s)"
    add("--count", type=int, default=4, help=about)
    add("--seed", type=int, default=0, help="random seed; each seed gives different images (0)")
    add_batch_size_flag(parser)
    add("--dtype", default="auto", help="dtype: auto, float32 or bfloat16")
    add("--out", default=out, help=out_help)
    # The options of every family: which of them apply is known only once the model is loaded.
    add_option_flags(parser.add_argument_group("options of the model"), option_classes())


def add_every_step_flag(parser: argparse.ArgumentParser) -> None:
    """Adds --every_step."""
    about = (
        "show each image after every scale or step, as animations do; FILE.png has a row per image"
    )
    parser.add_argument("--every_step", action="store_true", help=about)


def shows_every_step(flags: argparse.Namespace) -> bool:
    """Returns whether the output shows images after every scale or step, as animations do."""
    return flags.every_step or file_suffix(flags.out) in FILM_SUFFIXES


def companions(flags: argparse.Namespace) -> dict[str, Any]:
    """Returns the arguments of `varjax.load` about a model's weights, and models that help it."""
    ema = {None: None, "true": True, "false": False}[flags.ema]
    return {"ema": ema} | {
        name: getattr(flags, name) for name in ("guide", "refiner", "draft_scales")
    }


def check_sampling_flags(flags: argparse.Namespace) -> None:
    """Raises InputError if a number among these flags is out of range."""
    for name in ("count", "batch_size"):
        if (value := getattr(flags, name)) != "auto":
            whole_number(name, value, 1)
    seed_number("seed", flags.seed)


def draw_samples(arguments: list[str]) -> None:
    """Reads the command line, samples and writes.

    Raises InputError, before any long work, if the request is invalid.
    """
    parser = command_parser("varjax sample", __doc__)
    parser.add_argument(
        "--labels",
        help="classes to draw, by number or name: 0,1,dog or all, none for no class, or a mix: "
        "207:0.5+980:0.5 (default: a few, evenly spread)",
    )
    out_help = "output: FILE.png (a grid), FILE.npz, FOLDER, or FILE.gif, FILE.webp (samples.png)"
    add_sampling_flags(parser, "samples.png", out_help)
    add_every_step_flag(parser)
    add_rejection_flags(parser)
    parser.add_argument(
        "--sweep",
        nargs="+",
        metavar="OPTION=V,V",
        help="options of the model to vary, in all combinations: one row in FILE.png",
    )
    add_process_flags(parser)
    flags = parser.parse_args(arguments)
    check_sampling_flags(flags)
    check_out(flags.out)
    given = given_options(flags, option_classes())
    check_given_or_swept(given, flags.sweep or [])
    connect_by_flags(flags)
    use_compilation_cache()
    classifier = classifier_of_flags(flags)
    model = load(flags.weights, flags.dtype, **companions(flags))
    labels = choose_labels(flags.labels, model.labels)
    options = model.options(**given)
    job = SamplingJob(labels, flags.count, flags.seed, options, batch_size=1)
    if classifier is not None:
        check_classifier(classifier, model)
        if mixes := [label for label in labels if isinstance(label, str)]:
            raise InputError(f"--accept takes single classes, of which {mixes} have several")
        if model.classes in labels:
            raise InputError("--accept takes classes, and labels=none is no class")
        job = dataclasses.replace(job, accept=flags.accept, classifier=classifier.identity)
    every_step = shows_every_step(flags)
    points = sweep_points(flags.sweep, options, flags.out) if flags.sweep else []
    rows = [model.options(**{**given, **point}) for point in points]
    check_guide_is_used(flags.guide, rows or [options])
    varied = points[0] if points else ()
    if rows and (every_step or classifier is not None):
        raise InputError("--sweep draws finished images; leave out --every_step and --accept")
    if every_step and classifier is not None:
        raise InputError("--accept chooses finished images; leave it out to show every step")
    steps = model.steps(options) if every_step else None
    columns = grid_columns(len(labels), flags.count)
    check_out_holds(flags.out, len(job.label_N), model.image_shape, steps, columns)
    begun = functools.partial(begun_batch_size, flags.out)
    images = len(job.label_M)
    costliest = max(rows or [options], key=lambda row: model.sampling_bytes(1, row))
    batch_size = choose_batch_size(flags.batch_size, model, costliest, images, begun)
    job = dataclasses.replace(job, batch_size=batch_size, every_step=every_step)
    request = job.request(model)
    settings = {name: value for name, value in request.items() if name not in varied}
    names = [point_name(point) for point in points]
    drawn = file_suffix(flags.out) not in ("", ".npz")  # one picture, which has words on it
    words = PictureWords(
        picture_title(flags, options, accept=flags.accept, **dict.fromkeys(varied)),
        class_titles(job.label_N.tolist(), model.labels) if drawn else (),
        command_text("varjax sample", arguments, settings | ({"rows": names} if names else {})),
    )
    output = open_output(flags.out, job.label_N, columns, job.seed, request, job.every_step, words)
    if rows:
        jobs = [dataclasses.replace(job, options=row) for row in rows]
        message = draw_rows(model, jobs, names, flags.out, words)
    elif classifier is None:
        with locked_for_job(lambda: work_folder(flags.out)):
            message = run_job(model, job, output)
    else:
        folder = candidates_folder(flags.out)
        with locked_for_job(lambda: folder):
            message = run_rejection_job(model, job, classifier, output, folder)
    if message:
        print(message)
        print(f"classes: {_shown_classes(labels, model.labels)}")


def choose_labels(text: str | None, names: ClassNames) -> tuple[int | str, ...]:
    """Returns the classes in "0,1,dog" or "all"; None stands for up to ten, evenly spread.

    "none" means "no class", whose number is that of classes. A mix of classes, such as
    "dog:0.5+cat:0.5", becomes a mix of numbers, as text. "\\," stands for a comma within a name.
    Raises InputError for a class that does not exist.

    Args:
        text: classes by number or name, separated by commas.
        names: names of the model's classes.
    """
    classes = len(names)
    if text is None:
        spread = np.linspace(0, classes - 1, min(classes, 10)).astype(int)
        return tuple(spread.tolist())
    if text == "all":
        return tuple(range(classes))
    words = split_argument(text)
    labels = [word if word == "none" else names.numbers([word])[0] for word in words]
    if mixes := [label for label in labels if isinstance(label, str) and label != "none"]:
        checked_labels(mixes, classes)
    if bad := [x for x in labels if not isinstance(x, str) and not 0 <= x < classes]:
        raise InputError(f"labels {bad}: allowed are 0 … {classes - 1}, and none for no class")
    return tuple(classes if label == "none" else label for label in labels)


def _shown_classes(labels: Sequence[int | str], names: ClassNames) -> str:
    """Returns the first classes with their names: "207 golden retriever, 387 lesser panda"."""
    more = len(labels) - MOST_SHOWN_CLASSES
    titles = ", ".join(class_titles(labels[:MOST_SHOWN_CLASSES], names))
    return f"{titles} and {more} more classes" if more > 0 else titles


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    return run_on_processes("varjax sample", lambda: draw_samples(arguments))
