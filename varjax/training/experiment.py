"""The settings of a training run, and the check that a run directory holds one run only."""

import copy
import dataclasses
import hashlib
import json
import math
import pathlib
import socket
from collections.abc import Iterator, Mapping, Sequence, Sized
from typing import Any, Protocol

import jax
import numpy as np

from varjax.core import config_tree, files
from varjax.core.distributed import gather_json
from varjax.core.errors import InputError, check_setting
from varjax.training.sample_quality import FIDConfig
from varjax.training.sharding import MeshShape
from varjax.training.task import Plan, Task


class BatchLoader(Protocol):
    """Yields batches for this process: {"image_BHWC", "label_B"}, when held out also "valid_B".

    Instead of "image_BHWC" there may be latents, such as "tokens_BL".
    """

    @property
    def tokenizer_identity(self) -> Mapping[str, Any] | None:
        """The `Task.tokenizer_identity` of what made the latents; None for images."""
        ...

    @property
    def train_source(self) -> Sized:
        """The training images."""
        ...

    def train(self, position: int) -> Iterator[dict[str, np.ndarray]]:
        """Yields training batches without end, the first one for step number `position`."""
        ...

    def held_out(self) -> Iterator[dict[str, np.ndarray]]:
        """Yields batches over the held-out images, once."""
        ...

    def held_out_batch(self, number: int) -> dict[str, np.ndarray]:
        """Returns batch `number` of `held_out`."""
        ...


class DatasetConfig(Protocol):
    """Configures a dataset."""

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(H, W, channels) of its images."""
        ...

    @property
    def classes(self) -> int:
        """The number of classes; labels are below it."""
        ...

    def describe(self) -> dict[str, Any]:
        """Returns JSON data: "class_names", and what identifies the images of each split."""
        ...

    def make(self, batch_size: int, seed: int, rows: Sequence[int] | None = None) -> BatchLoader:
        """Makes the loader of its batches.

        Args:
            batch_size: rows of a batch, over all processes.
            seed: of shuffling and augmentation.
            rows: the numbers of this process's rows of each batch, rising; None for all.
        """
        ...


@dataclasses.dataclass(frozen=True)
class Experiment:
    """Configures a training run.

        loop.train(Experiment(task, data, "runs/first", batch_size=256, epochs=10))

    Counts named `*_every` are in steps, 0 means never; the run also evaluates and saves at its end.

    Attributes:
        task: what is trained, and how.
        data: what it is trained on.
        run_dir: the folder for all that the run writes.
        batch_size: images of a step, over all devices.
        steps: the length of the run in updates, or 0 where `epochs` gives it.
        epochs: the length in passes over the training images, or 0 where `steps` gives it.
        seed: of parameters, data order, augmentation and dropout.
        init_from: a run or a converted directory whose parameters this run starts with, as far as
            they fit (`warm_start_state`); "" for fresh ones. Not used once there is a checkpoint.
        mesh: how arrays and batches are spread over the devices.
        log_every: between two lines of training metrics.
        eval_every: between two evaluations on held-out images.
        save_every: between two checkpoints.
        preview_every: between two previews, pictures of what the model does.
        keep: how many of the last checkpoints stay.
        keep_best: an evaluation metric, say "eval/loss" or "eval_ema/loss"; the best weights by it
            are kept in <run_dir>/best. Lower is better but for accuracy, psnr, ssim, usage and
            perplexity (of codes); "max:NAME" or "min:NAME" says it for any metric. "" for none.
        patience: evaluations in a row without a better one that end the run; 0 for no such end.
        fid: FID and Inception Score of samples as the run goes.
    """

    task: Task
    data: DatasetConfig
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
    fid: FIDConfig = FIDConfig()

    def check(self) -> None:
        """Raises InputError for the first field that makes no sense."""
        if (self.steps > 0) == (self.epochs > 0) or min(self.steps, self.epochs) < 0:
            raise InputError(
                f"give the length as steps or as epochs, one of them above 0 and the other 0; "
                f"steps is {self.steps}, epochs {self.epochs}"
            )
        for name, lowest in MIN_VALUES.items():
            value = getattr(self, name)
            check_setting(name, value, value >= lowest, f"{lowest} or more")
        if not self.run_dir:
            raise InputError("run_dir is empty; name a directory for this run, say runs/first")
        if "://" in self.run_dir:
            raise InputError(f"run_dir is {self.run_dir}: an address; mount it and name the folder")
        if (self.keep_best or self.patience) and not self.eval_every:
            raise InputError("keep_best and patience need evaluations; set eval_every above 0")
        if self.patience and not self.keep_best:
            raise InputError(f"patience is {self.patience}, but keep_best names no metric")
        self.fid.check()
        if self.task.plan != Plan():
            raise InputError(
                f"task.plan is {self.task.plan}, but it follows from the rest; "
                "leave it alone and set steps, epochs and batch_size"
            )

    def plan(self, train_size: int) -> Plan:
        """Returns the length of the run with so many training images."""
        steps = self.steps or math.ceil(self.epochs * train_size / self.batch_size)
        return Plan(steps, self.batch_size)


MIN_VALUES = {
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
# (another mesh, accumulation or way to compute changes them by rounding; the tokenizer's weights
# were copied).
CHANGEABLE_FIELDS = (
    "run_dir",
    "mesh",
    "log_every",
    "eval_every",
    "save_every",
    "preview_every",
    "keep",
    "keep_best",
    "patience",
    "init_from",
    "fid",
    "data.reading",
    "data.root",  # images may move: data.json tells whether they are the same
    "data.name",
    "data.data_dir",
    "task.accumulate",
    "task.tokenizer_weights",
    "task.sampling",
    "task.compute",
    "task.dtype",
    "task.perceptual.weights",
)


def check_or_write_config(experiment: Experiment) -> None:
    """Writes <run_dir>/config.json, or checks that the run there has the same settings.

    Fields that the run does not know yet had their defaults in it.

    Raises InputError that lists every difference outside CHANGEABLE_FIELDS.
    """
    config: dict[str, Any] = config_tree.to_dict(experiment)
    config["task"].pop("plan", None)  # follows from the rest
    path = pathlib.Path(experiment.run_dir) / "config.json"
    if path.exists():
        before, now = files.read_json(path), copy.deepcopy(config)
        _drop_new_defaults(now, experiment, before)
        for name in CHANGEABLE_FIELDS:
            _drop(before, name)
            _drop(now, name)
        if lines := sorted(config_tree.differences(before, now)):
            raise InputError(
                f"{experiment.run_dir} holds a run with other settings:\n  "
                + "\n  ".join(lines)
                + "\ngive this run another run_dir, or go back to those settings to continue"
            )
    files.write_json(path, config)


def check_or_write_data(experiment: Experiment) -> None:
    """Writes <run_dir>/data.json: the names of the classes, and what identifies the images.

    Raises InputError where the run there was trained on other images, wherever they lie now; the
    held-out ones may change.
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


