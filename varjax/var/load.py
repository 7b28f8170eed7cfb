"""A transformer with its tokenizer, from a training run or a converted directory."""

import pathlib
from collections.abc import Sequence
from typing import Any, Literal, get_args

from varjax.core import config_tree
from varjax.core.errors import InputError
from varjax.core.saved_steps import restore_weights
from varjax.core.trees import PyTree
from varjax.nn.compute import Compute
from varjax.tokenizers.load import read_config, read_part, read_tokenizer
from varjax.var.model import VARConfig, init_var
from varjax.var.pipeline import Pipeline
from varjax.var.sample import Options

Dtype = Literal["auto", "float32", "bfloat16"]


def load(
    location: str | pathlib.Path,
    dtype: Dtype = "auto",
    devices: Sequence[Any] | None = None,
    compute: Compute | None = None,
) -> Pipeline:
    """The model in a converted directory, or what a training run has learned.

    dtype: of the transformer's matrix products; "auto" is float32 on a CPU, else bfloat16.
    devices: which share each batch out among them; None: all of this process.
    compute: for more than the dtype, instead of it.

    Of a run, the best weights if it kept them, averaged if it averaged them. Raises InputError that
    says what `location` lacks.
    """
    if dtype not in get_args(Dtype):
        raise InputError(f"dtype={dtype!r}: allowed are {', '.join(get_args(Dtype))}")
    if compute is not None and dtype != "auto":
        raise InputError(f"dtype={dtype!r} and compute={compute}: give the dtype within compute")
    var, params, sampling = read_var(location)
    tokenizer, tokenizer_params = read_tokenizer(location)
    params = {"tokenizer": tokenizer_params, "var": params}
    return Pipeline(tokenizer, var, params, sampling, compute or Compute(dtype), devices)


def read_var(
    location: str | pathlib.Path, ema: bool | None = None
) -> tuple[VARConfig, PyTree, Options]:
    """(config, params, sampling) of the transformer in a run or a converted directory.

    ema: of a run, the averaged weights or not; None for them if there are any. Raises InputError
    that says what `location` lacks.
    """
    directory = pathlib.Path(location)
    config = read_config(directory)
    if "task" not in config:
        sampling = config_tree.from_dict(Options, config["sampling"])
        return *read_part(directory, "var", VARConfig, init_var), sampling
    task = config["task"]
    if task["_type"] != "VARTask":
        raise InputError(f"{directory} is a run of {task['_type']}, not of a transformer (VARTask)")
    model = config_tree.from_dict(VARConfig, task["model"])
    sampling = config_tree.from_dict(Options, task["sampling"])
    return model, restore_weights(directory, ema), sampling
