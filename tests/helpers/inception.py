"""Provides FID's network with the golden case's random weights, as tensors and converted."""

import functools
import pathlib

import numpy as np

from tests.golden import weights
from tests.helpers import runs
from varjax.convert import convert_inception
from varjax.convert.pth.write import write_pth


def tensors() -> dict[str, np.ndarray]:
    return weights.state_dict("inception", "inception")


@functools.cache
def converted() -> pathlib.Path:
    """Returns a directory that `varjax convert --inception` wrote, made once for all tests."""
    folder = runs.root() / "inception"
    file = folder.with_suffix(".pth")
    if not folder.exists():
        write_pth(file, tensors())
        convert_inception(folder, file)
    return folder
