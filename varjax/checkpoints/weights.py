"""Reads weights and their configs from a training run or a converted directory.

Both have a config.json. That of a run contains the settings of its "task". That of a converted
directory contains a config for each NAME.safetensors, and the "sources" that they were made from.
"""

import dataclasses
import functools
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax

from varjax import trees
from varjax.checkpoints.saved_steps import SavedSteps
from varjax.config import config_tree
from varjax.errors import InputError, errors_naming
from varjax.storage import files, untrusted
from varjax.storage.buckets import as_path
from varjax.storage.cache_dir import cache_folder
from varjax.storage.untrusted import shown
from varjax.trees import PyTree

PARTS = {"model", "sampling", "tokenizer", "sources"}  # of a task or a converted directory
BEST = "best"  # instead of a step: the best one by the run's keep_best
RANDOM = "random"  # a location that stands for random weights


@dataclasses.dataclass(frozen=True)
class WeightsDir:
    """A training run or a converted directory, whose config.json was read and checked.

    Attributes:
        path: path of the directory.
        config: contents of its config.json.
        step: checkpoint to read, a step number or "best"; None for the run's choice.
    """

    path: pathlib.Path
    config: dict[str, Any]
    step: int | str | None = None

    @property
    def task(self) -> str | None:
        """Class name of the run's task; None for a converted directory."""
        return self.config["task"]["_type"] if "task" in self.config else None

    @property
    def trains_tokenizer(self) -> bool:
        """Whether this is the run of a tokenizer, not one that uses a tokenizer."""
        return "task" in self.config and "tokenizer" not in self.config["task"]

    def check_ema(self, ema: bool | None) -> None:
        """Raises InputError if `ema` chooses between weights of which there is one set."""
        if ema is not None and self.task is None:
            raise InputError(
                f"ema={ema}: {self.path} is not a training run and has one set of weights; omit it"
            )

    def read_task_part(self, part: str, config_class: type) -> Any:
        """Builds the config of a part of the run's task, such as its "model".

        Raises InputError if the task lacks the part, or its settings do not fit `config_class`.
        """
        if part not in self.config["task"]:
            raise InputError(f"task in {self.path / 'config.json'} has no {part}")
        return self._build(config_class, self.config["task"][part])

    def read_converted_config(self, name: str, config_class: type) -> Any:
        """Builds the config of one model of a converted directory; see `read_converted`."""
        settings, source = self._converted_settings(name), self.path / "config.json"
        untrusted.check_settings(settings, f"{name} in {source}")
        return self._build(config_class, settings)

    def read_converted(self, name: str, config_class: type) -> tuple[Any, PyTree]:
        """Reads one model of a converted directory.

        Args:
            name: name of the model's entry in config.json and of its file.
            config_class: a dataclass with a method `init(key) -> params`.

        Returns:
            (config, params); params are read-only views of the file.

        Raises:
            InputError: the directory lacks the model, or its parameters do not fit its config.
        """
        config = self.read_converted_config(name, config_class)
        params, _ = files.read_tensors(self.path / f"{name}.safetensors")
        if report := trees.difference(abstract_params(config), params):
            raise InputError(f"{self.path}/{name}.safetensors does not fit config.json:\n{report}")
        return config, params

    def read_options(self, options_class: type) -> Any:
        """Builds the sampling options of a converted directory; missing ones have defaults."""
        return self._build(options_class, self.config.get("sampling", {}))

    def restore(self, ema: bool | None = None) -> PyTree:
        """Reads the weights of the run; see `restore_weights`."""
        return restore_weights(self.path, ema, self.config, self.step)

    def tokenizer_settings(self) -> dict[str, Any]:
        """Returns the settings of the tokenizer, which is the model itself or belongs to it.

        Raises InputError if there is no tokenizer.
        """
        if self.task is None:
            return self._converted_settings("tokenizer")
        task = self.config["task"]
        if (settings := task.get("tokenizer", task.get("model"))) is None:
            raise InputError(f"{self.path} is a run of {self.task}, which has no tokenizer")
        return settings

    def read_tokenizer_config(self, config_class: type) -> Any:
        """Builds the tokenizer's config; raises InputError if it does not fit `config_class`."""
        if self.task is None:
            return self.read_converted_config("tokenizer", config_class)
        return self._build(config_class, self.tokenizer_settings())

    def read_tokenizer_params(self, ema: bool | None = None) -> PyTree:
        """Reads the tokenizer's parameters; raises InputError if there are none.

        Args:
            ema: True reads the EMA weights of a tokenizer's run, False the others; None chooses as
                `restore_weights` does.
        """
        self.tokenizer_settings()  # raises an error if there is no tokenizer
        if self.trains_tokenizer:
            return self.restore(ema)
        if self.step is not None:
            find_checkpoint(self.path, self.step)  # raises an error if there is none
        name = "tokenizer" if self.task is None else "frozen"
        return frozen_tokenizer(files.read_tensors(self.path / f"{name}.safetensors")[0])

    def read_tokenizer(self, config_class: type, ema: bool | None = None) -> tuple[Any, PyTree]:
        """Reads (config, params) of the tokenizer.

        Raises InputError if one is missing, or if `ema` is given and these are not the weights of a
        tokenizer's run.
        """
        if ema is not None and not self.trains_tokenizer:
            raise InputError(
                f"ema={ema}: the tokenizer of {self.path} has one set of weights; omit it"
            )
        if self.task is None:
            return self.read_converted("tokenizer", config_class)
        return self.read_tokenizer_config(config_class), self.read_tokenizer_params(ema)

    def _build(self, config_class: type, settings: dict[str, Any]) -> Any:
        with errors_naming(self.path / "config.json"):
            return config_tree.from_dict(config_class, settings)

    def _converted_settings(self, name: str) -> dict[str, Any]:
        if name in self.config:
            return self.config[name]
        stems = ", ".join(sorted(path.stem for path in self.path.glob("*.safetensors")))
        raise InputError(
            f"{self.path} has only {stems or 'no weights'}; convert it again with --{name} as well"
        )


