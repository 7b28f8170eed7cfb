"""A trained transformer with its tokenizer, from a run."""

import pathlib

from varjax import files, settings
from varjax.nn.compute import Compute
from varjax.tokenizer.load import read_task
from varjax.tokenizer.model import TokenizerConfig
from varjax.training.checkpoint import restore_weights
from varjax.var.model import VARConfig
from varjax.var.pipeline import Pipeline
from varjax.var.sample import Options


def load(location: str, compute: Compute = Compute()) -> Pipeline:  # noqa: B008  (frozen)
    """What a run has learned: its best weights if it kept them, averaged if it averaged them.

    Raises ValueError that says what `location` lacks.
    """
    run = pathlib.Path(location)
    task = read_task(run)
    if task["_type"] != "VARTask":
        raise ValueError(f"{run} is a run of {task['_type']}, not of a transformer (VARTask)")
    params = {
        "tokenizer": files.read_tensors(run / "frozen.safetensors")[0],
        "var": restore_weights(run),
    }
    return Pipeline(
        settings.from_dict(TokenizerConfig, task["tokenizer"]),
        settings.from_dict(VARConfig, task["model"]),
        params,
        settings.from_dict(Options, task["sampling"]),
        compute,
    )
