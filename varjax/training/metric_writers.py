"""Writes a run's metrics.jsonl, and passes numbers and pictures to the other writers."""

import json
import math
import os
import pathlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from varjax.errors import StorageError
from varjax.runtime.messages import say
from varjax.storage import files, image_io
from varjax.storage.buckets import LocalMirror, in_bucket
from varjax.storage.captioned_grid import Captions, captioned_grid
from varjax.storage.untrusted import parse_metrics_line
from varjax.training.background_writer import BackgroundWriter
from varjax.training.goodput import earlier_goodput
from varjax.training.run_writers import (
    UPLOAD_SECONDS,
    PreviewWriter,
    TensorBoardWriter,
    WandbWriter,
)

METRICS_FILE = "metrics.jsonl"
NO_CAPTIONS = Captions()
DRAIN_SECONDS = 1.0  # limit on how long a checkpoint waits for the writers in the background
CLOSE_SECONDS = 5.0  # limit on how long the end of a run waits for them


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
    """Writes metrics.jsonl, one object per line with "step", and passes everything to watchers.

        with MetricWriter(run_dir, step=0) as writer:
            writer.write(50, {"loss": 1.5})

    metrics.jsonl is part of the run: if it cannot be written, StorageError ends the run. Watchers
    (TensorBoard, previews, Weights & Biases, uploads between two checkpoints) run in threads
    (`BackgroundWriter`), where they cannot stop the run.

    In a bucket, lines arrive once a minute and with each checkpoint.

    Args:
        run_dir: folder of the files.
        step: step that the run continues from; lines about later ones are dropped.
        evaluated: whether the evaluation of that step is done; if not, its lines are dropped, too.
        active: False for a process that writes nothing.
        wandb: project of Weights & Biases that also gets everything; "" for none.

    Attributes:
        earlier_goodput: time spent by earlier starts of the run, from `goodput.earlier_goodput`.
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
        self._scalar_writers: list[BackgroundWriter] = []
        self._picture_writers: list[BackgroundWriter] = []
        self._upload_lock = threading.Lock()
        self.earlier_goodput: dict[str, float] = {}
        try:
            self._mirror = LocalMirror(run_dir, (METRICS_FILE,) if active else ())
            path = self._mirror.folder / METRICS_FILE if active else pathlib.Path(os.devnull)
            if path.is_file():
                lines = path.read_text(errors="replace").splitlines()
                parsed = [parse_metrics_line(line) for line in lines]
                self.earlier_goodput = earlier_goodput([x for x in parsed if x], step)
                kept = [
                    line
                    for line, metrics in zip(lines, parsed, strict=True)
                    if metrics and _position(metrics) <= (step, evaluated)
                ]
                with files.atomic_path(path) as temporary:
                    temporary.write_text("".join(line + "\n" for line in kept))
            self._lines = open(path, "a", buffering=1)
        except OSError as error:
            raise StorageError(f"metrics cannot be written to {run_dir}: {error}") from error
        if active:
            board = BackgroundWriter(
                "TensorBoard",
                lambda again: TensorBoardWriter(run_dir, None if again else step + 1),
            )
            previews = BackgroundWriter("previews", lambda _: PreviewWriter(run_dir))
            self._scalar_writers, self._picture_writers = [board], [board, previews]
            if in_bucket(run_dir):
                uploads = BackgroundWriter(
                    f"the upload of {METRICS_FILE}",
                    lambda _: _Uploads(lambda: self._upload(UPLOAD_SECONDS)),
                )
                self._scalar_writers.append(uploads)
            if wandb:
                sender = BackgroundWriter("Weights & Biases", lambda _: WandbWriter(wandb, run_dir))
                self._scalar_writers.append(sender)
                self._picture_writers.append(sender)

    @property
    def _watchers(self) -> set[BackgroundWriter]:
        return {*self._scalar_writers, *self._picture_writers}

    def __enter__(self) -> "MetricWriter":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        deadline = time.monotonic() + CLOSE_SECONDS
        for watcher in self._watchers:
            watcher.begin_close()
        for watcher in self._watchers:
            watcher.close(deadline)
        try:
            self._lines.close()
            with self._upload_lock:
                self._mirror.close()
        except OSError as error:
            if kind is None:  # otherwise another error matters more
                raise self._failure(error) from error

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes a line; numbers that are not finite become null, as JSON requires.

        Raises StorageError if the disk is full or fails.
        """
        line = {name: x if math.isfinite(x) else None for name, x in metrics.items()}
        try:
            self._lines.write(json.dumps({"step": step} | line) + "\n")
        except OSError as error:
            raise self._failure(error) from error
        for watcher in self._scalar_writers:
            watcher.scalars(step, metrics)

    def sync(self) -> None:
        """Waits until all lines are on the disk, where they survive a crash of the machine.

        Raises StorageError if the disk is full or fails.
        """
        if not self._active:
            return
        try:
            self._lines.flush()
            os.fsync(self._lines.fileno())
            self._upload()
        except OSError as error:
            raise self._failure(error) from error
        deadline = time.monotonic() + DRAIN_SECONDS
        for watcher in self._watchers:
            watcher.drain(deadline)

    def images(
        self, step: int, name: str, images: np.ndarray, captions: Captions = NO_CAPTIONS
    ) -> None:
        """Passes a grid of images to the writers, such as previews/step_<step>_<name>.png.

        Args:
            step: number of updates done.
            name: name of the preview.
            images: values in [0, 1], (N, H, W, C) or (rows, columns, H, W, C).
            captions: words on the grid.
        """
        if not self._active:
            return
        try:
            columns = images.shape[1] if images.ndim == 5 else None
            images_NHWC = image_io.to_uint8(images.reshape(-1, *images.shape[-3:]))
            picture_HWC = captioned_grid(images_NHWC, captions, columns)
        except ValueError as error:  # values that are not an image; previews must not stop the run
            say(f"note: no preview {name} of step {step}: {error}")
            return
        for watcher in self._picture_writers:
            watcher.picture(step, name, picture_HWC)

    def _upload(self, every: float = 0.0) -> None:
        with self._upload_lock:
            self._mirror.upload(every)

    def _failure(self, error: OSError) -> StorageError:
        return StorageError(f"writing {self._run_dir}/{METRICS_FILE} failed: {error}")


class _Uploads:
    """Calls `upload` after each line, in the background."""

    def __init__(self, upload: Callable[[], None]):
        self._upload = upload

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        self._upload()

    def picture(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        pass

    def close(self) -> None:
        pass


def _position(metrics: dict[str, Any]) -> tuple[int, bool]:
    """Returns a line's step and whether it is about an evaluation."""
    return metrics["step"], any(name.startswith("eval") for name in metrics)
