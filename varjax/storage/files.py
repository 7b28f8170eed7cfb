"""Writes files that are either complete or absent: atomic replacement, JSON, trees of arrays.

Paths come from `as_path` and are on a disk or in a bucket (`varjax.storage.buckets`).
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

# Characters of a name in its temporary's name: up to 4 bytes each, and 255 bytes are allowed.
NAME_LETTERS = 50
TEMPORARY = re.compile(r"\..*\.(?P<machine>[0-9a-f]{8})-(?P<process>\d+)-[0-9a-f]{8}\.tmp")
ABANDONED_SECONDS = 24 * 60 * 60  # without a write, after which a temporary is abandoned
DOWNLOADS = 16  # files downloaded at the same time
REPLACED_SECONDS = 1.0  # longer than the two renames that replace a folder take


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """Yields a temporary path for a file or a folder, which becomes `path` on success.

    The content reaches the disk before the name does, so a reader sees the old content or all of
    the new content (of a folder, after calling `exists`). On an exception, the temporary is removed
    and `path` is unchanged. If `path` is a link, its target is replaced; permissions are kept.
    Temporaries of killed processes in the same folder are removed. Raises StorageError if `path`
    cannot be written.

    Files for a bucket are written to the local disk first, and uploaded on success.
    """
    with _temporary_path(path) as (temporary, target):
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
    """Returns whether a file or folder exists, and repairs a folder if `atomic_path` was killed.

    Not all file systems can replace a folder in one step. If a process was killed between its two
    renames, the old folder is still at a temporary path and is moved back here.
    """
    if in_bucket(path := as_path(path)):
        with buckets.storage_errors(path, "read"):
            return path.exists()
    for folder in (path, path.parent):
        if path.exists() or folder.exists() or not (aside := _aside(folder)).exists():
            continue
        time.sleep(REPLACED_SECONDS)  # the process may still be alive and about to rename
        with contextlib.suppress(OSError):  # the new folder appeared, or another process was faster
            os.rename(aside, folder)
    return path.exists()


def local_copy(path: str | os.PathLike) -> pathlib.Path:
    """Returns a file or folder on the local disk, for readers that need one there.

    This is `path` itself, or a copy of the objects in a bucket, kept in `cache_folder` until they
    change. If the bucket has no such objects, `path` is returned, and its reader raises the error.

    Raises:
        StorageError: the bucket cannot be read.
        InputError: an object's name leads out of the folder.
    """
    if not in_bucket(path := as_path(path)) or not (versions := buckets.object_versions(path)):
        return path
    key = hashlib.sha256(json.dumps([str(path), versions]).encode()).hexdigest()[:16]
    copy = use_copy(key) / path.name

    def fetch(name: str) -> None:
        with atomic_path(path_inside(copy, name, path) if name else copy) as temporary:
            buckets.download_object(path / name if name else path, temporary)

    missing = [name for name in versions if not (copy / name if name else copy).exists()]
    with ThreadPoolExecutor(DOWNLOADS) as pool:
        done = pool.map(fetch, missing)
        for _ in tqdm(done, f"copying {path}", len(missing), disable=len(missing) < 2):
            pass
    if missing:
        prune_copies()
    return copy


def probe_writable(folder: pathlib.Path) -> None:
    """Writes and removes a file in an existing folder; raises OSError if that fails."""
    if in_bucket(folder):
        probe = folder / f".{secrets.token_hex(8)}.tmp"
        buckets.create_object(probe, b"")
        remove(probe)
    else:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
            file.flush()


def remove(path: pathlib.Path) -> None:
    """Removes a file, or a folder with its content, if it exists."""
    if in_bucket(path):
        buckets.remove_objects(path)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def move(path: pathlib.Path, to: pathlib.Path) -> None:
    """Moves a folder to a free path on the same disk or in the same bucket.

    If the process is killed, the folder is at one of the paths; in a bucket, it may be split.
    """
    if in_bucket(path):
        buckets.move_objects(path, to)
    else:
        to.parent.mkdir(parents=True, exist_ok=True)
        path.rename(to)


def modified(path: pathlib.Path) -> float:
    """Returns when a file was last written, in seconds since 1970; NaN if unknown."""
    stat = path.stat()
    return float(stat.mtime or math.nan) if isinstance(stat, StatResult) else stat.st_mtime


def write_json(path: str | os.PathLike, data: Any) -> None:
    """Writes `data` as indented JSON, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(_json_text(data))


