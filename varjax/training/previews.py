"""Captions previews with run and step, classes of samples, and rows of reconstructions."""

from collections.abc import Sequence

import numpy as np

from varjax.storage.buckets import short_path
from varjax.storage.captioned_grid import Captions

PREVIEW_IMAGES = 8  # columns of a preview of reconstructions
PREVIEW_SAMPLES = 16
SAMPLES = "samples"  # the name of a preview of these


def preview_labels(classes: int) -> np.ndarray:
    """Returns the labels of a preview's samples, (16,): all classes, or 16 of many."""
    index_N = np.arange(PREVIEW_SAMPLES)
    if classes > PREVIEW_SAMPLES:
        return index_N * classes // PREVIEW_SAMPLES
    return index_N % classes


def reconstruction_names(rows: int) -> list[str]:
    """Names the rows of a picture of reconstructions.

    Args:
        rows: number of rows: reconstructions alone, or originals and below them reconstructions, of
            each scale if there are several.
    """
    if rows == 1:
        return ["reconstruction"]
    if rows == 2:
        return ["original", "reconstruction"]
    return ["original", *(f"scale {k}" for k in range(1, rows))]


def preview_captions(
    run_dir: str, step: int, name: str, shape: Sequence[int], class_names: Sequence[str]
) -> Captions:
    """Returns the words on a preview.

    Args:
        run_dir: directory of the run.
        step: number of updates done.
        name: name of the preview, as in `Task.preview`.
        shape: shape of its images: (N, H, W, C), or (rows, columns, H, W, C) of reconstructions.
        class_names: name of each class; () if they are not known.
    """
    title = f"{short_path(run_dir)} · {name} after step {step:,}"
    if len(shape) == 5:
        return Captions(title, rows=reconstruction_names(shape[0]))
    if name == SAMPLES and class_names and shape[0] == PREVIEW_SAMPLES:
        names_N = np.array(list(class_names))[preview_labels(len(class_names))]
        return Captions(title, tiles=names_N.tolist())
    return Captions(title)
