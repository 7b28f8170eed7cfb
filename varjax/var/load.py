"""Reading a VAR transformer from a training run or a converted directory."""

import pathlib

from varjax.core import config_tree
from varjax.core.errors import InputError
from varjax.core.saved_steps import restore_weights
from varjax.core.trees import PyTree
from varjax.tokenizers.load import read_config, read_part
from varjax.tokenizers.vq.model import VQConfig
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions


def read_var(
    location: str | pathlib.Path, ema: bool | None = None
) -> tuple[VARConfig, PyTree, VAROptions]:
    """Reads config, parameters and recommended sampling options of a transformer.

    Args:
        location: a training run, or a converted directory.
        ema: of a run, the averaged weights or not; None for them if there are any.

    Raises:
        InputError: says what `location` lacks.
    """
    directory = pathlib.Path(location)
    config = read_config(directory)
    if "task" not in config:
        sampling = config_tree.from_dict(VAROptions, config["sampling"])
        return *read_part(directory, "var", VARConfig, VARConfig.init), sampling
    task = config["task"]
    if task["_type"] != "VARTask":
        raise InputError(f"{directory} is a run of {task['_type']}, not of a transformer (VARTask)")
    model = config_tree.from_dict(VARConfig, task["model"])
    sampling = config_tree.from_dict(VAROptions, task["sampling"])
    return model, restore_weights(directory, ema), sampling


def check_fit(tokenizer: VQConfig, var: VARConfig) -> None:
    """Raises InputError, with all differences, where a transformer cannot read these tokens."""
    fields = ("scales", "vocab", "code_channels")
    pairs = {name: (getattr(tokenizer, name), getattr(var, name)) for name in fields}
    if lines := [f"{n}: tokenizer {a}, transformer {b}" for n, (a, b) in pairs.items() if a != b]:
        raise InputError("tokenizer and transformer do not fit:\n  " + "\n  ".join(lines))