def split_step(location: str | os.PathLike) -> tuple[str | os.PathLike, int | str | None]:
    """Splits RUN@STEP and RUN@best into the run and the checkpoint to read.

    Any other location, and a directory whose whole name exists, is returned with None.
    """
    run, _, step = os.fspath(location).rpartition("@")
    if not run or not (step == BEST or step.isdecimal()) or files.exists(as_path(location)):
        return location, None
    return run, step if step == BEST else int(step)


def find_weights(location: str | os.PathLike) -> pathlib.Path:
    """Returns `location`, or the published model of that name if the cache folder has it."""
    path = as_path(location)
    if files.exists(path) or len(path.parts) != 1:
        return path
    directory = cache_folder() / path
    return directory if files.exists(directory / "config.json") else path


def open_weights(location: str | os.PathLike) -> WeightsDir:
    """Reads and checks the config.json of a training run or a converted directory.

    Args:
        location: directory, or the name of a published model in the cache. RUN@STEP and RUN@best
            name a checkpoint of a run.

    Raises:
        InputError: `location` is neither.
    """
    location, step = split_step(location)
    directory = find_weights(location)
    path = directory / "config.json"
    if not directory.is_dir() and files.exists(directory):
        raise InputError(
            f"{directory} is a file; convert it first, with varjax convert, and name the directory "
            "that this writes"
        )
    if not files.exists(path):
        raise InputError(
            f"{directory} {'has no config.json' if directory.is_dir() else 'does not exist'}; "
            "give a run's directory (a run must be trained first), a directory that varjax "
            "convert wrote, or the name of a published model such as var_d16 (varjax models lists "
            "them)"
        )
    config = files.read_json(path)
    if not config.keys() & {"task", "sources"}:
        raise InputError(f"{path} belongs neither to a training run nor to a converted directory")
    if step is not None and "task" not in config:
        raise no_checkpoints(directory, step)
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
    return WeightsDir(directory, config, step)


def no_checkpoints(path: pathlib.Path, step: int | str) -> InputError:
    """Returns the error to raise for a checkpoint of weights that are no run."""
    return InputError(f"{path}@{step}: only a training run has checkpoints; leave @{step} out")


