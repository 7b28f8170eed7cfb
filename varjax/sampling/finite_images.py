"""Checks images for NaN and infinite numbers before they are written."""

from collections.abc import Callable
from typing import Any

import numpy as np

from varjax.errors import InputError


def finite_rows(images_BHWC: np.ndarray) -> np.ndarray:
    """Returns which images contain only finite numbers, (B,) bool."""
    return np.all(np.isfinite(images_BHWC), axis=(1, 2, 3))


def check_finite_images(
    images_BHWC: np.ndarray,
    index_B: Any,
    label_B: Any,
    seed: int,
    advice: Callable[[], str],
) -> None:
    """Checks images that are about to be written; NaN would be written as black.

    Args:
        images_BHWC: float images to check.
        index_B: numbers of the images.
        label_B: classes of the images.
        seed: random seed of all images.
        advice: function that returns what to try, usually `Sampler.advise_on_nan`.

    Raises:
        InputError: an image holds NaN or infinite numbers; names the first one.
    """
    bad = np.flatnonzero(~finite_rows(images_BHWC))
    if bad.size:
        i = bad[0]
        raise InputError(
            f"image {int(index_B[i])} (label {int(label_B[i])}, seed {seed}) holds NaN or infinite "
            f"numbers, as do {bad.size} of the {len(images_BHWC)} images of its batch, and "
            f"is not written. {advice()}"
        )
