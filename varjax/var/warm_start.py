"""Reads weights of another transformer, from which training may start."""

import pathlib

from varjax.core.model_files import read_generator
from varjax.core.trees import PyTree
from varjax.training.task import MatchingRows
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions


def read_pretrained(location: str | pathlib.Path, model: VARConfig) -> tuple[PyTree, MatchingRows]:
    """Reads (params, rows) of `Task.pretrained` for a transformer `model`."""
    there, params, _ = read_generator(location, "var", "VARTask", VARConfig, VAROptions)
    return params, matching_rows(model, there)


def matching_rows(here: VARConfig, there: VARConfig) -> MatchingRows:
    """Finds rows of the embeddings that mean the same in both, where the whole tables do not.

    With other classes that is "no class" alone; with other scales, levels and positions of the
    token maps whose height and width are in both lists.

    Returns:
        {parameter: (rows here, rows there)}.
    """
    rows: MatchingRows = {}
    if here.classes != there.classes:
        rows["class_embed"] = [here.classes], [there.classes]
    a, b = here.pyramid, there.pyramid
    if a.shapes != b.shapes:
        levels = [(a.shapes.index(s), b.shapes.index(s)) for s in a.shapes if s in b.shapes]
        rows["level_embed"] = [i for i, _ in levels], [j for _, j in levels]
        rows["pos_embed"] = (
            [row for i, _ in levels for row in range(a.slices[i].start, a.slices[i].stop)],
            [row for _, j in levels for row in range(b.slices[j].start, b.slices[j].stop)],
        )
    return rows
