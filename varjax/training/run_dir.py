"""The check that a run directory holds one run only, and that all processes see the same data."""

import dataclasses
import hashlib
import json
import socket
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from varjax.core import config_tree, files
from varjax.core.buckets import as_path
from varjax.core.distributed import gather_json
from varjax.core.errors import InputError
from varjax.training.experiment import Experiment
from varjax.training.task import Plan

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
    "keep_every",
    "keep_best",
    "patience",
    "init_from",
    "fork_from",
    "wandb",
    "stalled_minutes",
    "skip_nonfinite",
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


def check_or_write_config(experiment: Experiment, plan: Plan | None = None) -> None:
    """Writes <run_dir>/config.json, or checks that the run there has the same settings.

    Args:
        experiment: the settings.
        plan: the length that follows from them, which is written as well.

    Raises InputError as `check_config` does.
    """
    check_config(experiment)
    config = _settings(experiment)
    if plan is not None:
        config["plan"] = dataclasses.asdict(plan)
    files.write_json(as_path(experiment.run_dir) / "config.json", config)


def check_config(experiment: Experiment) -> None:
    """Checks that a run that is in `run_dir` already has the same settings; writes nothing.

    Fields that the run does not know yet had their defaults in it.

    Raises InputError that lists every difference outside CHANGEABLE_FIELDS.
    """
    path = as_path(experiment.run_dir) / "config.json"
    if not path.exists():
        return
    before, now = files.read_json(path), _settings(experiment)
    _drop_new_defaults(now, experiment, before)
    for name in ("plan", *CHANGEABLE_FIELDS):
        _drop(before, name)
        _drop(now, name)
    if lines := sorted(config_tree.differences(before, now)):
        raise InputError(
            f"{experiment.run_dir} holds a run with other settings:\n  "
            + "\n  ".join(lines)
            + "\ngive this run another run_dir (fork_from takes its state along), or go back to "
            "those settings to continue"
        )


def _settings(experiment: Experiment) -> dict[str, Any]:
    config: dict[str, Any] = config_tree.to_dict(experiment)
    config["task"].pop("plan", None)  # follows from the rest
    return config


def check_or_write_data(experiment: Experiment) -> None:
    """Writes <run_dir>/data.json: the names of the classes, and what identifies the images.

    Raises InputError where the run there was trained on other images, wherever they lie now, or in
    an order that this NumPy does not draw; the held-out ones may change.
    """
    now, path = experiment.data.describe(), as_path(experiment.run_dir) / "data.json"
    now["numpy"] = {"version": np.__version__, "random_numbers": random_numbers_digest()}
    if path.exists():
        before = files.read_json(path) | {"held_out": now["held_out"]}
        numpy = before.setdefault("numpy", now["numpy"])
        if numpy["random_numbers"] != now["numpy"]["random_numbers"]:
            raise InputError(
                f"{experiment.run_dir} was trained with NumPy {numpy['version']}, which draws "
                f"other random numbers than {np.__version__}: order and augmentation of its images "
                f"would change; pip install numpy=={numpy['version']} to continue, or fork_from it"
            )
        before["numpy"] = now["numpy"]
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
    parts = described | {
        "train": described["train"] | {"images": train_images},
        "NumPy's random numbers": random_numbers_digest(),
    }
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


def random_numbers_digest() -> str:
    """Returns a digest of what NumPy draws for one seed in all ways that order and augment images.

    NumPy promises equal numbers for as long as nobody finds a better way to draw them.
    """
    rng = np.random.default_rng((0, 1, 2))
    drawn = (
        rng.permutation(100),
        rng.integers(1 << 40, size=100),
        rng.integers(7, size=100),
        rng.random(100),
        rng.uniform(-1, 1, 100),
        rng.standard_normal(100),
    )
    return hashlib.sha256(b"".join(x.tobytes() for x in drawn)).hexdigest()[:16]


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
        inner = config.get(parent)
        config = inner if isinstance(inner, dict) else {}  # a part may be None
    config.pop(last, None)
