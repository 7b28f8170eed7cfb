"""Checks that a run directory holds one run, and that all processes see the same data."""

import dataclasses
import hashlib
import json
import pathlib
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from varjax.checkpoints.license import license_of
from varjax.checkpoints.saved_steps import SavedSteps
from varjax.checkpoints.weights import open_weights
from varjax.config import config_tree
from varjax.errors import InputError, StorageError
from varjax.runtime.distributed import gather_json
from varjax.runtime.messages import say
from varjax.runtime.reproducibility import jax_draws, random_numbers_digest, versions
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.storage.untrusted import differences
from varjax.training.experiment import Experiment
from varjax.training.run_writers import WANDB_ID_FILE
from varjax.training.task import Plan

PIXELS = "pixels"  # key in `describe`: a digest of how Pillow decodes and resizes images
MAX_STARTS = 100  # number of starts kept in data.json, in addition to the first
# Where a run comes from. Later starts do not use it, so they cannot change it.
ORIGIN = ("init_from", "init_tokenizer", "fork_from")
# What may change when a run continues, because training still takes the same steps. (Another mesh,
# accumulation or `compute` changes them by rounding; frozen weights were copied.)
CHANGEABLE_FIELDS = (
    "run_dir",
    "mesh",
    "log_every",
    "eval_every",
    "eval_images",
    "save_every",
    "preview_every",
    "keep",
    "keep_every",
    "keep_best",
    "patience",
    *ORIGIN,
    "wandb",
    "stalled_minutes",
    "skip_nonfinite",
    "fid",
    "data.reading",
    "data.root",  # images may move: data.json identifies them
    "data.name",
    "data.data_dir",
    "task.accumulate",
    "task.tokenizer_weights",
    "task.cca.reference",
    "task.sampling",
    "task.compute",
    "task.dtype",
    "task.perceptual.weights",
)


def changeable_fields(experiment: Experiment) -> list[str]:
    """Returns those of CHANGEABLE_FIELDS that may change in this run."""
    codebook = getattr(experiment.task, "codebook", None)
    # The entropy of codes is that of a microbatch, so there accumulation is part of the loss.
    fixed = ("task.accumulate",) if codebook is not None and codebook.entropy else ()
    return [name for name in CHANGEABLE_FIELDS if name not in fixed]


def is_bound(run_dir: pathlib.Path) -> bool:
    """Returns whether a run has a checkpoint; before its first one, all of its settings may change.

    Raises StorageError if the directory cannot be read now.
    """
    return bool(SavedSteps(run_dir / "checkpoints").steps())


def forget_start(experiment: Experiment) -> None:
    """Makes room for other settings and data in the directory of a run without a checkpoint.

    Removes the best weights and the description of the data of an earlier start; with other
    settings, and in a fork, whose source may have trained on since, also these settings and all
    that was made with them: the frozen weights, the metrics, curves and pictures, and the reference
    of FID.

    Raises InputError as `check_holds_run` does.
    """
    run_dir = as_path(experiment.run_dir)
    before = check_holds_run(run_dir)
    if before is None:
        return
    for name in ("best", "data.json"):
        files.remove(run_dir / name)
    if not before or experiment.fork_from or _config_differences(experiment, before, ()):
        # The settings last: after a kill in between, the next start removes the rest.
        outputs = "metrics.jsonl", "tensorboard", "previews", WANDB_ID_FILE, "fid_reference"
        for name in ("frozen.json", "frozen.safetensors", *outputs, "config.json"):
            files.remove(run_dir / name)


def check_holds_run(run_dir: pathlib.Path) -> dict[str, Any] | None:
    """Reads the settings of an earlier start; None without config.json, {} if it is damaged.

    Raises InputError if the directory's config.json is not that of a run, but of weights, say.
    """
    path = run_dir / "config.json"
    if not files.exists(path):
        return None
    try:
        before = files.read_json(path)
    except StorageError:
        raise
    except InputError:  # nothing of value is lost with a damaged file
        return {}
    if not (isinstance(before, dict) and {"task", "batch_size"} <= before.keys()):
        raise InputError(
            f"run_dir={run_dir}: holds no run, but something else with a config.json, such as "
            "converted weights; give the run another run_dir"
        )
    return before


def write_config(experiment: Experiment, plan: Plan | None = None) -> None:
    """Writes <run_dir>/config.json; a run that has one keeps its origin.

    Args:
        experiment: settings of the run, which `check_config` accepts.
        plan: length of the run in these settings, which is written as well.
    """
    path, config = as_path(experiment.run_dir) / "config.json", config_tree.to_dict(experiment)
    if files.exists(path):
        before = files.read_json(path)
        config |= {name: before[name] for name in (*ORIGIN, "license") if name in before}
    else:
        config |= _license_of_origin(experiment)
    if plan is not None:
        config["plan"] = dataclasses.asdict(plan)
    files.write_json(path, config)


def _license_of_origin(experiment: Experiment) -> dict[str, str]:
    """Returns the license of the weights that a run starts from, which may be gone later."""
    start = experiment.init_from or experiment.fork_from
    try:
        return license_of(open_weights(start)) if start else {}
    except InputError:  # reading the weights says what is wrong
        return {}


