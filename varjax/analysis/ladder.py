"""Reads a ladder: runs that differ in size, whose losses on held-out images can be compared."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from varjax.analysis.power_law import Points, log_widths, pareto_front
from varjax.analysis.run_log import RunLog, read_run_log
from varjax.data.stream import LOCATION_FIELDS
from varjax.errors import InputError
from varjax.storage import files
from varjax.storage.buckets import as_path, real_path
from varjax.storage.untrusted import shown

LOSSES = {  # name: (metric of an evaluation, whether the loss is 1 - metric, title)
    "loss": ("loss", False, "loss, all tokens"),
    "loss_last": ("loss_last", False, "loss, last scale"),
    "error": ("accuracy", True, "token error, all tokens"),
    "error_last": ("accuracy_last", True, "token error, last scale"),
}
PREFIXES = ("eval_ema", "eval")  # the first one that all runs have
# Settings of a task that decide what its loss measures: MAR's masks, order and tokens, and the
# weights in a tokenizer's sum.
LOSS_FIELDS = (
    "min_mask_ratio",
    "model.order",
    "model.causal",
    "model.head._type",
    "model.head.patch",
    "l1",
    "l2",
    "beta",
    "kl",
    "perceptual.weight",
)
MAX_DEPTH_OR_WIDTH = 2**20
WARMUP_FRACTION = 0.1  # beginning of a run that the joint fit leaves out


@dataclasses.dataclass(frozen=True)
class Curve:
    """Holds the P evaluations of a run for one kind of loss, in the order of training.

    Attributes:
        run: directory of the run.
        size: number of parameters, `model_size`.
        images_P: images seen before each evaluation.
        petaflop_P: petaFLOP of the training steps before each; NaN if the run did not log them.
        loss_P: losses on held-out images.
    """

    run: str
    size: float
    images_P: np.ndarray
    petaflop_P: np.ndarray
    loss_P: np.ndarray

    def take(self, index_P: np.ndarray) -> "Curve":
        """Keeps some evaluations, in the order of their indices."""
        arrays = (self.images_P, self.petaflop_P, self.loss_P)
        return Curve(self.run, self.size, *(array[index_P] for array in arrays))


@dataclasses.dataclass(frozen=True)
class Ladder:
    """Holds the evaluations of runs of different sizes, from the smallest on.

    Attributes:
        curves: curves of each run, by the names of LOSSES that all runs have logged.
        prefix: "eval_ema" for EMA weights, otherwise "eval".
        notes: caveats about fits of these runs, one per line.
        smallest: log of the smallest run.
    """

    curves: dict[str, list[Curve]]
    prefix: str
    notes: list[str]
    smallest: RunLog

    @property
    def runs(self) -> list[Curve]:
        """Curves of the first kind of loss, one for each run."""
        return next(iter(self.curves.values()))

    @property
    def has_compute(self) -> bool:
        """Returns whether all runs logged the FLOP of their steps."""
        return all(np.isfinite(curve.petaflop_P).all() for curve in self.runs)


def read_ladder(directories: Sequence[str], weights: str = "") -> Ladder:
    """Reads the logs of runs that differ in size only.

    Args:
        directories: runs, each with a config.json and a metrics.jsonl.
        weights: "eval" or "eval_ema", whose evaluations to read; "" for the EMA weights
            (eval_ema) if all runs have them.

    Raises:
        InputError: a directory is not a run or is given twice, a run was not evaluated, has no
            known size, or has losses that measure something else than the first's.
    """
    # "a", "a/" and a link to it are one run.
    paths = [real_path(name) for name in directories]
    for name, path in zip(directories, paths, strict=True):
        if paths.count(path) > 1:
            raise InputError(f"{name} is given more than once; give each run once")
    logs = [read_run_log(directory) for directory in directories]
    for log in logs[1:]:
        _check_comparable(logs[0], log)
    known = [p for p in PREFIXES if all(log.points(f"{p}/loss")[0].size for log in logs)]
    prefix = weights or next(iter(known), PREFIXES[-1])
    for log in logs:
        if not log.points(f"{prefix}/loss")[0].size:
            others = [p for p in PREFIXES if p != prefix and log.points(f"{p}/loss")[0].size]
            advice = "set eval_every when training"
            if others:
                advice = f"it has {others[0]}/loss, so use --weights={others[0]}"
            raise InputError(
                f"{log.name} has no {prefix}/loss in its metrics.jsonl; {advice}, or leave this "
                "run out"
            )
    logs.sort(key=model_size)
    curves = {}
    for name, (metric, inverted, _) in LOSSES.items():
        if all(log.points(f"{prefix}/{metric}")[0].size for log in logs):
            curves[name] = [_curve(log, f"{prefix}/{metric}", inverted) for log in logs]
    ladder = Ladder(curves, prefix, list(_notes(logs)), logs[0])
    if not ladder.has_compute:
        ladder.notes.append("some runs log no step_tflop, so there is no fit against compute")
    return ladder


def model_size(log: RunLog) -> float:
    """Returns N, a run's number of parameters as the VAR paper counts them where it can.

    The paper's N is 73,728 d³ for depth d and width 64 d: 18 C² in each layer of width C, of which
    attention has 4, the MLP 8 and AdaLN 6. Embeddings and the head do not count. With one AdaLN for
    all layers, 6 C² count once. For other models, N is the logged number of trained parameters.

    Raises InputError if neither is known.
    """
    if log.setting("task", "_type") == "VARTask":
        model = functools.partial(log.setting, "task", "model")
        depth, width = (_whole_number(model(name)) for name in ("depth", "width"))
        if depth and width:
            adaln_layers = 1 if model("shared_adaln") is True else depth
            return float((12 * depth + 6 * adaln_layers) * width**2)
    logged = log.points("parameters")[1]
    if not (logged.size and 0 < logged[-1] < np.inf):
        raise InputError(
            f"{log.name}: its number of parameters is not known. config.json has no VARTask with "
            'depth and width, and metrics.jsonl no "parameters" above 0; add a line such as '
            '{"step": 0, "parameters": 1000000}'
        )
    return float(logged[-1])


def _whole_number(value: Any) -> int:
    """Returns a depth or width; 0 for anything else, because a file can hold anything."""
    return value if type(value) is int and 0 < value < MAX_DEPTH_OR_WIDTH else 0


def _curve(log: RunLog, metric: str, inverted: bool) -> Curve:
    images_P, value_P = log.points(metric)
    _, step_tflop = log.points("step_tflop")
    known = step_tflop.size and 0 < step_tflop[-1] < np.inf
    image_petaflop = step_tflop[-1] / 1e3 / log.batch_size if known else math.nan
    loss_P = 1 - value_P if inverted else value_P
    order = np.argsort(images_P, kind="stable")
    order = order[(0 < loss_P[order]) & (loss_P[order] < np.inf) & (images_P[order] > 0)]
    if not order.size:
        raise InputError(f"{log.name}: no {metric} after step 0 gives a loss above 0")
    curve = Curve(log.name, model_size(log), images_P, images_P * image_petaflop, loss_P)
    return curve.take(order)


def _check_comparable(first: RunLog, log: RunLog) -> None:
    a, b = _setting_of_losses(first), _setting_of_losses(log)
    lines = [
        f"{name}: {shown(a.get(name))} in {first.name}, {shown(b.get(name))} in {log.name}"
        for name in dict.fromkeys((*a, *b))
        if a.get(name) != b.get(name)
    ]
    if lines:
        raise InputError(
            "losses of these runs cannot be compared, because they measure different things:\n  "
            + "\n  ".join(lines)
            + "\ngive runs that differ in size only"
        )


def _setting_of_losses(log: RunLog) -> dict[str, Any]:
    """Returns what must agree between runs: images, tokenizer, and what the loss measures."""
    run = as_path(log.name)
    settings = {"task": log.setting("task", "_type"), "data": log.setting("data", "_type")}
    settings["eval_images"] = log.setting("eval_images") or None
    settings |= _flat(log.setting("task", "tokenizer"), "task.tokenizer")
    for name in LOSS_FIELDS:
        settings |= _flat(log.setting("task", *name.split(".")), f"task.{name}")
    if isinstance(data := log.setting("data"), dict):
        settings |= _flat({k: v for k, v in data.items() if k not in LOCATION_FIELDS}, "data")
    # What the run itself found out says more than the settings, but other programs' runs lack it.
    if (run / "data.json").is_file():
        images = files.read_json(run / "data.json")
        settings |= _flat({name: images.get(name) for name in ("train", "held_out")}, "images")
        settings |= _flat(images.get("settings"), "images of latents")
    if (run / "frozen.json").is_file():
        settings["tokenizer's weights"] = files.read_json(run / "frozen.json").get("digest")
    return settings


def _flat(settings: Any, path: str) -> dict[str, Any]:
    if not isinstance(settings, dict):
        return {} if settings is None else {path: settings}
    return {k: v for name in settings for k, v in _flat(settings[name], f"{path}.{name}").items()}


def _notes(logs: Sequence[RunLog]) -> Iterator[str]:
    for log in logs:
        step = max(line["step"] for line in log.lines)
        if log.steps is not None and step < log.steps:
            yield f"{log.name} ended at step {step:,} of {log.steps:,} and is used as it is"
    has_tokenizer = logs[0].setting("task", "tokenizer") is not None
    if has_tokenizer and logs[0].setting("data", "_type") not in (None, "CachedLatents"):
        yield (
            "the runs encode their images, so compute includes the tokenizer's encoder; with "
            "cached latents it is that of the model alone"
        )


def final_points(curves: Sequence[Curve]) -> Points:
    """Returns the last loss of each run against its size."""
    sizes = np.array([[curve.size for curve in curves]])
    return Points(sizes, np.array([curve.loss_P[-1] for curve in curves]), np.ones(len(curves)))


def front_points(curves: Sequence[Curve]) -> Points:
    """Returns the lowest loss against compute, over the evaluations of all runs.

    Of the smallest size, only the last point counts: before it, still smaller models would have
    been better, so the points lie above the front of all sizes.
    """
    petaflop_P = np.concatenate([curve.petaflop_P for curve in curves])
    loss_P = np.concatenate([curve.loss_P for curve in curves])
    size_P = np.concatenate([np.full(len(curve.loss_P), curve.size) for curve in curves])
    front = pareto_front(petaflop_P, loss_P)
    larger = np.flatnonzero(size_P[front] > size_P.min())
    front = front[max((larger[0] if larger.size else len(front)) - 1, 0) :]
    return Points(petaflop_P[None, front], loss_P[front], log_widths(petaflop_P[front]))


def curve_points(curves: Sequence[Curve]) -> Points:
    """Returns all losses after the first tenth of each run against size and images seen."""
    parts = []
    for curve in curves:
        kept = curve.take(np.flatnonzero(curve.images_P > WARMUP_FRACTION * curve.images_P[-1]))
        count = len(kept.loss_P)
        x_2P = np.stack([np.full(count, kept.size), kept.images_P])
        # Each run counts once, however often it was evaluated.
        parts.append(Points(x_2P, kept.loss_P, np.full(count, 1 / count)))
    return Points(
        np.concatenate([part.x_TP for part in parts], axis=1),
        np.concatenate([part.loss_P for part in parts]),
        np.concatenate([part.weight_P for part in parts]),
    )


def resampled_curves(
    curves: Sequence[Curve], resamples: int, seed: int, evaluations: bool = False
) -> Iterator[list[Curve]]:
    """Yields bootstrap resamples: runs drawn with replacement.

    Args:
        curves: curves of all runs.
        resamples: number of resamples.
        seed: seed of the draws.
        evaluations: whether the evaluations of each drawn run are drawn with replacement, too.
    """
    for number in range(resamples):
        rng = np.random.default_rng([seed, number])
        drawn = [curves[i] for i in rng.integers(len(curves), size=len(curves))]
        if evaluations:
            counts = [len(curve.loss_P) for curve in drawn]
            indices = [np.sort(rng.integers(count, size=count)) for count in counts]
            drawn = [curve.take(index) for curve, index in zip(drawn, indices, strict=True)]
        yield drawn
