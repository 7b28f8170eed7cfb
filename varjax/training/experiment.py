"""All there is to say about a training run, and the promise that a run directory holds one run."""

import copy
import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping, Sized
from typing import Any, Protocol

import numpy as np

from varjax.core import config_tree, files
from varjax.core.errors import InputError
from varjax.training.sharding import MeshShape
from varjax.training.task import Plan, Task


class Loader(Protocol):
    """Batches for this process: {"image_BHWC", "label_B"}, when held out also "valid_B".

    Or {"tokens_BL", …}, and then `tokenized_by` is the `Task.tokenized_by` of what made them.
    """

    @property
    def tokenized_by(self) -> Mapping[str, Any] | None: ...

    @property
    def train_source(self) -> Sized: ...

    def train(self, position: int) -> Iterator[dict[str, np.ndarray]]: ...

    def held_out(self) -> Iterator[dict[str, np.ndarray]]: ...

    def held_out_batch(self, number: int) -> dict[str, np.ndarray]: ...


class Data(Protocol):
    """A dataset's settings."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def classes(self) -> int: ...

    def describe(self) -> dict[str, Any]:
        """JSON data: "class_names", and what identifies the images of "train" and "held_out"."""
        ...

    def make(self, batch_size: int, seed: int, rows: range | None = None) -> Loader:
        """Batches, of which this process gets `rows` (None: all)."""
        ...


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A training run. Its length is `steps`, or `epochs` passes over the training images.

    init_from: a run or a converted directory whose parameters this run starts with, as far as they
    fit (`initial_state`); "" for fresh ones. Not looked at once the run has a checkpoint.

    Counts named `*_every` are in steps, 0 means never; the run also evaluates and saves at its
    end. `keep_best` names an evaluation metric, lower is better ("eval/loss", "eval_ema/loss"):
    the best weights are kept in <run_dir>/best, and with `patience` > 0 the run ends when that
    many evaluations in a row brought nothing better.
    """

    task: Task
    data: Data
    run_dir: str
    batch_size: int
    steps: int = 0
    epochs: float = 0.0
    seed: int = 0
    init_from: str = ""
    mesh: MeshShape = MeshShape()
    log_every: int = 50
    eval_every: int = 0
    save_every: int = 1000
    preview_every: int = 0
    keep: int = 2
    keep_best: str = ""
    patience: int = 0

    def check(self) -> None:
        """Raises InputError for the first field that makes no sense."""
        if (self.steps > 0) == (self.epochs > 0) or min(self.steps, self.epochs) < 0:
            raise InputError(
                f"give the length as steps or as epochs, one of them above 0 and the other 0; "
                f"steps is {self.steps}, epochs {self.epochs}"
            )
        for name, lowest in LOWEST.items():
            if (value := getattr(self, name)) < lowest:
                raise InputError(f"{name} is {value}, but must be at least {lowest}")
        if not self.run_dir:
            raise InputError("run_dir is empty; name a directory for this run, say runs/first")
        if "://" in self.run_dir:
            raise InputError(f"run_dir is {self.run_dir}: an address; mount it and name the folder")
        if (self.keep_best or self.patience) and not self.eval_every:
            raise InputError("keep_best and patience need evaluations; set eval_every above 0")
        if self.patience and not self.keep_best:
            raise InputError(f"patience is {self.patience}, but keep_best names no metric")
        if self.task.plan != Plan():
            raise InputError(
                f"task.plan is {self.task.plan}, but it follows from the rest; "
                "leave it alone and set steps, epochs and batch_size"
            )

    def plan(self, train_size: int) -> Plan:
        """The length of the run with so many training images."""
        steps = self.steps or math.ceil(self.epochs * train_size / self.batch_size)
        return Plan(steps, self.batch_size)


LOWEST = {
    "batch_size": 1,
    "seed": 0,
    "log_every": 1,
    "eval_every": 0,
    "save_every": 0,
    "preview_every": 0,
    "keep": 1,
    "patience": 0,
}

# What may change when a run is continued, because training takes the same steps all the same
# (another mesh or way to compute changes them by rounding; the tokenizer's weights were copied).
FREE = ("run_dir", "mesh", "log_every", "eval_every", "save_every", "preview_every", "keep")
FREE += (
    "keep_best",
    "patience",
    "init_from",
    "data.reading",
    "data.root",  # images may move: record_data tells whether they are the same
    "data.name",
    "data.data_dir",
    "task.tokenizer_weights",
    "task.sampling",
    "task.compute",
    "task.dtype",
    "task.perceptual.weights",
)


def record_config(experiment: Experiment) -> None:
    """Writes <run_dir>/config.json, or checks that the run there has the same settings.

    Fields that the run does not know yet had their defaults in it. Raises InputError that lists
    every difference outside FREE.
    """
    config: dict[str, Any] = config_tree.to_dict(experiment)
    config["task"].pop("plan", None)  # follows from the rest
    path = pathlib.Path(experiment.run_dir) / "config.json"
    if path.exists():
        before, now = files.read_json(path), copy.deepcopy(config)
        _drop_new_defaults(now, experiment, before)
        for name in FREE:
            _drop(before, name)
            _drop(now, name)
        if lines := sorted(config_tree.differences(before, now)):
            raise InputError(
                f"{experiment.run_dir} holds a run with other settings:\n  "
                + "\n  ".join(lines)
                + "\ngive this run another run_dir, or go back to those settings to continue"
            )
    files.write_json(path, config)


def record_data(experiment: Experiment) -> None:
    """Writes <run_dir>/data.json: the names of the classes, and which images there are.

    Raises InputError where the run there was trained on other ones, wherever they lie now; those
    held out may change.
    """
    now, path = experiment.data.describe(), pathlib.Path(experiment.run_dir) / "data.json"
    if path.exists():
        before = files.read_json(path) | {"held_out": now["held_out"]}
        if lines := config_tree.differences(before, now):
            raise InputError(
                f"{experiment.run_dir} was trained on other images:\n  "
                + "\n  ".join(line if len(line) < 300 else line[:300] + " …" for line in lines)
                + "\ngive this run another run_dir, or bring back the images to continue"
            )
    files.write_json(path, now)


def _drop_new_defaults(now: dict[str, Any], fields_of: Any, before: dict[str, Any]) -> None:
    for field in dataclasses.fields(fields_of):
        name, value = field.name, getattr(fields_of, field.name)
        if name not in before and value == field.default:
            now.pop(name, None)
        elif dataclasses.is_dataclass(value) and isinstance(before.get(name), dict):
            _drop_new_defaults(now[name], value, before[name])


def _drop(config: dict[str, Any], path: str) -> None:
    *parents, last = path.split(".")
    for parent in parents:
        config = config.get(parent) or {}  # a part may be None
    config.pop(last, None)
