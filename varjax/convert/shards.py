"""Checkpoints in several files: an index, MODEL.safetensors.index.json, and the parts it names."""

import os
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from varjax.convert.pth.read import read_checkpoint
from varjax.errors import InputError
from varjax.storage.buckets import as_path
from varjax.storage.files import local_copy
from varjax.storage.untrusted import abridged, check_relative_name, parse_json, shown

INDEX = ".index.json"
MAX_INDEX_BYTES, MAX_SHARDS = 2**24, 2**10
PART = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")


def local_files(location: str | os.PathLike) -> list[pathlib.Path]:
    """Returns the files of a checkpoint on this machine's disk: itself, or an index and its parts.

    Raises InputError for an index that is damaged, or a part that is given alone.
    """
    location = as_path(location)
    if part := PART.fullmatch(location.name):
        index = "".join(part.groups()) + INDEX
        raise InputError(f"{location} is one of several parts; give the index, {index}, instead")
    path = local_copy(location)
    if not path.name.endswith(INDEX) or not path.is_file():
        return [path]
    names = dict.fromkeys(_weight_map(path).values())
    return [path, *(local_copy(location.parent / name) for name in names)]


def read_files(files: Sequence[pathlib.Path]) -> Any:
    """Reads what `local_files` found; of several parts, their tensors together.

    Raises InputError that names the file that is missing or damaged, as `read_checkpoint` does.
    """
    index, *parts = files
    if not parts:
        return read_checkpoint(index)
    wanted, tensors = _weight_map(index), {}
    for path in parts:
        held = read_checkpoint(path)
        if not isinstance(held, dict):
            raise InputError(f"{path}: holds a {type(held).__name__}, not a dict of weights")
        tensors |= {name: x for name, x in held.items() if wanted.get(name) == path.name}
    if missing := sorted(wanted.keys() - tensors.keys()):
        raise InputError(f"{index}: its parts lack {', '.join(abridged(missing))}")
    return tensors


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """The part that holds each tensor, by the tensor's name."""
    problem = f"{index}: is no index of a checkpoint's parts"
    if index.stat().st_size > MAX_INDEX_BYTES:
        raise InputError(f"{problem}: it has more than {MAX_INDEX_BYTES} bytes")
    try:
        weight_map = parse_json(index.read_bytes())["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{problem} ({type(error).__name__}); download it again") from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{problem}: its weight_map is empty")
    names = set(map(str, weight_map.values()))
    if len(names) > MAX_SHARDS:
        raise InputError(f"{problem}: it names {len(names)} parts; allowed are {MAX_SHARDS}")
    # A name with a path in it could lead to any file of the machine.
    if strange := [n for n in names if n != pathlib.PurePath(n).name or n in ("", "..")]:
        raise InputError(f"{problem}: {shown(strange)} are no names of files beside it")
    for name in names:
        check_relative_name(name, index)
    return {str(name): str(part) for name, part in weight_map.items()}
