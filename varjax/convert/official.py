"""Official PyTorch weights -> a converted directory."""

import contextlib
import dataclasses
import hashlib
import os
import pathlib
import sys
from collections.abc import Collection, Iterator, Mapping

import numpy as np

from varjax.convert.directory import check_vacant, converted_files, progress, write_converted
from varjax.convert.infer import Choices, Tensors, infer_tokenizer, infer_var
from varjax.convert.pth import read_checkpoint, state_dicts
from varjax.convert.transfer import Config, is_weight, to_ours
from varjax.var.sample import Options
from varjax.var.task import check_fit

Configs = dict[str, Config]  # of "tokenizer" and "var"
IN_TRAINER = {"tokenizer": "vae", "var": "var"}  # as `state_dicts` calls them
CHUNK_BYTES = 2**24


def convert(
    out: str | os.PathLike,
    tokenizer: str | os.PathLike | None = None,
    var: str | os.PathLike | None = None,
    choices: Choices = Choices(),  # noqa: B008  (frozen)
) -> Configs:
    """Writes the converted directory `out` from official .pth or .safetensors files.

    Either file may be left out; a checkpoint of the official trainer given as `var` also serves as
    `tokenizer`. Weights of any floating-point format become float32; those that are not finite are
    named on stderr. Returns what was found: the configs of "tokenizer" and "var".

    Raises ValueError that names the file for one that is damaged or of something else, for tensors
    that do not fit the model (all of them) and for models that do not fit each other; then, or if
    the disk fills up, nothing is left at `out`. An existing converted directory of the same models
    is replaced, anything else is never touched.
    """
    out = pathlib.Path(out)
    sources = _sources(tokenizer, var)
    check_vacant(out, converted_files(sources))
    configs = _infer(sources, choices)
    models = {}
    for name, config in configs.items():
        path, official = sources[name]
        with _about(path):
            models[name] = config, to_ours(config, official)
        _report_not_finite(path, official)
    paths = [path for path, _ in sources.values()]
    write_converted(out, models, Options(), _digests(dict.fromkeys(paths)))
    return configs


def _sources(
    tokenizer: str | os.PathLike | None, var: str | os.PathLike | None
) -> dict[str, tuple[pathlib.Path, Tensors]]:
    """The file and the tensors of each model that is there."""
    sources = {}
    for name, location in (("var", var), ("tokenizer", tokenizer)):
        if location is None:
            continue
        path = pathlib.Path(location)
        checkpoint = read_checkpoint(path)
        with _about(path):
            found = state_dicts(checkpoint)
            inside = IN_TRAINER[name]
            if not found.keys() & {"", inside}:
                raise ValueError(f"is a trainer's checkpoint that holds only {', '.join(found)}")
        sources[name] = path, found.get(inside) or found[""]
        if name == "var" and tokenizer is None and IN_TRAINER["tokenizer"] in found:
            sources["tokenizer"] = path, found[IN_TRAINER["tokenizer"]]
    if not sources:
        raise ValueError("there is nothing to convert; give a tokenizer, a transformer or both")
    return sources


def _infer(sources: Mapping[str, tuple[pathlib.Path, Tensors]], choices: Choices) -> Configs:
    configs = {}
    for name, (path, official) in sources.items():  # the transformer first: it knows the scales
        with _about(path):
            if name == "var":
                configs[name] = infer_var(official, choices)
                choices = dataclasses.replace(choices, scales=configs[name].scales)
            else:
                configs[name] = infer_tokenizer(official, choices)
    if len(configs) == 2:
        check_fit(configs["tokenizer"], configs["var"])
    return configs


@contextlib.contextmanager
def _about(path: pathlib.Path) -> Iterator[None]:
    """Puts the file's name before what a ValueError says."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _report_not_finite(path: pathlib.Path, official: Tensors) -> None:
    bad = [name for name, x in official.items() if is_weight(name) and not np.isfinite(x).all()]
    if bad:
        print(
            f"warning: {path}: NaN or infinite numbers in {len(bad)} tensors: {', '.join(bad)}",
            file=sys.stderr,
        )


def _digests(paths: Collection[pathlib.Path]) -> dict[str, str]:
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
