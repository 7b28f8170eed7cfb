"""Describes the source files of weights, and names them in messages."""

import contextlib
import dataclasses
import hashlib
import pathlib
import sys
from collections.abc import Collection, Iterator

import numpy as np
from tqdm import tqdm

from varjax.convert.name_maps.name_map import NameMap, Tensors
from varjax.errors import InputError
from varjax.storage.untrusted import abridged

CHUNK_BYTES = 2**24


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds what was read for one part of a directory of weights.

    Attributes:
        path: path of the file, or of the index of its parts.
        kind: kind of model that the file holds.
        tensors: official tensors, all from that model.
        held: all tensors of the file, by the names used in it.
        files: `path` and the paths of its parts.
    """

    path: pathlib.Path
    kind: NameMap
    tensors: Tensors
    held: Tensors = dataclasses.field(default_factory=dict)
    files: tuple[pathlib.Path, ...] = ()


@contextlib.contextmanager
def errors_naming(path: str | pathlib.Path) -> Iterator[None]:
    """Puts the name of a file before the message of an InputError."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


class Problems:
    """Collects users' mistakes, so that one message lists them all.

    problems = Problems()
    for path in paths:
        with problems.collected():
            read(path)
    problems.check()
    """

    def __init__(self):
        self._messages: list[str] = []

    @contextlib.contextmanager
    def collected(self) -> Iterator[None]:
        """Keeps the message of an InputError instead of raising it."""
        try:
            yield
        except InputError as error:
            self._messages.append(str(error))

    def check(self) -> None:
        """Raises one InputError with all messages, if there are any."""
        if self._messages:
            raise InputError("\n".join(self._messages))


def warn_not_finite(path: pathlib.Path, tensors: Tensors) -> None:
    """Lists on stderr the tensors with NaN or infinite numbers; they are converted anyway."""
    if bad := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
        print(
            f"warning: {path}: NaN or infinite numbers in {len(bad)} tensors: "
            + ", ".join(abridged(bad)),
            file=sys.stderr,
        )


def sha256_of(paths: Collection[pathlib.Path]) -> dict[str, str]:
    """Returns each file's SHA-256 by its name, or by its path where two have the same name."""
    names = [path.name for path in paths]
    digests = {}
    for path in paths:
        sha256 = hashlib.sha256()
        with (
            open(path, "rb") as file,
            byte_progress(f"reading {path.name}", path.stat().st_size) as bar,
        ):
            while chunk := file.read(CHUNK_BYTES):
                sha256.update(chunk)
                bar.update(len(chunk))
        digests[path.name if names.count(path.name) == 1 else str(path)] = sha256.hexdigest()
    return digests


def byte_progress(text: str, nbytes: int) -> tqdm:
    """Makes a progress bar that counts bytes; it shows only where stderr is a terminal."""
    return tqdm(total=nbytes, desc=text, unit="B", unit_scale=True, disable=None)