def restore_weights(
    run_dir: str | pathlib.Path,
    ema: bool | None = None,
    config: Mapping[str, Any] | None = None,
    step: int | str | None = None,
) -> PyTree:
    """Reads the weights of a run to the first device: the best by its `keep_best`, or the last.

    The run may be in progress.

    Args:
        run_dir: directory of the run.
        ema: True reads the EMA parameters, False the others. None reads the EMA if there
            is one, unless this is a best step, chosen by a metric of the parameters themselves
            ("eval/...").
        config: contents of the run's config.json; None reads it.
        step: number of the checkpoint to read, or "best" for the best one alone.

    Raises:
        InputError: the run has no such checkpoint or no average yet, or no step can be read.
        StorageError: the machine or network cannot read them now.
    """
    run_dir = as_path(run_dir)
    best, last = SavedSteps(run_dir / "best"), SavedSteps(run_dir / "checkpoints")

    def read_best(step: int) -> PyTree:
        # A step that an earlier setting of keep_best chose is not the best by the present setting.
        chosen_by = best.meta(step).get("keep_best", "")
        if chosen_by != (config or files.read_json(run_dir / "config.json")).get("keep_best"):
            return None
        return _chosen_params(best, step, ema)

    if isinstance(step, int):
        saved, step = find_checkpoint(run_dir, step)
        return _chosen_params(saved, step, ema)
    if (params := best.newest(read_best)) is None:
        if step == BEST:
            raise _no_best(run_dir)
        params = last.newest(lambda step: last.params(step, ema))
    if params is None:
        raise InputError(f"{run_dir} has no checkpoint yet; let it train until its first save")
    return params


def find_checkpoint(run_dir: pathlib.Path, step: int | str) -> tuple[SavedSteps, int]:
    """Finds where a run keeps a checkpoint, in best/ if it is there, and its step number.

    Args:
        run_dir: directory of the run.
        step: step number, or "best" for the newest one in the run's best/, which its present
            setting keep_best must have chosen.

    Raises:
        InputError: the run has no such checkpoint.
    """
    best, last = SavedSteps(run_dir / "best"), SavedSteps(run_dir / "checkpoints")
    if step == BEST:
        keep_best, numbers = files.read_json(run_dir / "config.json").get("keep_best"), best.steps()
        if not numbers or best.meta(numbers[-1]).get("keep_best") != keep_best:
            raise _no_best(run_dir)
        return best, numbers[-1]
    steps = {number: saved for saved in (last, best) for number in saved.steps()}
    if step not in steps:
        raise InputError(f"{run_dir}@{step}: the run has checkpoints of steps {sorted(steps)}")
    return steps[int(step)], int(step)


def _chosen_params(saved: SavedSteps, step: int, ema: bool | None) -> PyTree:
    """Reads a step's EMA weights, or the others if None is given and they were the best."""
    if ema is None and saved.directory.name == BEST:
        ema = False if chosen_without_ema(saved.meta(step).get("keep_best", "")) else None
    return saved.params(step, ema)


def chosen_without_ema(keep_best: str) -> bool:
    """Returns whether a setting keep_best names a metric of the weights without an EMA.

    It is written as "eval/loss" or "min:eval/loss"; the metrics of EMA weights are "eval_ema/…".
    """
    return keep_best.rpartition(":")[2].startswith("eval/")


def _no_best(run_dir: pathlib.Path) -> InputError:
    return InputError(
        f"{run_dir}@{BEST}: the run has kept no best checkpoint by the metric that its setting "
        "keep_best names"
    )


@functools.cache  # tracing a model takes seconds, and a tokenizer is read several times
def abstract_params(config: Any) -> PyTree:
    """Describes the parameters of a config with `init(key)`: jax.ShapeDtypeStruct, no arrays."""
    return jax.eval_shape(config.init, jax.random.key(0))


def read_fixed_params(path: pathlib.Path, init: Callable[[jax.Array], PyTree], name: str) -> PyTree:
    """Reads the parameters of a network that has only one size.

    Args:
        path: a .safetensors file.
        init: function of a key that draws such parameters; only their shapes are used.
        name: name of the network, for the message.

    Raises:
        InputError: the file is damaged or has other parameters.
    """
    params, _ = files.read_tensors(path)
    if report := trees.difference(jax.eval_shape(init, jax.random.key(0)), params):
        raise InputError(f"{path} is not {name}:\n{report}")
    return params


