"""Records what official tensors cannot express in a JSON file next to them, NAME.varjax.json.

`varjax.weight_files` writes it and `convert` reads it, so that weights converted back give the same
model.
"""

import dataclasses
import math
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from varjax import trees
from varjax.checkpoints.weights import abstract_params
from varjax.config import config_tree
from varjax.config.numbers import FLOAT32_MAX
from varjax.convert.apply_map import is_weight
from varjax.convert.name_maps import kinds, name_map_of
from varjax.convert.name_maps.name_map import NameMap, Source
from varjax.convert.weights_dir import sha256_of
from varjax.errors import InputError, errors_naming
from varjax.storage import files
from varjax.storage.untrusted import check_settings, shown

SUFFIX = ".varjax.json"
# Entries of a directory's config.json that describe its weights.
ABOUT = ("release", "license", "crop", "class_names")


@dataclasses.dataclass(frozen=True)
class Sidecar:
    """Holds what the tensors of an official file cannot tell.

    Attributes:
        path: path of the JSON file.
        config: config of the model.
        constants: parameters that no official tensor holds, by path.
        sampling: default sampling options; None for a tokenizer or a classifier.
        about: further entries of the directory's config.json: those of `ABOUT` that are known.
    """

    path: pathlib.Path
    config: Any
    constants: Mapping[str, np.ndarray]
    sampling: Any
    about: Mapping[str, Any]


def sidecar_path(file: pathlib.Path) -> pathlib.Path:
    """Returns the path of the JSON file that belongs to var.pth: var.varjax.json."""
    return file.with_suffix(SUFFIX)


def write_sidecar(
    file: pathlib.Path,
    config: Any,
    params: Mapping[str, Any],
    sampling: Any,
    about: Mapping[str, Any],
) -> None:
    """Writes the JSON file for all files that have the name of `file`, .pth and .safetensors.

    Args:
        file: one of the files, which are all written.
        config: config of the model.
        params: its parameters by path, on the host.
        sampling: default sampling options; None for a tokenizer or a classifier.
        about: further entries of the directory's config.json.
    """
    kind = name_map_of(config)
    weights = [path for path in file.parent.glob(f"{file.stem}.*") if path.suffix != ".json"]
    data = {
        "kind": kind.flag,
        "config": config_tree.to_dict(config),
        # The decimal number of a float32 is exact.
        "constants": {path: float(params[path]) for path in kind.constants(kind.options())},
    }
    if sampling is not None:
        data["sampling"] = config_tree.to_dict(sampling)
    data |= {name: about[name] for name in ABOUT if name in about}
    files.write_json(sidecar_path(file), {**data, "sha256": sha256_of(sorted(weights))})


def read_sidecar(file: pathlib.Path, source: Source, options: Mapping[str, Any]) -> Sidecar | None:
    """Reads the JSON file next to an official file; returns None if there is none.

    Args:
        file: file as the user gave it.
        source: what was read from the file.
        options: the user's options by name.

    Raises:
        InputError: the JSON is damaged or belongs to another file, or an option contradicts it.
    """
    path, kind = sidecar_path(file), source.kind
    if not files.exists(path):
        return None
    data = files.read_json(path)
    with errors_naming(path):
        _check_entries(data)
        if data["kind"] != kind.flag:
            known = kinds().get(data["kind"])
            other = known.description if known else shown(data["kind"])
            raise InputError(f"describes {other}, but {file} holds {kind.description}")
        _check_belongs(data, file, source.path)
        check_settings(data["config"], "config")
        config = config_tree.from_dict(kind.config, data["config"])
        constants = _read_constants(data, kind)
        _check_size(config, constants, source)
        sampling = None
        if kind.sampling:
            options_class: Any = type(kind.sampling(config))
            sampling = config_tree.from_dict(options_class, data.get("sampling", {}))
        about = {name: data[name] for name in ABOUT if name in data}
        if "sha256" not in data:  # the weights are no longer the published ones
            about.pop("release", None)
        sidecar = Sidecar(path, config, constants, sampling, about)
        _check_options(sidecar, kind, options)
    return sidecar


def _check_entries(data: Mapping[str, Any]) -> None:
    needed = {"kind": str, "config": dict, "constants": dict, "sampling": dict, "sha256": dict}
    for name, allowed in needed.items():
        if not isinstance(data.get(name, allowed()), allowed):
            raise InputError(f"{name} is {shown(data[name])}; expected a {allowed.__name__}")
    if missing := [name for name in ("kind", "config") if name not in data]:
        raise InputError(f"has no {' and no '.join(missing)}; delete it, or write it again")


def _check_belongs(data: Mapping[str, Any], file: pathlib.Path, local: pathlib.Path) -> None:
    """Raises InputError if the SHA-256 of other files is recorded; without any, all are allowed."""
    recorded = data.get("sha256")
    if recorded is not None and sha256_of([local])[local.name] not in recorded.values():
        raise InputError(
            f"belongs to another {file.name}: the file's SHA-256 differs from the recorded one. "
            'If you changed the weights but not the model, delete "sha256" from the JSON; if the '
            "model is a different one, delete the JSON"
        )


def _check_size(config: Any, constants: Mapping[str, Any], source: Source) -> None:
    """Raises InputError if the model is not as large as the file.

    A small file can claim any depth, and a table of names takes time in proportion to it.
    """
    params = trees.paths(abstract_params(config))
    needed = sum(math.prod(x.shape) for path, x in params.items() if path not in constants)
    held = sum(x.size for name, x in source.tensors.items() if is_weight(name))
    if needed != held:
        raise InputError(
            f"describes a model of {needed:,} parameters, but the file has {held:,}; delete the "
            "JSON if the model is a different one"
        )


def _read_constants(data: Mapping[str, Any], kind: NameMap) -> dict[str, np.ndarray]:
    expected, constants = kind.constants(kind.options()), data.get("constants", {})
    if constants.keys() != expected.keys():
        raise InputError(f"constants are {list(constants)}; expected {list(expected)}")
    smallest = float(np.finfo(np.float32).tiny)
    for name, value in constants.items():
        if type(value) not in (int, float) or not smallest <= value <= FLOAT32_MAX:
            raise InputError(
                f"constants.{name} is {shown(value)}; expected a float32 number above 0"
            )
    return {name: np.array(value, np.float32) for name, value in constants.items()}


def _check_options(sidecar: Sidecar, kind: NameMap, options: Mapping[str, Any]) -> None:
    """Raises InputError for an option that contradicts the JSON, whose settings are used."""
    given = kind.own_options(options)
    # Also an option that equals its default: the user chose it.
    chosen = {x.name: options[x.name] for x in dataclasses.fields(given) if x.name in options}
    held = kind.option_values(sidecar.config)
    wrong = [name for name, value in chosen.items() if held.get(name, value) != value]
    if others := [name for name in chosen if name not in held]:
        constants = kind.constants(given)
        if any(not np.allclose(x, sidecar.constants[path]) for path, x in constants.items()):
            wrong += others
    if wrong:
        flags = ", ".join(f"--{name}" for name in wrong)
        raise InputError(f"has different settings than {flags}; omit {flags}, or delete the JSON")
