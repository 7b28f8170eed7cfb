"""Finds the weights in official files: one or several parts, a state dict or a trainer's."""

import os
import pathlib
import re
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from varjax.convert.name_maps import kinds
from varjax.convert.name_maps.name_map import NameMap, Tensors
from varjax.convert.pth.read import read_checkpoint
from varjax.errors import InputError
from varjax.storage.buckets import as_path
from varjax.storage.files import local_copy
from varjax.storage.untrusted import abridged, check_name, check_relative_name, parse_json, shown

# Names that only HMAR's models have; `word_embed.weight` is in VAR's models too.
HMAR_NAMES = ("ns_blocks.", "ns_head", "mask_blocks.", "mask_head", "mask_embed.", "base_blocks.")
HMAR = "an HMAR model (NVlabs/HMAR, arXiv 2506.04421), not a VAR"
INDEX = ".index.json"
MAX_INDEX_BYTES, MAX_SHARDS = 2**24, 2**10
PART = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")


def local_files(location: str | os.PathLike) -> list[pathlib.Path]:
    """Returns local copies of a checkpoint's files: the file itself, or an index and its parts.

    Raises InputError for a damaged index, or for a single part without its index.
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
    """Reads the files that `local_files` returned, and joins the tensors of several parts.

    Raises InputError for a missing or damaged file, as `read_checkpoint` does.
    """
    index, *parts = files
    if not parts:
        return read_checkpoint(index)
    weight_map, tensors = _weight_map(index), {}
    for path in parts:
        weights = read_checkpoint(path)
        if not isinstance(weights, dict):
            raise InputError(f"{path}: holds a {type(weights).__name__}, not a dict of weights")
        tensors |= {name: x for name, x in weights.items() if weight_map.get(name) == path.name}
    if missing := sorted(weight_map.keys() - tensors.keys()):
        raise InputError(f"{index}: its parts lack {', '.join(abridged(missing))}")
    return tensors


def _weight_map(index: pathlib.Path) -> dict[str, str]:
    """Reads which part holds each tensor, by the tensor's name."""
    problem = f"{index}: is not an index of a checkpoint's parts"
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
        raise InputError(
            f"{problem}: it names {len(names)} parts; at most {MAX_SHARDS} are allowed"
        )
    # A name that contains a path could lead to any file on the machine.
    if strange := [n for n in names if n != pathlib.PurePath(n).name or n in ("", "..")]:
        raise InputError(f"{problem}: {shown(strange)} are not names of files in the same folder")
    for name in names:
        check_relative_name(name, index)
    return {str(name): str(part) for name, part in weight_map.items()}


# Keys of EMA weights next to "model": in MAR's trainer, and in DeiT's and later ones.
AVERAGED = ("model_ema", "ema")
WRAPPERS = ("state_dict", "model")
HMAR_TRAINER = "transformer_wo_ddp"  # key under which HMAR's trainer keeps its transformer


def find_state_dicts(checkpoint: Any, ema: bool | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Finds the weights in a checkpoint that `read_checkpoint` returned.

    Prefixes that PyTorch's DistributedDataParallel ("module.") and compile ("_orig_mod.") add to
    names are removed.

    Args:
        checkpoint: content of the checkpoint.
        ema: False ignores EMA weights; otherwise they are used if there are any.

    Returns:
        {flag: {name: array}}; the flag is "tokenizer" or "var" for a checkpoint of VAR's trainer,
        and "" for a plain state dict, which may be nested under "model_ema", "ema", "state_dict",
        "model", or "trainer" (as in CCA's fine-tuning of VAR).

    Raises:
        InputError: the checkpoint has no such weights, or other objects among them.
    """
    if not isinstance(checkpoint, dict):
        raise InputError(f"the checkpoint is a {type(checkpoint).__name__}, not a dict of weights")
    trainer = checkpoint.get("trainer", checkpoint)
    if isinstance(trainer, dict):
        if HMAR_TRAINER in trainer:
            raise InputError(f"holds {HMAR}, as {HMAR_TRAINER} shows; varjax does not support it")
        state_dicts = {
            flag: weights
            for flag, key in _trainer_keys().items()
            if isinstance(weights := trainer.get(key), dict) and weights
        }
        if state_dicts:
            return {flag: _clean(weights) for flag, weights in state_dicts.items()}
        if _is_state_dict(checkpoint.get("trainer")):
            return {"": _clean(trainer)}
    if ema is not False and (averaged := averaged_key(checkpoint)):
        return {"": _clean(checkpoint[averaged])}
    for key in WRAPPERS:
        if isinstance(checkpoint.get(key), dict):
            return {"": _clean(checkpoint[key])}
    if averaged := averaged_key(checkpoint):
        raise InputError(f"ema=False, but it has only EMA weights ({averaged}); leave ema out")
    return {"": _clean(checkpoint)}


def averaged_key(checkpoint: Any) -> str | None:
    """Returns the key of a checkpoint's EMA weights; None if it has none."""
    if not isinstance(checkpoint, dict):
        return None
    return next((key for key in AVERAGED if _is_state_dict(checkpoint.get(key))), None)


def own_tensors(kind: NameMap, tensors: Tensors) -> tuple[dict[str, np.ndarray], list[str]]:
    """Separates a model's tensors from the others in its file.

    Returns:
        The model's tensors by name without prefix, and the first parts of the other names.
    """
    prefix = kind.prefix if kind.prefix + kind.known_by in tensors else ""
    own, others = {}, []
    for full_name, x in tensors.items():
        name = full_name.removeprefix(prefix)
        if full_name.startswith(prefix) and not name.startswith(kind.ignored):
            own[name] = x
        else:
            others.append(name.partition(".")[0])
    return own, list(dict.fromkeys(others))


def warn_not_finite(path: pathlib.Path, tensors: Tensors) -> None:
    """Lists on stderr the tensors with NaN or infinite numbers; they are converted anyway."""
    if bad := [name for name, x in tensors.items() if not np.isfinite(x).all()]:
        print(
            f"warning: {path}: NaN or infinite numbers in {len(bad)} tensors: "
            + ", ".join(abridged(bad)),
            file=sys.stderr,
        )


def _trainer_keys() -> dict[str, str]:
    return {flag: kind.trainer_key for flag, kind in kinds().items() if kind.trainer_key}


def _is_state_dict(entry: Any) -> bool:
    return isinstance(entry, dict) and any(isinstance(x, np.ndarray) for x in entry.values())


def _clean(weights: Any) -> dict[str, np.ndarray]:
    """Checks that these are weights, and removes prefixes from their names."""
    if not isinstance(weights, dict) or not weights:
        raise InputError("the checkpoint has no weights")
    if strange := [key for key, x in weights.items() if not isinstance(x, np.ndarray)]:
        raise InputError(
            f"{len(strange)} of {len(weights)} entries are not arrays: {shown(strange)}; weights "
            f"must be at the top level, in {', '.join((*AVERAGED, *WRAPPERS))} or in trainer/"
            f"{', '.join(_trainer_keys().values())}; save only the weights"
        )
    named = {_without_prefixes(check_name(key)): x for key, x in weights.items()}
    if len(named) < len(weights):
        raise InputError("two names in the checkpoint differ only in module. or _orig_mod.")
    return named


def _without_prefixes(name: str) -> str:
    # A compiled submodule adds this in the middle of a name; no real module has such a name.
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