def check_same_data(experiment: Experiment, train_images: int) -> None:
    """Compares the data that processes see, for each may read a copy of its own.

    The order of the images and the length of the run follow from the data: with others, processes
    would put together batches that no single process sees, and not equally many.

    Args:
        experiment: the run.
        train_images: that this process sees.

    Raises:
        InputError: in all processes, where some see other data than the first; tells which, and in
            what they differ.
    """
    if jax.process_count() == 1:
        return
    described = experiment.data.describe()
    parts = described | {"train": described["train"] | {"images": train_images}}
    seen = {
        name: {
            "digest": hashlib.sha256(json.dumps(part, sort_keys=True).encode()).hexdigest(),
            "images": part.get("images") if isinstance(part, Mapping) else None,
        }
        for name, part in parts.items()
    }
    first, *others = gather_json({"host": socket.gethostname(), "seen": seen})
    lines = []
    for number, other in enumerate(others, 1):
        if words := _data_differences(first["seen"], other["seen"]):
            lines.append(f"process {number} on {other['host']}: {', '.join(words)}")
    if lines:
        raise InputError(
            f"processes see other data than process 0 on {first['host']}:\n  "
            + "\n  ".join(lines)
            + "\ngive all of them the same files"
        )


def _data_differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    words = []
    for name in dict.fromkeys((*first, *other)):
        a, b = first.get(name), other.get(name)
        if a and b and a["images"] != b["images"]:
            words.append(f"{name} has {b['images']} images instead of {a['images']}")
        elif a != b:
            words.append(f"{name} is another one")
    return words


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
