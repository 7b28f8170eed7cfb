"""A trained tokenizer from wherever it lies: its run, or the run of a model that builds on it."""

import pathlib

from varjax import files, settings
from varjax.tokenizer.model import TokenizerConfig
from varjax.training.checkpoint import restore_weights
from varjax.training.task import PyTree


def read_tokenizer(location: str | pathlib.Path) -> tuple[TokenizerConfig, PyTree]:
    """(config, params) of a tokenizer's run, or of a transformer's run that keeps a copy of one.

    Raises ValueError that names what is missing.
    """
    run = pathlib.Path(location)
    task = read_task(run)
    if task["_type"] == "TokenizerTask":
        return settings.from_dict(TokenizerConfig, task["model"]), restore_weights(run)
    if "tokenizer" not in task:
        raise ValueError(f"{run} is a run of {task['_type']}, which holds no tokenizer")
    config = settings.from_dict(TokenizerConfig, task["tokenizer"])
    return config, files.read_tensors(run / "frozen.safetensors")[0]


def load_tokenizer(location: str | pathlib.Path, expected: TokenizerConfig) -> PyTree:
    """The parameters at `location`; ValueError with all differences if they are of another model."""
    found, params = read_tokenizer(location)
    a, b = settings.to_dict(found), settings.to_dict(expected)
    if lines := [f"{name}: {a[name]} there, {b[name]} here" for name in a if a[name] != b[name]]:
        raise ValueError(f"{location} holds another tokenizer:\n  " + "\n  ".join(lines))
    return params


def read_task(run: pathlib.Path) -> dict:
    """The task's settings in the run's config.json."""
    if not (run / "config.json").is_file():
        raise ValueError(
            f"{run} is no training run: it has no config.json. Train it first, or "
            "give the directory that holds checkpoints/ and config.json"
        )
    return files.read_json(run / "config.json")["task"]
