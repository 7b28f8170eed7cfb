"""Files that are either whole or absent: atomic replacement, JSON, and trees of arrays.

Paths are those of `as_path`, on a disk or in a bucket (`varjax.storage.buckets`).
"""

import contextlib
import errno
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from etils.epath.stat_utils import StatResult
from tqdm import tqdm

from varjax.errors import InputError, StorageError
from varjax.storage import buckets, read_errors, safetensors_io
from varjax.storage.buckets import as_path, in_bucket
from varjax.storage.cache_dir import prune_copies, use_copy
from varjax.storage.read_errors import retry_read
from varjax.storage.untrusted import parse_json, path_inside, reason, shown

# Of a name, at most as much goes into that of a temporary; 255 bytes are allowed, of 4 a letter.
NAME_LETTERS = 50
TEMPORARY = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.tmp")
ABANDONED_SECONDS = 24 * 60 * 60  # a temporary that nobody has written to for so long is nobody's
DOWNLOADS = 16  # of a folder in a bucket, at a time
REPLACED_SECONDS = 1.0  # more than there is between the two renames that replace a folder


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a sibling path to write a file or a directory to; on success it becomes `path`.

    The content reaches the disk before the name does, so a reader sees the old content or all of
    the new one (a folder by `exists`). On an exception the temporary is removed and `path` stays as
    it was. Where `path` is a link, it stays one, and what it names is replaced; permissions stay as
    they were. What kills left in the same folder is removed. Raises StorageError where it cannot be
    written.

    What goes to a bucket is written to this machine's disk first, and uploaded on success.
    """
    with _written_beside(path) as (temporary, target):
        yield temporary
        if in_bucket(target):
            return buckets.upload(temporary, target)
        inside = temporary.rglob("*") if temporary.is_dir() else ()
        for entry in (*inside, temporary):
            _fsync(entry)
        if target.exists():
            with contextlib.suppress(OSError):  # a file system without permissions
                shutil.copymode(target, temporary)
        if temporary.is_dir() and target.is_dir():
            _replace_folder(temporary, target)
        else:
            os.replace(temporary, target)
        _fsync(target.parent)


def exists(path: str | os.PathLike) -> bool:
    """Returns whether there is such a file or folder, also where `atomic_path` was killed.

    A folder cannot be replaced in one step on all file systems: after a kill between two renames
    the old one was moved aside, and is put back here.
    """
    if in_bucket(path := as_path(path)):
        with buckets.storage_errors(path, "read"):
            return path.exists()
    for folder in (path, path.parent):
        if path.exists() or folder.exists() or not (aside := _aside(folder)).exists():
            continue
        time.sleep(REPLACED_SECONDS)  # perhaps nobody was killed, and the new one comes now
        with contextlib.suppress(OSError):  # it came, or somebody else was faster
            os.rename(aside, folder)
    return path.exists()


def local_copy(path: str | os.PathLike) -> pathlib.Path:
    """Returns a file or folder on this machine's disk, for readers that need one there.

    It is `path` itself, or a copy of what is in a bucket now, kept in `cache_folder` until that
    changes. Where nothing is there, `path` comes back: its reader knows best what is missing.

    Raises:
        StorageError: it cannot be read.
        InputError: an object has a name that leads out of the folder.
    """
    if not in_bucket(path := as_path(path)) or not (found := buckets.object_versions(path)):
        return path
    key = hashlib.sha256(json.dumps([str(path), found]).encode()).hexdigest()[:16]
    copy = use_copy(key) / path.name

    def fetch(name: str) -> None:
        with atomic_path(path_inside(copy, name, path) if name else copy) as temporary:
            buckets.download_object(path / name if name else path, temporary)

    missing = [name for name in found if not (copy / name if name else copy).exists()]
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        done = pool.map(fetch, missing)
        for _ in tqdm(done, f"copying {path}", len(missing), disable=len(missing) < 2):
            pass
    if missing:
        prune_copies()
    return copy


def probe_writable(folder: pathlib.Path) -> None:
    """Makes a file in a folder that is there, and removes it; raises OSError where that fails."""
    if in_bucket(folder):
        probe = folder / f".{secrets.token_hex(8)}.tmp"
        buckets.create_object(probe, b"")
        remove(probe)
    else:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()


def remove(path: pathlib.Path) -> None:
    """Removes a file, or a folder with all that is in it; nothing happens where there is none."""
    if in_bucket(path):
        buckets.remove_objects(path)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(path: pathlib.Path, to: pathlib.Path) -> None:
    """Moves a folder to a place where nothing is, on the same disk or in the same bucket.

    A kill leaves it at one of them, but in a bucket in parts at both.
    """
    if in_bucket(path):
        buckets.move_objects(path, to)
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        path.rename(to)


def modified(path: pathlib.Path) -> float:
    """Returns when a file was last written, in seconds since 1970; NaN where nobody knows."""
    stat = path.stat()
    return float(stat.mtime or math.nan) if isinstance(stat, StatResult) else stat.st_mtime


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Writes `data` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(_json_text(data))


def create_json(path: str | os.PathLike, data: Any) -> bool:
    """Writes a JSON file unless it exists; returns whether it did.

    Of several processes at once, on any machines, one does.
    """
    with _written_beside(path) as (temporary, target):
        if in_bucket(target):
            return buckets.create_object(target, _json_text(data).encode())
        temporary.write_text(_json_text(data))
        _fsync(temporary)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            os.replace(temporary, target)
        _fsync(target.parent)
    return True


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Reads an object from a JSON file.

    Raises:
        InputError: the file is missing, no JSON, or holds anything but an object.
        StorageError: it cannot be read now.
    """
    path = _existing(path)
    with buckets.storage_errors(path, "read"):
        text = retry_read(path.read_bytes, path)
    try:
        data = parse_json(text)
    except ValueError as error:
        raise InputError(
            f"{path} is not valid JSON ({reason(error)}); restore or delete it"
        ) from error
    if not isinstance(data, dict):
        raise InputError(f"{path} holds {shown(data)}, not an object of JSON; restore or delete it")
    return data


