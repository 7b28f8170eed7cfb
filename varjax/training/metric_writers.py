"""Writers of a run's numbers and pictures: metrics.jsonl, TensorBoard, and the terminal."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tqdm import tqdm

from varjax.core import files, image_io
from varjax.core.errors import StorageError

PLAIN_LINE_SECONDS = 10.0  # between two lines where nobody watches a bar


def flatten_metrics(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Turns metrics into plain floats by name; a 1-D array becomes name/0, name/1, ..."""
    flat = {}
    for name, value in metrics.items():
        array = np.asarray(value)
        assert array.ndim <= 1, (name, array.shape)
        if array.ndim == 0:
            flat[name] = float(array)
        else:
            flat |= {f"{name}/{i}": float(number) for i, number in enumerate(array)}
    return flat


class MetricWriter:
    """Writes to metrics.jsonl (one object a line, with "step") and to TensorBoard files.

        with MetricWriter(run_dir, step=0) as writer:
            writer.write(50, {"loss": 1.5})

    Args:
        run_dir: the folder of both.
        step: the one that the run continues after; lines about later ones are dropped.
        evaluated: whether that step's evaluation is done; else its lines are dropped too.
        active: False for a process that writes nothing at all.
    """

    def __init__(
        self, run_dir: pathlib.Path, step: int, evaluated: bool = True, active: bool = True
    ):
        self._run_dir, self._active = run_dir, active
        path = run_dir / "metrics.jsonl" if active else pathlib.Path(os.devnull)
        try:
            if path.is_file():
                lines = path.read_text().splitlines()
                kept = [line for line in lines if _position(line) <= (step, evaluated)]
                with files.atomic_path(path) as temporary:
                    temporary.write_text("".join(line + "\n" for line in kept))
            self._lines = open(path, "a", buffering=1)
            self._board = SummaryWriter(
                str(run_dir / "tensorboard"), purge_step=step + 1, write_to_disk=active
            )
        except OSError as error:
            raise StorageError(f"metrics cannot be written to {run_dir}: {error}") from error

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._lines.close()
        self._board.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a line; numbers that are not finite become null, which is what JSON has for them.

        Raises StorageError where the disk takes no more.
        """
        line = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        try:
            self._lines.write(json.dumps({"step": step} | line) + "\n")
        except OSError as error:
            raise StorageError(f"writing {self._run_dir}/metrics.jsonl failed: {error}") from error
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def sync(self) -> None:
        """Returns when all lines are on the disk, where they survive the machine's end.

        Raises StorageError where the disk takes no more.
        """
        if not self._active:
            return
        try:
            self._lines.flush()
            os.fsync(self._lines.fileno())
        except OSError as error:
            raise StorageError(f"writing {self._run_dir}/metrics.jsonl failed: {error}") from error

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Writes a grid of images as previews/step_<step>_<name>.png and to TensorBoard.

        Args:
            step: updates done.
            name: of the preview.
            images: values in [0, 1], (N, H, W, C) or (rows, columns, H, W, C).
        """
        if not self._active:
            return
        columns = images.shape[1] if images.ndim == 5 else None
        picture_HWC = image_io.image_grid(images.reshape(-1, *images.shape[-3:]), columns)
        path = self._run_dir / "previews" / f"step_{step:08d}_{name.replace('/', '_')}.png"
        image_io.write_png(path, picture_HWC)
        self._board.add_image(name, picture_HWC, step, dataformats="HWC")


class ProgressReporter:
    """Shows a bar where somebody watches the terminal; else a plain line every ten seconds or so.

        with ProgressReporter(0, steps) as progress:
            progress.show(1, {"loss": 1.5})
            progress.say("a line for the user")

    Args:
        step: the one that the run continues after.
        steps: the length of the run.
        active: False for a process that shows nothing.
    """

    def __init__(self, step: int, steps: int, active: bool = True):
        self._active, self._watched = active, sys.stderr.isatty()
        self._bar = tqdm(initial=step, total=steps, unit="step", disable=not self.watched)
        self._steps, self._start, self._begin = steps, step, time.monotonic()
        self._said = -math.inf

    @property
    def watched(self) -> bool:
        """Tells whether there is a bar."""
        return self._active and self._watched

    def __enter__(self) -> "ProgressReporter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves on to `step`, with the loss and the speed."""
        shown = {k: f"{metrics[k]:.4g}" for k in ("loss", "images_per_second") if k in metrics}
        if self.watched:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._said > PLAIN_LINE_SECONDS or step == self._steps:
            self._said = time.monotonic()
            pace = (self._said - self._begin) / max(step - self._start, 1)
            left = round(pace * (self._steps - step))
            words = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"step {step}/{self._steps}: {words}, {left} s left")

    def say(self, text: str) -> None:
        """Prints a line without breaking the bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)


def _position(line: str) -> tuple[float, bool]:
    """Returns a line's step and whether it tells of an evaluation; infinity if it is cut off."""
    try:
        metrics = json.loads(line)
        return metrics["step"], any(name.startswith("eval") for name in metrics)
    except ValueError:
        return math.inf, True
