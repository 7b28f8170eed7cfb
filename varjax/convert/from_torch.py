"""Converts official PyTorch weights into a directory of weights."""

import os
import pathlib
from collections.abc import Mapping
from typing import Any

from varjax.convert.apply_map import is_weight, lazy_leaves
from varjax.convert.infer_config import infer_configs
from varjax.convert.name_maps import NAME_MAPS
from varjax.convert.name_maps.name_map import ConvertOptions, Tensors
from varjax.convert.pth.read import read_checkpoint
from varjax.convert.sources import errors_naming, sha256_of, warn_not_finite
from varjax.convert.state_dicts import TRAINER_KEYS, find_state_dicts
from varjax.convert.weights_dir import check_weights_dir, converted_files, write_converted
from varjax.core.errors import InputError

PARTS = tuple(dict.fromkeys(name_map.part for name_map in NAME_MAPS))


def convert(
    out: str | os.PathLike,
    options: ConvertOptions = ConvertOptions(),  # noqa: B008  (frozen)
    **files: str | os.PathLike | None,
) -> dict[str, Any]:
    """Writes a directory of weights from official .pth or .safetensors files.

        convert("weights/d16", tokenizer="vae_ch160v4096z32.pth", var="var_d16.pth")

    Weights of any floating-point format become float32. Those that are not finite are named on
    stderr. If anything fails or the disk fills up, nothing is left at `out`.

    Args:
        out: the directory. An existing one of the same models is replaced, nothing else ever is.
        options: tells what tensors cannot.
        files: of each part, `tokenizer` and `var`; either may be left out. A checkpoint of the
            official trainer given as `var` also serves as `tokenizer`.

    Returns:
        The config found for each part.

    Raises:
        InputError: names the file that is damaged or of something else, all tensors that do not fit
            their model, or how the models do not fit each other.
    """
    if unknown := files.keys() - set(PARTS):
        raise InputError(f"no part is called {', '.join(unknown)}; known are {', '.join(PARTS)}")
    out = pathlib.Path(out)
    sources = _read_sources({part: pathlib.Path(f) for part, f in files.items() if f is not None})
    check_weights_dir(out, converted_files(sources))
    configs = infer_configs(sources, options)
    models = {}
    for part, config in configs.items():
        path, tensors = sources[part]
        with errors_naming(path):
            models[part] = config, lazy_leaves(config, tensors)
        warn_not_finite(path, {name: x for name, x in tensors.items() if is_weight(name)})
    write_converted(out, models, sha256_of(dict.fromkeys(path for path, _ in sources.values())))
    return configs


def _read_sources(
    files: Mapping[str, pathlib.Path],
) -> dict[str, tuple[pathlib.Path, Tensors]]:
    """Returns the file and the tensors of each part; files of models may hold a tokenizer too."""
    sources: dict[str, tuple[pathlib.Path, Tensors]] = {}
    for part, path in files.items():
        checkpoint = read_checkpoint(path)
        with errors_naming(path):
            found = find_state_dicts(checkpoint)
            if not found.keys() & {"", part}:
                inside = ", ".join(TRAINER_KEYS[other] for other in found)
                raise InputError(f"is a trainer's checkpoint that holds only {inside}")
        sources[part] = path, found.get(part) or found[""]
        if "tokenizer" in found and "tokenizer" not in files:
            sources["tokenizer"] = path, found["tokenizer"]
    if not sources:
        raise InputError("there is nothing to convert; give a tokenizer, a transformer or both")
    return sources
