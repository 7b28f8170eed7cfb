"""Describes a picture, a set of samples, a run or a weights directory, and how it was made.

varjax info samples.png
varjax info samples.npz
varjax info runs/digits
varjax info runs/digits@500
varjax info weights/d16
varjax info exported/digits
"""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax

from varjax.analysis.run_log import read_run_log
from varjax.analysis.runs import EVAL_LOSSES, run_status
from varjax.checkpoints.saved_steps import SavedSteps
from varjax.checkpoints.weights import (
    BEST,
    WeightsDir,
    abstract_params,
    chosen_without_ema,
    find_checkpoint,
    find_weights,
    open_weights,
    split_step,
)
from varjax.convert.name_maps import RELEASES
from varjax.errors import InputError
from varjax.models import FAMILIES, family_of, tokenizer_kind
from varjax.runtime.commands import command_parser, run_command
from varjax.sampling.outputs import REQUEST, read_npz_request
from varjax.storage import files
from varjax.storage.npz import NpzArchive
from varjax.storage.picture_text import SETTINGS, read_picture_text
from varjax.storage.safetensors_io import read_safetensors
from varjax.storage.untrusted import printable

EXPORTED = "model.json"
EXPORTED_FACTS = (
    "model",
    "family",
    "license",
    "image_shape",
    "classes",
    "numbers",
    "fixed_options",
    "varjax",
    "jax",
)


def read_facts(location: str) -> dict[str, Any]:
    """Returns facts by name; the first one says what kind of thing it is.

    Args:
        location: picture, .npz or folder of samples, training run (also RUN@STEP and RUN@best),
            converted directory, exported model, or the name of a published model that this machine
            has.

    Raises:
        InputError: there is nothing, or something else.
    """
    run, step = split_step(location)
    path = find_weights(run)
    if not files.exists(path):
        if location in RELEASES:
            raise InputError(
                f"{location} is a published model that this machine does not have; varjax models "
                f"{location} describes it, and its first use downloads it"
            )
        raise InputError(f"{location} does not exist; varjax models lists the published models")
    if path.is_file():
        return _npz_facts(path) if path.suffix.lower() == ".npz" else _picture_facts(path)
    if step is not None or files.exists(path / "config.json"):
        weights = open_weights(location)
        return _converted_facts(weights) if weights.task is None else _run_facts(weights)
    if files.exists(path / EXPORTED):
        about = files.read_json(path / EXPORTED)
        facts = {"kind": "exported model, which runs without varjax"}
        return facts | {name: about.get(name) for name in EXPORTED_FACTS}
    request = files.read_json(path / REQUEST) if files.exists(path / REQUEST) else {}
    if "labels" in request:  # other commands write a file of this name, too
        images = len(list(path.glob("*.png")))
        return {"kind": f"folder of {images:,} samples"} | request
    raise InputError(
        f"{location} is a folder without config.json, and without a {REQUEST} of samples: neither "
        "a run, nor a converted directory, nor samples of varjax"
    )


def _picture_facts(path: pathlib.Path) -> dict[str, Any]:
    about, text = read_picture_text(path)
    facts: dict[str, Any] = {"kind": about}
    for name, value in text.items():
        if name == SETTINGS and isinstance(settings := _parsed(value), dict):
            facts |= settings
        else:
            facts[name.lower()] = value
    return facts if len(facts) > 1 else facts | {"made by": "unknown: it carries no text"}


def _npz_facts(path: pathlib.Path) -> dict[str, Any]:
    shape, _ = NpzArchive(path).header("arr_0")
    if len(shape) != 4:
        raise InputError(
            f"{path}: arr_0 has shape {shape}; images have (N, height, width, channels)"
        )
    facts = {"kind": f"{shape[0]:,} images of {'x'.join(map(str, shape[1:]))}"}
    try:
        return facts | read_npz_request(path)
    except InputError:
        return facts | {"made by": "unknown: it was not written by varjax sample"}


