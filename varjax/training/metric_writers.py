"""Where numbers and pictures of a run go: metrics.jsonl, TensorBoard, and the terminal."""

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

QUIET_SECONDS = 10.0


def flatten(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Plain floats by name; a 1-D array becomes name/0, name/1, ..."""
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

    This process resumes after `step`, with its evaluation or, where that was not `evaluated`,
    before it: what an earlier process wrote about later than that is dropped. One that is not
    `active` writes nothing at all.
    """

    def __init__(
        self, run_dir: pathlib.Path, step: int, evaluated: bool = True, active: bool = True
    ):
        self._run_dir, self._active = run_dir, active
        path = run_dir / "metrics.jsonl" if active else pathlib.Path(os.devnull)
        if path.is_file():
            lines = path.read_text().splitlines()
            kept = [line for line in lines if _moment(line) <= (step, evaluated)]
            with files.atomic_path(path) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))
        self._lines = open(path, "a", buffering=1)
        self._board = SummaryWriter(
            str(run_dir / "tensorboard"), purge_step=step + 1, write_to_disk=active
        )

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._lines.close()
        self._board.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """One line; numbers that are not finite become null, which is what JSON has for them."""
        line = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        self._lines.write(json.dumps({"step": step} | line) + "\n")
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Saves a grid of images in [0, 1] as previews/step_<step>_<name>.png.

        images: (N, H, W, C), or (rows, columns, H, W, C).
        """
        if not self._active:
            return
        columns = images.shape[1] if images.ndim == 5 else None
        picture_HWC = image_io.grid(images.reshape(-1, *images.shape[-3:]), columns)
        path = self._run_dir / "previews" / f"step_{step:08d}_{name.replace('/', '_')}.png"
        image_io.write_png(path, picture_HWC)
        self._board.add_image(name, picture_HWC, step, dataformats="HWC")


class Progress:
    """A bar where somebody watches the terminal; else a plain line every ten seconds or so."""

    def __init__(self, step: int, steps: int, active: bool = True):
        self._active, self._watched = active, sys.stderr.isatty()
        self._bar = tqdm(initial=step, total=steps, unit="step", disable=not self.watched)
        self._steps, self._start, self._begin = steps, step, time.monotonic()
        self._said = -math.inf

    @property
    def watched(self) -> bool:
        """Whether there is a bar."""
        return self._active and self._watched

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.close()

    def show(self, step: int, metrics: Mapping[str, float]) -> None:
        """Moves on to `step`, with the loss and the speed."""
        shown = {k: f"{metrics[k]:.4g}" for k in ("loss", "images_per_second") if k in metrics}
        if self.watched:
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update(step - self._bar.n)
        elif time.monotonic() - self._said > QUIET_SECONDS or step == self._steps:
            self._said = time.monotonic()
            pace = (self._said - self._begin) / max(step - self._start, 1)
            left = round(pace * (self._steps - step))
            words = ", ".join(f"{name} {value}" for name, value in shown.items())
            self.say(f"step {step}/{self._steps}: {words}, {left} s left")

    def say(self, text: str) -> None:
        """A line for the user that does not break the bar."""
        if self._active:
            tqdm.write(text, file=sys.stderr)


def _moment(line: str) -> tuple[float, bool]:
    """The step of a line and whether it tells of the evaluation; infinity where it is cut off."""
    try:
        metrics = json.loads(line)
        return metrics["step"], any(name.startswith("eval") for name in metrics)
    except ValueError:
        return math.inf, True
