"""Official PyTorch weights -> a converted directory."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping

from varjax.convert.apply_map import Config, to_ours
from varjax.convert.infer_config import Choices, Tensors, infer_tokenizer, infer_var
from varjax.convert.sources import about, digests, report_not_finite
from varjax.convert.state_dicts import read_checkpoint, state_dicts
from varjax.convert.weights_dir import check_vacant, converted_files, write_converted
from varjax.core.errors import InputError
from varjax.var.pretrained import check_fit
from varjax.var.sample import Options

Configs = dict[str, Config]  # of "tokenizer" and "var"
IN_TRAINER = {"tokenizer": "vae", "var": "var"}  # as `state_dicts` calls them


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

    Raises InputError that names the file for one that is damaged or of something else, for tensors
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
        with about(path):
            models[name] = config, to_ours(config, official)
        report_not_finite(path, official)
    paths = [path for path, _ in sources.values()]
    write_converted(out, models, Options(), digests(dict.fromkeys(paths)))
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
        with about(path):
            found = state_dicts(checkpoint)
            inside = IN_TRAINER[name]
            if not found.keys() & {"", inside}:
                raise InputError(f"is a trainer's checkpoint that holds only {', '.join(found)}")
        sources[name] = path, found.get(inside) or found[""]
        if name == "var" and tokenizer is None and IN_TRAINER["tokenizer"] in found:
            sources["tokenizer"] = path, found[IN_TRAINER["tokenizer"]]
    if not sources:
        raise InputError("there is nothing to convert; give a tokenizer, a transformer or both")
    return sources


def _infer(sources: Mapping[str, tuple[pathlib.Path, Tensors]], choices: Choices) -> Configs:
    configs = {}
    for name, (path, official) in sources.items():  # the transformer first: it knows the scales
        with about(path):
            if name == "var":
                configs[name] = infer_var(official, choices)
                choices = dataclasses.replace(choices, scales=configs[name].scales)
            else:
                configs[name] = infer_tokenizer(official, choices)
    if len(configs) == 2:
        check_fit(configs["tokenizer"], configs["var"])
    return configs
