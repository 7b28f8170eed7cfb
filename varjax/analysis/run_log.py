"""Reads the logs of runs, and has a published log to compare with."""

import dataclasses
import math
import pathlib
import re
import sys
from typing import Any

import numpy as np

from varjax.errors import InputError
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.storage.read_errors import retry_read
from varjax.storage.untrusted import parse_metrics_line, shown

IMAGENET_IMAGES = 1_281_167.0  # in an epoch
D16_EPOCHS = [1, 5, 10, 50, 100, 200]
MAR_EPOCHS = [150, 200, 250, 300]


@dataclasses.dataclass(frozen=True)
class PublishedLog:
    """Holds what others have published of their runs.

    Attributes:
        name: label in the legend.
        task: class name of the task that they trained, as varjax calls it.
        points: images seen and values, both (N,), of each metric.
    """

    name: str
    task: str
    points: dict[str, tuple[np.ndarray, np.ndarray]]


def _by_epoch(epochs: list[int], values: list[float]) -> tuple[np.ndarray, np.ndarray]:
    return np.array(epochs) * IMAGENET_IMAGES, np.array(values)


PUBLISHED_LOGS = {
    "d16": PublishedLog(
        "VAR-d16, public log (training)",
        "VARTask",
        {
            "loss": _by_epoch(D16_EPOCHS, [8.031, 6.950, 6.541, 6.252, 6.164, 6.046]),
            "loss_at_scale/9": _by_epoch(D16_EPOCHS, [8.020, 6.660, 5.960, 5.584, 5.479, 5.345]),
        },
    ),
    # github.com/LTH14/mar: issue 20 has the loss, which stays where it is, and issue 98 the FID.
    "mar": PublishedLog(
        "MAR, reported by users (loss about 0.25; FID of raw weights)",
        "MARTask",
        {
            "loss": _by_epoch(MAR_EPOCHS, [0.25, 0.25, 0.25, 0.25]),
            "fid": _by_epoch(MAR_EPOCHS, [6.02, 6.70, 5.03, 6.32]),
        },
    ),
}


@dataclasses.dataclass(frozen=True)
class RunLog:
    """Holds what a run has logged so far.

        images_N, loss_N = read_run_log("runs/digits").points("eval/loss")

    Attributes:
        name: the run's directory.
        batch_size: images in a step.
        lines: lines of metrics.jsonl, each with its "step".
        steps: length of the run in updates; None if it is not known.
        config: settings in config.json.
    """

    name: str
    batch_size: int
    lines: list[dict[str, Any]]
    steps: int | None
    config: dict[str, Any]

    def points(self, metric: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns images seen and values, both (N,), of the lines where `metric` is a number."""
        pairs = [(line["step"], line[metric]) for line in self.lines if metric in line]
        pairs = np.array([pair for pair in pairs if None not in pair], float).reshape(-1, 2)
        return pairs[:, 0] * self.batch_size, pairs[:, 1]

    def last(self, *metrics: str, step: float = math.inf) -> float:
        """Returns the newest value of a metric, up to a step; NaN if there is none.

        Args:
            metrics: metrics; of those in one line, the first one counts.
            step: last step that counts.
        """
        lines = (line for line in reversed(self.lines) if line["step"] <= step)
        values = (line[name] for line in lines for name in metrics if line.get(name) is not None)
        return next(values, math.nan)

    def setting(self, *path: str) -> Any:
        """Returns a setting of `config`, which may hold anything; None if there is none."""
        value: Any = self.config
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value

    def scales(self, metric: str) -> int:
        """Counts the scales for which `metric` was logged."""
        pattern = re.compile(rf"(?:eval(?:_ema)?/)?{re.escape(metric)}/(\d+)$")
        matches = (pattern.match(name) for line in self.lines for name in line)
        return max((int(match[1]) + 1 for match in matches if match), default=0)


def read_run_log(directory: str | pathlib.Path) -> RunLog:
    """Reads the log of a run, without a last line that is only half written.

    Other lines that contain no metrics are skipped, and counted on stderr. Raises InputError if the
    directory is not a run.
    """
    path = as_path(directory)
    if not path.is_dir():
        fault = "is a file" if path.exists() else "does not exist"
        raise InputError(f"{directory} {fault}; give directories of runs")
    if not (path / "config.json").is_file():
        raise InputError(f"{directory} is not a run: it has no config.json")
    config = files.read_json(path / "config.json")
    if type(batch_size := config.get("batch_size")) is not int:
        raise InputError(f"{directory} is not a training run: its config.json has no batch_size")
    plan = config["plan"] if isinstance(config.get("plan"), dict) else {}
    steps = plan.get("steps") or config.get("steps") or None
    if type(steps) not in (int, type(None)):
        raise InputError(f"{path / 'config.json'}: steps is {shown(steps)}, not a number")
    return RunLog(str(directory), batch_size, _read_lines(path / "metrics.jsonl"), steps, config)


def _read_lines(path: pathlib.Path) -> list[dict[str, Any]]:
    text = retry_read(path.read_bytes, path) if path.is_file() else b""
    *whole, last = text.split(b"\n")
    lines = [parse_metrics_line(line) for line in whole]
    if bad := [i for i, line in enumerate(lines, 1) if line is None]:
        print(
            f"note: {path}: {len(bad)} of {len(lines)} lines contain no metrics and are skipped; "
            f"the first is line {bad[0]}",
            file=sys.stderr,
        )
    return [line for line in (*lines, parse_metrics_line(last)) if line]