def check_config(experiment: Experiment) -> None:
    """Checks that an existing run in `run_dir` has the same settings; writes nothing.

    Fields that are newer than the run had their default values in it.

    Raises InputError that lists every difference outside `changeable_fields`.
    """
    path = as_path(experiment.run_dir) / "config.json"
    if not path.exists():
        return
    changeable = changeable_fields(experiment)
    if lines := _config_differences(experiment, files.read_json(path), changeable):
        raise InputError(
            f"{experiment.run_dir} holds a run with other settings:\n  "
            + "\n  ".join(lines)
            + "\nGo back to those settings to continue this run, or give the new one a run_dir. To "
            "take the state along:\n  --config.run_dir=NEW "
            f"--config.fork_from={experiment.run_dir}\n"
            f"These settings may change in this run: {', '.join(changeable)}"
        )


def _config_differences(
    experiment: Experiment, before: dict[str, Any], changeable: Sequence[str]
) -> list[str]:
    """Lists how an experiment's settings differ from those in a run's config.json."""
    now = config_tree.to_dict(experiment)
    _drop_new_defaults(now, experiment, before)
    for name in ("plan", "license", *changeable):
        _drop(before, name)
        _drop(now, name)
    return sorted(differences(before, now, "in the run", "in the config"))


def check_or_write_data(experiment: Experiment) -> None:
    """Writes <run_dir>/data.json: names of classes, what identifies the images, and versions.

    Raises InputError as `check_data` does.
    """
    files.write_json(as_path(experiment.run_dir) / "data.json", check_data(experiment))


def check_data(experiment: Experiment) -> dict[str, Any]:
    """Checks that the run was trained on these images; returns its data.json with this start.

    Prints a note if JAX draws different random numbers than in the run so far.

    Raises InputError if the run was trained on other images, or if this NumPy draws another order
    or this Pillow makes different pixels. The images may have moved, and the held-out images may
    change.
    """
    now, path = experiment.data.describe(), as_path(experiment.run_dir) / "data.json"
    now["numpy"] = {"version": np.__version__, "random_numbers": random_numbers_digest()}
    now["jax"] = jax_draws()
    start = {"time": time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime()), **versions()}
    starts = []
    if path.exists():
        before = files.read_json(path) | {"held_out": now["held_out"]}
        starts = before.pop("starts", [])
        last = starts[-1] if starts else {}
        numpy, pixels = before.get("numpy", now["numpy"]), now.get(PIXELS)
        if numpy["random_numbers"] != now["numpy"]["random_numbers"]:
            raise InputError(
                f"{experiment.run_dir} was trained with NumPy {numpy['version']}, which draws "
                f"different random numbers than {np.__version__}: order and augmentation of its "
                f"images would change; pip install numpy=={numpy['version']} to continue, or "
                "fork_from it"
            )
        if before.get(PIXELS, pixels) != pixels:
            known = last.get("pillow", "of another version")
            raise InputError(
                f"{experiment.run_dir} was trained with Pillow {known}, which decodes or resizes "
                f"images to different pixels than {start['pillow']}: its batches would change; "
                "install that version and build of Pillow to continue, or fork_from it"
            )
        _say_other_draws(experiment.run_dir, before.get("jax", now["jax"]), now["jax"])
        images_before, images_now = (
            {name: part for name, part in data.items() if name not in ("numpy", "jax", PIXELS)}
            for data in (before, now)
        )
        # Older versions did not write every entry.
        images_now = {name: part for name, part in images_now.items() if name in images_before}
        if lines := differences(images_before, images_now, "in the run", "in the config"):
            raise InputError(
                f"{experiment.run_dir} was trained on other images:\n  "
                + "\n  ".join(lines)
                + "\ngive this run another run_dir, or bring back the images to continue"
            )
    return now | {"starts": [*starts[:1], *starts[1:][-MAX_STARTS:], start]}


def _say_other_draws(run_dir: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Prints what has changed; batches stay the same, so the run may continue."""
    if before["random_numbers"] == now["random_numbers"]:
        return
    changes = [
        f"{name} {before[name]} before, {now[name]} now"
        for name in now
        if name != "random_numbers" and before.get(name) != now[name]
    ]
    say(
        f"{run_dir}: JAX draws different random numbers than in this run so far ("
        + (", ".join(changes) or "with the same version and flags")
        + "). Its images stay the same, but dropout, masks and noise do not, so the result is not "
        "that of a run without this change; go back to the former version and flags to avoid it"
    )


def check_same_data(experiment: Experiment, train_images: int) -> None:
    """Compares the data that processes see, because each may read its own copy.

    The order of the images and the length of the run follow from the data. With different data,
    processes would combine batches that do not belong together, and not the same number of them.

    Args:
        experiment: settings of the run.
        train_images: number of training images that this process sees.

    Raises:
        InputError: in all processes, if some see different data than the first; names them and the
            differences.
    """
    if jax.process_count() == 1:
        return
    described = experiment.data.describe()
    parts = described | {
        "train": described["train"] | {"images": train_images},
        "NumPy's random numbers": random_numbers_digest(),
        "JAX's random numbers": jax_draws()["random_numbers"],
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
            f"processes see different data than process 0 on {first['host']}:\n  "
            + "\n  ".join(lines)
            + "\ngive all of them the same files"
        )


def _data_differences(first: dict[str, Any], other: dict[str, Any]) -> list[str]:
    words = []
    for name in dict.fromkeys((*first, *other)):
        a, b = first.get(name), other.get(name)
        if a and b and a["images"] != b["images"]:
            words.append(f"{name} has {b['images']} images instead of {a['images']}")
        elif a != b and name == PIXELS:
            words.append("its Pillow decodes or resizes images to different pixels")
        elif a != b:
            words.append(f"{name} differs")
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
        config = inner if isinstance(inner, dict) else {}  # the config of a part may be None
    config.pop(last, None)