def read_generator(
    weights: WeightsDir,
    name: str,
    task: str,
    config_class: type,
    options_class: type,
    ema: bool | None = None,
) -> tuple[Any, PyTree, Any]:
    """Reads a model that samples, from a run or a converted directory.

    Args:
        weights: training run or converted directory.
        name: name of the model in a converted directory.
        task: class name of the task that trains such models.
        config_class: dataclass of the model's config, with a method `init(key) -> params`.
        options_class: dataclass of the model's sampling options.
        ema: True reads a run's EMA weights, False the others; None chooses as
            `restore_weights` does.

    Returns:
        (config, params, default sampling options).

    Raises:
        InputError: `weights` has no such model, or `ema` is given for a converted directory.
    """
    weights.check_ema(ema)
    if weights.task is None:
        model, params = weights.read_converted(name, config_class)
        return model, params, weights.read_options(options_class)
    if weights.task != task:
        raise InputError(
            f"{weights.path} is a run of {weights.task}, not of a transformer ({task})"
        )
    model = weights.read_task_part("model", config_class)
    options = weights.read_task_part("sampling", options_class)
    return model, weights.restore(ema), options


def frozen_tokenizer(frozen: PyTree) -> PyTree:
    """Returns the tokenizer's parameters among the frozen weights of a transformer's task.

    They are all of these weights, unless there is a group of this name: then there are others.
    """
    return frozen.get("tokenizer", frozen)


def open_for_setting(setting: str, location: str | os.PathLike) -> WeightsDir:
    """Opens the weights that a setting of a run names; an error also names the setting."""
    try:
        return open_weights(location)
    except InputError as error:
        raise type(error)(f"{setting}: {error}") from error


def read_frozen_tokenizer(location: str, tokenizer: Any) -> PyTree:
    """Reads the parameters of a tokenizer that stays frozen; draws random ones for "random".

    Prints a note if they come from an unfinished run.

    Args:
        location: run of a tokenizer, run that uses one, or converted directory.
        tokenizer: config of the tokenizer.

    Raises:
        InputError: there is no tokenizer, or its config differs; the message lists all differences.
    """
    if location == RANDOM:
        print("the tokenizer is RANDOM: use it to measure speed, not for images", file=sys.stderr)
        return jax.device_get(jax.jit(tokenizer.init)(jax.random.key(0)))
    weights = open_for_setting("task.tokenizer_weights", location)
    params = read_expected_tokenizer(weights, tokenizer)
    plan = weights.config.get("plan")  # of a run whose length is given in epochs, too
    steps = plan.get("steps") if isinstance(plan, dict) else weights.config.get("steps")
    steps = steps if weights.trains_tokenizer and type(steps) is int else 0
    saved = SavedSteps(weights.path / "checkpoints").steps() if steps else []
    if saved and saved[-1] < steps:
        print(
            f"note: {weights.path} is at step {saved[-1]} of {steps}; unless it has stopped early, "
            "let it finish before you train with its tokenizer",
            file=sys.stderr,
        )
    return params


def read_expected_tokenizer(weights: WeightsDir, expected: Any) -> PyTree:
    """Reads a tokenizer's parameters; raises InputError as `check_tokenizer` does."""
    check_tokenizer(weights, expected)
    return weights.read_tokenizer(type(expected))[1]


def check_tokenizer(weights: WeightsDir, expected: Any) -> None:
    """Checks the config of the tokenizer in a run or a converted directory.

    Raises InputError if there is none, or if its config is not `expected`; lists all differences.
    """
    needed, settings = config_tree.to_dict(expected), dict(weights.tokenizer_settings())
    if settings.keys() <= needed.keys() | {"_type"}:  # the same kind; missing fields have defaults
        settings = config_tree.to_dict(weights.read_tokenizer_config(type(expected)))
    if lines := untrusted.differences(settings, needed, "there", "expected"):
        raise InputError(f"{weights.path} has a different tokenizer:\n  " + "\n  ".join(lines))
