"""The files that weights come from: what is wrong with them, and which they were."""

import contextlib
import hashlib
import pathlib
import sys
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from varjax.convert.apply_map import is_weight
from varjax.convert.weights_dir import progress
from varjax.core.errors import InputError

CHUNK_BYTES = 2**24


@contextlib.contextmanager
def about(path: pathlib.Path) -> Iterator[None]:
    """Puts the file's name before what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise InputError(f"{path}: {error}") from error


def report_not_finite(path: pathlib.Path, official: Mapping[str, np.ndarray]) -> None:
    """Names on stderr the weights that are not; they are converted all the same."""
    bad = [name for name, x in official.items() if is_weight(name) and not np.isfinite(x).all()]
    if bad:
        print(
            f"warning: {path}: NaN or infinite numbers in {len(bad)} tensors: {', '.join(bad)}",
            file=sys.stderr,
        )


def digests(paths: Collection[pathlib.Path]) -> dict[str, str]:
    """SHA-256 of every file, by its name, or by its path where two have the same name."""
    names = [path.name for path in paths]
    digests = {}
    for path in paths:
        sha256 = hashlib.sha256()
        with (
            open(path, "rb") as file,
            progress(f"reading {path.name}", path.stat().st_size) as bar,
        ):
            while chunk := file.read(CHUNK_BYTES):
                sha256.update(chunk)
                bar.update(len(chunk))
        digests[path.name if names.count(path.name) == 1 else str(path)] = sha256.hexdigest()
    return digests
