"""Reads models of any kind from a training run or a converted directory.

Both have a config.json. A run's holds the settings of its "task"; a converted directory's holds a
config for each NAME.safetensors beside it, and the "sources" that they were made from.
"""

import functools
import importlib
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from varjax import trees
from varjax.checkpoints.saved_steps import restore_weights
from varjax.config import config_tree
from varjax.errors import InputError
from varjax.storage import files, untrusted
from varjax.storage.buckets import as_path
from varjax.storage.untrusted import shown
from varjax.trees import PyTree

PARTS = {"model", "sampling", "tokenizer", "sources"}  # of a task, or of a converted directory


def find_model(location: str | pathlib.Path) -> pathlib.Path:
    """Finds the directory of a model: `location` if it exists, else the published model called so.

    That one is downloaded and converted at its first use; see `varjax.convert.pretrained`.

    Raises:
        InputError: it could not be; says what to do by hand.
    """
    path = as_path(location)
    if files.exists(path) or len(path.parts) != 1:
        return path
    # By name, for convert stands above everything that reads models, and few of them need it.
    return importlib.import_module("varjax.convert.pretrained").resolve_weights(path)


@functools.cache  # tracing a model takes seconds, and a tokenizer is read as often as its users
def abstract_params(config: Any) -> PyTree:
    """Describes the parameters of a config with `init(key)`: jax.ShapeDtypeStruct, no arrays."""
    return jax.eval_shape(config.init, jax.random.key(0))


def read_model_config(location: str | pathlib.Path) -> dict[str, Any]:
    """Reads the config.json of a run (it has a "task") or of a converted directory ("sources").

    Raises InputError where `location` is neither.
    """
    directory = as_path(location)
    path = directory / "config.json"
    if not files.exists(path):
        raise InputError(
            f"{directory} {'holds no config.json' if directory.is_dir() else 'does not exist'}; "
            "give a run's directory, one that varjax convert wrote, or the name of a "
            "published model such as var_d16"
        )
    config = files.read_json(path)
    if not config.keys() & {"task", "sources"}:
        raise InputError(f"{path} is neither of a training run nor of a converted directory")
    if "task" in config:
        task = config["task"]
        if not isinstance(task, dict) or not isinstance(task.get("_type"), str):
            raise InputError(f"task in {path} is {shown(task)}, not the settings of a task")
        if type(config.get("steps")) not in (int, type(None)):
            raise InputError(f"steps in {path} is {shown(config['steps'])}, not a number of steps")
    parts = config.get("task", config)
    for name in PARTS & parts.keys():
        if not isinstance(parts[name], dict):
            raise InputError(f"{name} in {path} is {shown(parts[name])}, not a group of settings")
    return config


def read_task_part(
    config: dict[str, Any], part: str, config_class: type, path: pathlib.Path
) -> Any:
    """Builds a part of the task in a run's config, say its "model".

    Args:
        config: config of the run, read by `read_model_config`.
        part: name of the part to read.
        config_class: dataclass of the part's config.
        path: path of the run, for the message.

    Raises:
        InputError: the task has no such part, or one of other settings.
    """
    if part not in config["task"]:
        raise InputError(f"task in {path / 'config.json'} has no {part}")
    return config_tree.from_dict(config_class, config["task"][part])


def read_fixed_params(path: pathlib.Path, init: Callable[[jax.Array], PyTree], name: str) -> PyTree:
    """Reads the parameters of a network that has one size only.

    Args:
        path: a .safetensors file.
        init: function of a key that draws such parameters; only their shapes are used.
        name: name of the network, for the message.

    Raises:
        InputError: the file is damaged, or holds parameters of something else.
    """
    params, _ = files.read_tensors(path)
    if report := trees.difference(jax.eval_shape(init, jax.random.key(0)), params):
        raise InputError(f"{path} is not {name}:\n{report}")
    return params


def read_converted_config(directory: pathlib.Path, name: str, config_class: type) -> Any:
    """Reads the config of one model of a converted directory; else as `read_converted`."""
    data = read_model_config(directory)
    if name not in data:
        there = ", ".join(sorted(path.stem for path in directory.glob("*.safetensors")))
        raise InputError(
            f"{directory} holds only {there or 'no weights'}; "
            f"convert it again with --{name} as well"
        )
    untrusted.check_settings(data[name], f"{name} in {directory / 'config.json'}")
    return config_tree.from_dict(config_class, data[name])


def read_converted(directory: pathlib.Path, name: str, config_class: type) -> tuple[Any, PyTree]:
    """Reads one model of a converted directory.

    Args:
        directory: converted directory to read.
        name: name of the model's entry in config.json and of its file.
        config_class: a dataclass with a method `init(key) -> params`.

    Returns:
        (config, params), the latter read-only views of the file.

    Raises:
        InputError: the directory lacks the model, or the parameters do not fit the config.
    """
    config = read_converted_config(directory, name, config_class)
    params, _ = files.read_tensors(directory / f"{name}.safetensors")
    if report := trees.difference(abstract_params(config), params):
        raise InputError(f"{directory}/{name}.safetensors does not fit config.json:\n{report}")
    return config, params


def read_generator(
    location: str | pathlib.Path,
    name: str,
    task: str,
    config_class: type,
    options_class: type,
    ema: bool | None = None,
) -> tuple[Any, PyTree, Any]:
    """Reads a model that samples: what a run has learned, or one of a converted directory.

    Args:
        location: training run, converted directory, or name of a published model.
        name: name of the model in a converted directory.
        task: class name of the task that trains such models.
        config_class: dataclass of the model's config, with a method `init(key) -> params`.
        options_class: dataclass of the model's sampling options.
        ema: True reads a run's averaged weights, False the others; None reads the averaged weights
            if there are any.

    Returns:
        (config, params, the recommended options).

    Raises:
        InputError: says what `location` lacks.
    """
    directory = find_model(location)
    config = read_model_config(directory)
    if "task" not in config:
        model, params = read_converted(directory, name, config_class)
        return model, params, config_tree.from_dict(options_class, config.get("sampling", {}))
    settings = config["task"]
    if settings["_type"] != task:
        raise InputError(
            f"{directory} is a run of {settings['_type']}, not of a transformer ({task})"
        )
    model = read_task_part(config, "model", config_class, directory)
    options = read_task_part(config, "sampling", options_class, directory)
    return model, restore_weights(directory, ema), options