def _run_facts(weights: WeightsDir) -> dict[str, Any]:
    """Describes a training run by its config.json, data.json and metrics.jsonl."""
    status, config = run_status(weights.path), weights.config
    facts: dict[str, Any] = {"kind": f"training run of {weights.task}"}
    if weights.task in {family.task for family in FAMILIES}:
        model = weights.read_task_part("model", family_of(weights).config)
    else:
        model = weights.read_tokenizer_config(tokenizer_kind(weights).config)
    facts["parameters"] = f"{_parameters(abstract_params(model)):,}"
    facts["model"] = dataclasses.asdict(model)
    facts["tokenizer"] = config["task"].get("tokenizer_weights")
    facts["data"] = config.get("data")
    facts["state"] = f"{status.state} at step {status.step:,} of {status.steps or 0:,}"
    facts["error"] = status.error
    if weights.step is None:
        facts["checkpoints"] = _checkpoints(weights.path)
        losses = {"loss": status.loss, "held-out loss": status.eval_loss}
    else:
        saved, step = find_checkpoint(weights.path, weights.step)
        chosen_by = saved.meta(step).get("keep_best", "") if saved.directory.name == BEST else ""
        facts["checkpoint"] = f"step {step:,}" + f", the best by {chosen_by}" * bool(chosen_by)
        # The loss of the weights that load by default.
        held_out = EVAL_LOSSES[::-1] if chosen_without_ema(chosen_by) else EVAL_LOSSES
        log = read_run_log(weights.path)
        losses = {"loss": log.last("loss", step=step)}
        losses["held-out loss"] = log.last(*held_out, step=step)
    facts |= {name: f"{x:.4g}" for name, x in losses.items() if not math.isnan(x)}
    names = ("batch_size", "seed", "init_from", "fork_from", "keep_best")
    facts |= {name: config.get(name) for name in names}
    facts |= {name: config["task"].get(name) for name in ("optimizer", "sampling")}
    return facts


def _checkpoints(run_dir: pathlib.Path) -> str:
    """Lists the checkpoints of a run, "800, 1000, best 1000"; "" where they cannot be read."""
    try:
        kinds = {"": SavedSteps(run_dir / "checkpoints"), "best ": SavedSteps(run_dir / BEST)}
    except InputError:  # a bucket from which Orbax does not read
        return ""
    return ", ".join(f"{kind}{step}" for kind, saved in kinds.items() for step in saved.steps())


def _converted_facts(weights: WeightsDir) -> dict[str, Any]:
    """Describes a directory written by `varjax convert` or `varjax train-classifier`."""
    facts: dict[str, Any] = {"kind": "converted weights"}
    for path in sorted(weights.path.glob("*.safetensors")):
        facts[path.name] = f"{_parameters(read_safetensors(path)[0]):,} parameters"
    return facts | weights.config


def _parameters(params: Any) -> int:
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def facts_table(facts: dict[str, Any]) -> str:
    """Formats facts as lines of text; None, "" and {} are left out.

    Characters that a terminal would not print are escaped: a picture may carry any text.
    """
    shown = {name: _line(value) for name, value in facts.items() if value not in (None, "", {})}
    width = max(len(name) for name in shown) + 2
    return "\n".join(f"{printable(name):{width}}{line}" for name, line in shown.items())


def _line(value: Any) -> str:
    if isinstance(value, dict):
        inner = {
            name: f"({_line(x)})" if isinstance(x, dict) else _line(x) for name, x in value.items()
        }
        return ", ".join(f"{printable(str(name))}={text}" for name, text in inner.items())
    return printable(value if isinstance(value, str) else json.dumps(value))


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    parser = command_parser("varjax info", __doc__)
    about = "picture, samples, run (also RUN@STEP, RUN@best), converted weights, published model"
    parser.add_argument("location", metavar="THING", help=about)
    flags = parser.parse_args(arguments)
    return run_command("varjax info", lambda: print(facts_table(read_facts(flags.location))))
