"""A tokenizer from wherever it lies: a run, a run that builds on it, or a converted directory."""

import functools
import pathlib
from collections.abc import Callable
from typing import TypeVar

import jax

from varjax.core import config_tree, files, trees
from varjax.core.errors import InputError
from varjax.core.saved_steps import restore_weights
from varjax.core.trees import PyTree
from varjax.tokenizers.vq.model import VQConfig

T = TypeVar("T")


def read_tokenizer(
    location: str | pathlib.Path, ema: bool | None = None
) -> tuple[VQConfig, PyTree]:
    """(config, params) of the tokenizer in a run, its own or the one it builds on, or converted.

    ema: of a tokenizer's run, the averaged weights or not; None for them if there are any. Raises
    ValueError that names what is missing.
    """
    directory = pathlib.Path(location)
    config = read_config(directory)
    if "task" not in config:
        return read_part(directory, "tokenizer", VQConfig, VQConfig.init)
    task = config["task"]
    if task["_type"] == "VQTask":
        return config_tree.from_dict(VQConfig, task["model"]), restore_weights(directory, ema)
    if "tokenizer" not in task:
        raise InputError(f"{directory} is a run of {task['_type']}, which holds no tokenizer")
    params, _ = files.read_tensors(directory / "frozen.safetensors")
    return config_tree.from_dict(VQConfig, task["tokenizer"]), params


def load_tokenizer(location: str | pathlib.Path, expected: VQConfig) -> PyTree:
    """The parameters at `location`; ValueError with all differences if it is another model."""
    found, params = read_tokenizer(location)
    a, b = config_tree.to_dict(found), config_tree.to_dict(expected)
    if lines := [f"{name}: {a[name]} there, {b[name]} here" for name in a if a[name] != b[name]]:
        raise InputError(f"{location} holds another tokenizer:\n  " + "\n  ".join(lines))
    return params


def read_config(directory: pathlib.Path) -> dict:
    """The config.json of a run (it has a "task") or of a converted directory ("sources")."""
    path = directory / "config.json"
    if not path.is_file():
        raise InputError(
            f"{directory} {'holds no config.json' if directory.is_dir() else 'does not exist'}; "
            "give a run's directory, or one that python -m varjax.convert wrote"
        )
    config = files.read_json(path)
    if not isinstance(config, dict) or not config.keys() & {"task", "sources"}:
        raise InputError(f"{path} is neither of a training run nor of a converted directory")
    return config


def read_part(
    directory: pathlib.Path, name: str, cls: type[T], init: Callable[[T, jax.Array], PyTree]
) -> tuple[T, PyTree]:
    """(config, params) of one model of a converted directory, the params mapped, not yet read."""
    data = read_config(directory)
    if name not in data:
        others = ", ".join(sorted(data.keys() & {"tokenizer", "var", "lpips"}))
        raise InputError(f"{directory} holds only {others}; convert it again with --{name} as well")
    config = config_tree.from_dict(cls, data[name])
    params, _ = files.read_tensors(directory / f"{name}.safetensors")
    expected = jax.eval_shape(functools.partial(init, config), jax.random.key(0))
    if report := trees.difference(expected, params):
        raise InputError(f"{directory}/{name}.safetensors does not fit config.json:\n{report}")
    return config, params