def create_json(path: str | os.PathLike, data: Any) -> bool:
    """Writes a JSON file unless it exists; returns whether it was written.

    If several processes call this at once, on any machines, one of them writes the file.
    """
    with _temporary_path(path) as (temporary, target):
        if in_bucket(target):
            return buckets.create_object(target, _json_text(data).encode())
        temporary.write_text(_json_text(data))
        _fsync(temporary)
        try:
            os.link(temporary, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            try:
                target.touch(exist_ok=False)  # only one process can create the file
            except FileExistsError:
                return False
            os.replace(temporary, target)
        _fsync(target.parent)
    return True


def read_json(path: str | os.PathLike) -> dict[str, Any]:
    """Reads an object from a JSON file.

    Raises:
        InputError: the file is missing, or does not contain a JSON object.
        StorageError: the file cannot be read now.
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
        raise InputError(f"{path} contains {shown(data)}, not a JSON object; restore or delete it")
    return data


def write_tensors(path: str | os.PathLike, tree: Mapping, metadata: Mapping[str, str]) -> None:
    """Writes nested dicts of arrays as one .safetensors file, keys joined by "/", atomically.

    Args:
        path: file to write.
        tree: nested dict whose leaves are arrays or `safetensors_io.LazyArray`; empty dicts are
            lost.
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
    """Reads a file that `write_tensors` wrote; leaves are read-only views of a memory map.

    Args:
        path: file to read.
        check: whether to read the whole file now and compare its checksums, if present.

    Returns:
        (tree, metadata). Without `check`, leaves are read from the disk when they are used.

    Raises:
        InputError: the file is missing, damaged or truncated.
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
            raise InputError(f"{path}: {name} is the name of a tensor and of a group of tensors")
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
def _temporary_path(path: str | os.PathLike) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
    """Yields (temporary path, final path); removes the temporary."""
    temporary = None
    try:
        if in_bucket(target := as_path(path)):
            with tempfile.TemporaryDirectory(prefix="varjax_") as folder:
                yield pathlib.Path(folder) / target.name, target
            return
        target = pathlib.Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target.parent)
        # Processes in two containers that write to one disk may have the same number.
        writer = f"{_machine()}-{os.getpid()}-{secrets.token_hex(4)}"
        temporary = target.with_name(f".{target.name[:NAME_LETTERS]}.{writer}.tmp")
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
    """Replaces a folder; after a kill, the new one exists or `exists` restores the old one."""
    aside = _aside(target)
    remove(aside)  # left by a process that was killed just before the end
    os.rename(target, aside)
    try:
        os.rename(temporary, target)
    except OSError:
        os.rename(aside, target)
        raise
    os.rename(aside, temporary)  # removed by the caller, or later if other processes read it


def _aside(folder: pathlib.Path) -> pathlib.Path:
    """Returns the path where a folder is kept while it is being replaced."""
    return folder.with_name(f".{folder.name}.replaced") if folder.name else folder


@functools.cache
def _sweep(folder: pathlib.Path) -> None:
    """Removes abandoned temporaries; once per process, because folders may be large."""
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if (name := TEMPORARY.fullmatch(path.name)) is not None:
                with contextlib.suppress(OSError):  # another process may remove it first
                    if _is_abandoned(path, name["machine"], int(name["process"])):
                        remove(path)


def _is_abandoned(temporary: pathlib.Path, machine: str, process: int) -> bool:
    if machine == _machine():
        try:
            os.kill(process, 0)  # only checks that the process exists
        except ProcessLookupError:
            return True
        except PermissionError:
            pass
    entries = [temporary, *(temporary.rglob("*") if temporary.is_dir() else ())]
    return time.time() - max(entry.stat().st_mtime for entry in entries) > ABANDONED_SECONDS


@functools.cache
def _machine() -> str:
    """Identifies this container since the machine's boot, in which process numbers are unique."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text()
        about = socket.gethostname() + boot + os.readlink("/proc/self/ns/pid")
    except OSError:  # not Linux: process numbers cannot be compared
        return secrets.token_hex(4)
    return hashlib.sha256(about.encode()).hexdigest()[:8]


def _fsync(path: pathlib.Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # CIFS and some FUSE file systems cannot sync a folder.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)
