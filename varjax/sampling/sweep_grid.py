"""Draws one picture of a model with several sampling options: a row for each combination."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from varjax.errors import InputError
from varjax.sampling.grid_output import MemoryOutput, PictureWords, named_once
from varjax.sampling.job import SamplingJob, run_job
from varjax.sampling.option_sweep import option_text, parse_sweep
from varjax.sampling.outputs import check_out_holds, file_suffix
from varjax.sampling.sampler import Sampler
from varjax.storage import image_io
from varjax.storage.buckets import as_path
from varjax.storage.captioned_grid import Captions, captioned_grid

MOST_ROWS = 100


def sweep_points(texts: Sequence[str], options: Any, out: str) -> list[dict[str, Any]]:
    """Reads the options to vary, and checks that a picture can show them.

    Args:
        texts: options and their values, such as "guidance=1,2,4"; see `parse_sweep`.
        options: sampling options of the model.
        out: output of the command.

    Returns:
        The values of each row by option name.

    Raises:
        InputError: an option or value that does not exist, too many rows, or another output.
    """
    if file_suffix(out) != ".png":
        raise InputError(f"out={out}: --sweep draws a row for each value; give FILE.png")
    points = parse_sweep(texts, options)
    if len(points) > MOST_ROWS:
        raise InputError(f"sweep has {len(points):,} combinations; a grid has at most {MOST_ROWS}")
    return points


def point_name(values: Mapping[str, Any]) -> str:
    """Names a combination of options: "guidance 2 · top_k 0"."""
    return " · ".join(f"{name} {option_text(value)}" for name, value in values.items())


def draw_rows(
    model: Sampler, jobs: Sequence[SamplingJob], names: Sequence[str], out: str, words: PictureWords
) -> str:
    """Draws jobs that differ in their options, and writes one picture with a row for each.

    The images of a column have the same label and random key.

    Args:
        model: model that draws.
        jobs: jobs of the rows.
        names: name of each row.
        out: path of the picture, FILE.png.
        words: title and file text of the picture, and the name of each image of a row.

    Returns:
        A line that says what was written where.

    Raises:
        InputError: too many images for a picture, or NaN in an image.
    """
    columns = len(jobs[0].label_N)
    check_out_holds(out, columns * len(jobs), model.image_shape, columns=columns)
    rows = []
    for job in jobs:
        output = MemoryOutput()
        run_job(model, job, output)
        rows.append(output.images())
    captions = Captions(words.title, rows=names, columns=named_once(words.names))
    picture_HWC = captioned_grid(np.concatenate(rows), captions, columns)
    image_io.write_png(as_path(out), picture_HWC, words.text)
    return f"{out}: {len(jobs)} rows of {columns} images"
