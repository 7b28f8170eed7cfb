"""Files that are either whole or absent: atomic replacement, JSON, and trees of arrays."""

import contextlib
import fcntl
import json
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Set
from typing import Any

import numpy as np

from varjax.core import safetensors_io
from varjax.core.errors import InputError, StorageError


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a sibling path to write a file or a directory to; on success it becomes `path`.

    The content reaches the disk before the name does, so a reader sees the old content or all of
    the new one. On an exception the temporary is removed and `path` stays as it was. Raises
    StorageError where it cannot be written.
    """
    path = pathlib.Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        yield temporary
        inside = temporary.rglob("*") if temporary.is_dir() else ()
        for entry in (*inside, temporary):
            _fsync(entry)
        if path.is_dir():  # os.replace refuses a directory that is not empty
            shutil.rmtree(path)
        os.replace(temporary, path)
        _fsync(path.parent)
    except InputError:  # a StorageError among them
        raise
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            _remove(temporary)


def cache_folder() -> pathlib.Path:
    """Returns the folder of what can be made again, $VARJAX_CACHE; it need not exist."""
    if chosen := os.environ.get("VARJAX_CACHE"):
        return pathlib.Path(chosen).expanduser()
    general = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return pathlib.Path(general).expanduser() / "varjax"


@contextlib.contextmanager
def lock_folder(folder: str | os.PathLike, wait: bool = False) -> Iterator[None]:
    """Keeps other processes that ask for the same folder out of it, until this one is done or dead.

    A file system without locks keeps nobody out.

    Args:
        folder: an existing one.
        wait: for another process to be done, instead of raising.

    Raises:
        InputError: another process is there now.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            raise InputError(
                f"another process is at work in {folder}; wait for it, stop it, or choose another"
            ) from None
        except OSError:  # no locks here
            pass
        yield
    finally:
        os.close(descriptor)


def check_replaceable(folder: str | os.PathLike, own: Set[str] = frozenset()) -> None:
    """Raises InputError where writing `folder` as a whole would lose anybody else's files.

    Args:
        folder: may be absent, empty, or hold nothing but files named in `own`.
        own: names of files that the same command wrote, and would write again.
    """
    folder = pathlib.Path(folder)
    present = {path.name for path in folder.iterdir()} if folder.is_dir() else {folder.name}
    if folder.exists() and (foreign := sorted(present - own)):
        raise InputError(
            f"{folder} exists and holds {', '.join(foreign[:5])}, which would be lost; "
            "choose another out, or remove it first"
        )


def claim_folder(
    folder: str | os.PathLike, request_file: str, request: Mapping[str, Any], write: bool = True
) -> None:
    """Makes `folder` this request's own, so that the same command can go on in it after a kill.

    Args:
        folder: absent, empty (hidden files do not count), or begun for an equal request.
        request_file: name of the JSON file in it that keeps the request.
        request: JSON data, all that decides what will lie in the folder.
        write: whether to write the file where it is missing; of several processes the first does.

    Raises:
        InputError: the folder holds other files, or was begun for another request; then all
            differences are listed.
    """
    folder = pathlib.Path(folder)
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; choose another out")
    # One listing, for other processes may be at work in the folder already.
    listing = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    if request_file in listing:
        check_same_request(folder, read_json(folder / request_file), request)
    elif any(not name.startswith(".") for name in listing):
        raise InputError(
            f"{folder} holds files and no {request_file}; empty it or choose another out"
        )
    elif write:
        write_json(folder / request_file, request)


def check_same_request(
    path: str | os.PathLike, there: Mapping[str, Any], asked: Mapping[str, Any]
) -> None:
    """Raises InputError, with all differences, unless `path` was made for the request `asked`."""
    asked = json.loads(json.dumps(asked))  # as `there` was: tuples become lists
    lines = [
        f"{name}: {there.get(name)} there, {asked.get(name)} asked for"
        for name in dict.fromkeys((*there, *asked))
        if there.get(name) != asked.get(name)
    ]
    if lines:
        raise InputError(
            f"{path} was made for another request, or of files that have changed since:\n  "
            + "\n  ".join(line if len(line) < 300 else line[:300] + " …" for line in lines)
            + "\nask for the same to go on, delete it, or choose another out"
        )


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Writes `data` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(data, indent=2) + "\n")


def read_json(path: str | os.PathLike) -> Any:
    """The content of a JSON file; ValueError when it is missing or not JSON."""
    path = _existing(path)
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}); restore or delete it") from error


def write_tensors(path: str | os.PathLike, tree: Mapping, metadata: Mapping[str, str]) -> None:
    """Writes nested dicts of arrays as one .safetensors file, keys joined by "/", atomically.

    Args:
        path: the file.
        tree: its leaves may be `safetensors_io.LazyArray`; empty dicts leave no trace in the file.
        metadata: text by name.
    """
    arrays = {
        name: leaf if isinstance(leaf, safetensors_io.LazyArray) else np.asarray(leaf)
        for name, leaf in _flatten(tree).items()
    }
    with atomic_path(path) as temporary:
        safetensors_io.write_safetensors(temporary, arrays, metadata)


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a file of `write_tensors`; the leaves are read-only views of a memory map.

    Returns:
        (tree, metadata). A leaf is read from the disk when it is used.

    Raises:
        InputError: the file is missing, damaged or cut short.
    """
    tree: dict[str, Any] = {}
    flat, metadata = safetensors_io.read_safetensors(_existing(path))
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree, metadata


def _flatten(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        assert isinstance(key, str) and key and "/" not in key, key
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}/")
        else:
            flat[prefix + key] = value
    return flat


def _existing(path: str | os.PathLike) -> pathlib.Path:
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}")
    return path


def _remove(path: pathlib.Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
