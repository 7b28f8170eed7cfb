"""Writers of a run's numbers and pictures: metrics.jsonl, TensorBoard, and others beside them."""

import json
import math
import os
import pathlib
import sys
import time
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from tensorboardX import SummaryWriter

from varjax.core import files, image_io
from varjax.core.buckets import LocalMirror
from varjax.core.errors import StorageError
from varjax.training.wandb_writer import WandbWriter

METRICS_FILE = "metrics.jsonl"
UPLOAD_SECONDS = 60.0  # at least, between two uploads to a bucket


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


class RunWriter(Protocol):
    """Takes what a run logs to one more place, as `TensorBoardWriter` does."""

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes numbers by name."""
        ...

    def picture(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        """Writes a uint8 picture."""
        ...

    def close(self) -> None:
        """Returns when all is written."""
        ...


class TensorBoardWriter:
    """Writes files for TensorBoard, without it.

    Args:
        folder: the files come into its folder tensorboard.
        step: the one that the run continues after; what was written of later ones is hidden.
    """

    def __init__(self, folder: pathlib.Path, step: int):
        self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._board.add_scalar(name, value, step)

    def picture(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        self._board.add_image(name, picture_HWC, step, dataformats="HWC")

    def close(self) -> None:
        self._board.close()


class MetricWriter:
    """Writes metrics.jsonl (one object a line, with "step") and previews, and tells other writers.

        with MetricWriter(run_dir, step=0) as writer:
            writer.write(50, {"loss": 1.5})

    In a bucket, lines arrive once a minute and with each checkpoint.

    Args:
        run_dir: the folder of the files.
        step: the one that the run continues after; lines about later ones are dropped.
        evaluated: whether that step's evaluation is done; else its lines are dropped too.
        active: False for a process that writes nothing at all.
        wandb: a project of Weights & Biases that gets everything as well; "" for none.
    """

    def __init__(
        self,
        run_dir: pathlib.Path,
        step: int,
        evaluated: bool = True,
        active: bool = True,
        wandb: str = "",
    ):
        self._run_dir, self._active = run_dir, active
        self._others: list[RunWriter] = []
        self._uploaded = time.monotonic()
        try:
            self._mirror = LocalMirror(run_dir, (METRICS_FILE,) if active else ())
            path = self._mirror.folder / METRICS_FILE if active else pathlib.Path(os.devnull)
            if path.is_file():
                lines = path.read_text().splitlines()
                kept = [line for line in lines if _position(line) <= (step, evaluated)]
                with files.atomic_path(path) as temporary:
                    temporary.write_text("".join(line + "\n" for line in kept))
            self._lines = open(path, "a", buffering=1)
            if active:
                self._others.append(TensorBoardWriter(self._mirror.folder, step))
        except OSError as error:
            raise StorageError(f"metrics cannot be written to {run_dir}: {error}") from error
        if active and wandb:
            self._others.append(WandbWriter(wandb, run_dir, self._mirror.folder))

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, *_: Any) -> None:
        self._lines.close()
        for writer in self._others:
            writer.close()
        self._mirror.close()

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a line; numbers that are not finite become null, which is what JSON has for them.

        Raises StorageError where the disk takes no more.
        """
        line = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        try:
            self._lines.write(json.dumps({"step": step} | line) + "\n")
        except OSError as error:
            raise StorageError(f"writing {self._run_dir}/metrics.jsonl failed: {error}") from error
        for writer in self._others:
            writer.scalars(step, metrics)
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            try:
                self._upload()
            except StorageError as error:  # the next upload has these lines, too
                self._uploaded = time.monotonic()
                print(f"note: {error}", file=sys.stderr)

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
        self._upload()

    def images(self, step: int, name: str, images: np.ndarray) -> None:
        """Writes a grid of images as previews/step_<step>_<name>.png, and to the other writers.

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
        for writer in self._others:
            writer.picture(step, name, picture_HWC)

    def _upload(self) -> None:
        self._mirror.upload()
        self._uploaded = time.monotonic()


def _position(line: str) -> tuple[float, bool]:
    """Returns a line's step and whether it tells of an evaluation; infinity if it is cut off."""
    try:
        metrics = json.loads(line)
        return metrics["step"], any(name.startswith("eval") for name in metrics)
    except ValueError:
        return math.inf, True