def write_tensors(path: str | os.PathLike, tree: Mapping, metadata: Mapping[str, str]) -> None:
    """Writes nested dicts of arrays as one .safetensors file, keys joined by "/", atomically.

    Args:
        path: file to write.
        tree: nested dict whose leaves are arrays or `safetensors_io.LazyArray`; empty dicts leave
            no trace in the file.
        metadata: text by name.
    """
    arrays = {
        name: leaf if isinstance(leaf, safetensors_io.LazyArray) else np.asarray(leaf)
        for name, leaf in _flatten(tree).items()
    }
    with atomic_path(path) as temporary:
        safetensors_io.write_safetensors(temporary, arrays, metadata)


def read_tensors(
    path: str | os.PathLike, check: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    """Reads a file of `write_tensors`; the leaves are read-only views of a memory map.

    Args:
        path: file to read.
        check: whether to read the whole file now and compare its checksums, if it has any.

    Returns:
        (tree, metadata). Without `check`, a leaf is read from the disk when it is used.

    Raises:
        InputError: the file is missing, damaged or cut short.
        StorageError: the machine or network fails.
    """
    tree: dict[str, Any] = {}

    def read() -> tuple[dict[str, np.ndarray], dict[str, str]]:
        copy = local_copy(_existing(path))
        flat, metadata = safetensors_io.read_safetensors(copy)
        if check:
            safetensors_io.check_tensors(path, flat, metadata)
        return flat, metadata

    flat, metadata = read_errors.retry_read(read, path)
    metadata.pop(safetensors_io.CHECKSUMS, None)
    for name, leaf in flat.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise InputError(f"{path}: {name} and another tensor are one inside the other")
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
    path = as_path(path)
    if not exists(path) or not path.is_file():
        raise InputError(f"{path} {'is a directory' if path.is_dir() else 'does not exist'}")
    return path


def _json_text(data: Any) -> str:
    return json.dumps(data, indent=2) + "\n"


@contextlib.contextmanager
def _written_beside(path: str | os.PathLike) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Yields (a path that nobody else uses, what it is to become); nothing stays of the first."""
    temporary = None
    try:
        if in_bucket(target := as_path(path)):
            with tempfile.TemporaryDirectory(prefix="varjax_") as folder:
                yield pathlib.Path(folder) / target.name, target
            return
        target = pathlib.Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        # Processes of two containers may have one number, and write to one disk.
        own = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary = target.with_name(f".{target.name[:NAME_LETTERS]}.{own}.tmp")
        yield temporary, target
    except InputError:  # a StorageError among them
        raise
    except OSError as error:
        raise StorageError(f"{path} could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            if temporary is not None:
                remove(temporary)


def _replace_folder(temporary: pathlib.Path, target: pathlib.Path) -> None:
    """Puts a folder in the place of another; a kill leaves the new, or the old for `exists`."""
    aside = _aside(target)
    remove(aside)  # older than what is there: of a kill just before the end
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise
    os.rename(aside, temporary)  # which is removed, now or, while others read it, later


def _aside(folder: pathlib.Path) -> pathlib.Path:
    """Returns the path where a folder is kept while another one replaces it."""
    return folder.with_name(f".{folder.name}.replaced") if folder.name else folder


@functools.cache
def _sweep(folder: pathlib.Path) -> None:
    """Removes temporaries that nobody will finish; once in a process, for folders may be large."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if (name := TEMPORARY.fullmatch(path.name)) is not None:
                with contextlib.suppress(OSError):  # others may do the same
                    if _is_abandoned(path, name["machine"], int(name["process"])):
                        remove(path)


def _is_abandoned(temporary: pathlib.Path, machine: str, process: int) -> bool:
    if machine == _machine():
        try:
            os.kill(process, 0)  # does nothing, but for asking whether there is such a process
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    entries = [temporary, *(temporary.rglob("*") if temporary.is_dir() else ())]
    return time.time() - max(entry.stat().st_mtime for entry in entries) > ABANDONED_SECONDS


@functools.cache
def _machine() -> str:
    """Names whatever counts its processes together: this container, since this machine's start."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
        about = socket.gethostname() + boot + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux: no process is known by its number alone
        return secrets.token_hex(4)
    return hashlib.sha256(about.encode()).hexdigest()[:8]


def _fsync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # CIFS and some FUSE file systems cannot do this with a folder; names are safe there or not.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
