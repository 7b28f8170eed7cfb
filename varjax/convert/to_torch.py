"""What was trained here -> a converted directory, or files for the official PyTorch code."""

import hashlib
import os
import pathlib

import jax

from varjax.convert.apply_map import Config, official_buffers, to_official
from varjax.convert.weights_dir import new_directory, write_converted, write_files
from varjax.core import trees
from varjax.core.errors import InputError
from varjax.core.trees import PyTree
from varjax.tokenizers.load import read_config, read_tokenizer
from varjax.var.load import read_var
from varjax.var.sample import Options

Models = dict[str, tuple[Config, PyTree]]  # of "tokenizer" and "var": config and params


def export_run(run: str | os.PathLike, out: str | os.PathLike, ema: bool | None = None) -> None:
    """Writes what a training run has learned as the converted directory `out`.

    That is its best weights if it kept them, else its last; ema: their average or not, None for the
    average if there is one. A run of a tokenizer gives a directory of the tokenizer alone.

    Raises InputError for what is no run and like `convert` for an `out` that cannot be written.
    """
    run, out = pathlib.Path(run), pathlib.Path(out)
    if "task" not in read_config(run):
        raise InputError(f"{run} is a converted directory already, not a training run")
    models, sampling = _read(run, ema)
    leaves = {name: (config, trees.paths(params)) for name, (config, params) in models.items()}
    digest = hashlib.sha256((run / "config.json").read_bytes()).hexdigest()
    write_converted(out, leaves, sampling, {f"{run.name}/config.json": digest})


def export_torch(
    weights: str | os.PathLike, out: str | os.PathLike, ema: bool | None = None
) -> None:
    """Writes a run or a converted directory for the official code, each model twice, into `out`.

    tokenizer.pth and var.pth are for `torch.load(path, weights_only=True)`, the .safetensors beside
    them hold the same: official names, all buffers, so `load_state_dict(strict=True)` takes them.

    Raises InputError for what holds no weights, and for an `out` that exists already.
    """
    weights, out = pathlib.Path(weights), pathlib.Path(out)
    models, _ = _read(weights, ema)
    contents = {}
    for name, (config, params) in models.items():
        official = {**to_official(config, params), **official_buffers(config)}
        contents |= {f"{name}.pth": official, f"{name}.safetensors": official}
    with new_directory(out, contents) as temporary:
        write_files(temporary, contents)


def _read(weights: pathlib.Path, ema: bool | None) -> tuple[Models, Options]:
    """The models that are there, on the host, and how to sample."""
    config = read_config(weights)
    models: Models = {}
    sampling = Options()
    task = config.get("task", {}).get("_type")
    if "tokenizer" in config or task:
        models["tokenizer"] = read_tokenizer(weights, ema)
    if "var" in config or task not in (None, "TokenizerTask"):
        var, params, sampling = read_var(weights, ema)
        models["var"] = var, params
    return {name: (c, jax.device_get(params)) for name, (c, params) in models.items()}, sampling
