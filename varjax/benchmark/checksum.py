"""Measures how long checksums take, compared with reading a checkpoint or a .safetensors file.

varjax benchmark checksum --gigabytes=2

Prints a JSON line for each kind of file: seconds to read it, seconds to compare its checksums, and
their ratio. The files are read from the operating system's cache; from a disk, the ratio is
smaller.
"""

import argparse
import pathlib
import tempfile

import jax
import numpy as np

from varjax import trees
from varjax.benchmark.measure import print_figures
from varjax.checkpoints.fingerprint import fingerprints
from varjax.checkpoints.saved_steps import SavedSteps
from varjax.errors import check_setting
from varjax.runtime.commands import command_parser
from varjax.runtime.hardware import fastest_seconds
from varjax.storage import safetensors_io
from varjax.training.checkpoint import Checkpoints
from varjax.training.task import TrainState
from varjax.trees import PyTree

ARRAYS = 4  # of equal size


def main(arguments: list[str]) -> None:
    """Runs the command; prints a line for each kind of file."""
    parser = command_parser("varjax benchmark checksum", __doc__)
    parser.add_argument(
        "--gigabytes", type=float, default=2.0, help="gigabytes of float32 numbers (2)"
    )
    parser.add_argument("--folder", type=pathlib.Path, help="folder for temporary files")
    flags: argparse.Namespace = parser.parse_args(arguments)
    check_setting("gigabytes", flags.gigabytes, 0 < flags.gigabytes <= 1000, "in (0, 1000]")
    rows = max(1, round(flags.gigabytes * 1e9 / (4 * 2**20 * ARRAYS)))
    keys = jax.random.split(jax.random.key(0), ARRAYS)
    params = {f"array{i}": jax.random.normal(key, (rows, 2**20)) for i, key in enumerate(keys)}
    with tempfile.TemporaryDirectory(dir=flags.folder) as folder:
        for part, measure in {"checkpoint": _checkpoint, "safetensors": _safetensors}.items():
            read_seconds, checksum_seconds = measure(pathlib.Path(folder), params)
            print_figures(
                benchmark="checksum",
                part=part,
                gigabytes=trees.nbytes(params) / 1e9,
                read_seconds=read_seconds,
                checksum_seconds=checksum_seconds,
                ratio=checksum_seconds / read_seconds,
            )


def _checkpoint(folder: pathlib.Path, params: PyTree) -> tuple[float, float]:
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(1, TrainState(jax.numpy.int32(1), params, None, None))
    saved = SavedSteps(folder / "checkpoints")
    checksum = fastest_seconds(lambda: fingerprints(params))
    both = fastest_seconds(lambda: jax.block_until_ready(saved.params(1)))
    return both - checksum, checksum


def _safetensors(folder: pathlib.Path, params: PyTree) -> tuple[float, float]:
    path = folder / "x.safetensors"
    arrays = {name: np.asarray(array) for name, array in params.items()}
    safetensors_io.write_safetensors(path, arrays, {})
    tensors, metadata = safetensors_io.read_safetensors(path)
    read = fastest_seconds(lambda: [np.array(tensor) for tensor in tensors.values()])
    checksum = fastest_seconds(lambda: safetensors_io.check_tensors(path, tensors, metadata))
    return read, checksum
