"""Writers of logs for watching a run: TensorBoard, Weights & Biases, previews as PNG."""

import contextlib
import importlib
import itertools
import os
import pathlib
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]  (made when it is imported)
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import masked_crc32c

from varjax.errors import InputError
from varjax.storage import files, image_io
from varjax.storage.buckets import LocalMirror

UPLOAD_SECONDS = 60.0  # minimum between two uploads to a bucket
WANDB_ID_FILE = "wandb.json"  # keeps which run of Weights & Biases this run continues

_file_numbers = itertools.count()  # each error starts a new file, perhaps in the same second


class RunWriter(Protocol):
    """Writes a run's log entries, as `TensorBoardWriter` does; may raise any error."""

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes numbers by name."""
        ...

    def picture(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        """Writes a uint8 picture."""
        ...

    def close(self) -> None:
        """Waits until everything is written."""
        ...


class TensorBoardWriter:
    """Writes files for TensorBoard, without importing it.

    tensorboardX's `SummaryWriter` is not used: a disk error silently ends its thread, and then
    adding an event waits forever.

    Args:
        run_dir: directory of the run; the files are written to its folder tensorboard, once a
            minute if it is in a bucket.
        purge_step: step from which on the content of earlier files is hidden; None hides nothing.
    """

    def __init__(self, run_dir: pathlib.Path, purge_step: int | None):
        self._mirror = LocalMirror(run_dir)
        folder = self._mirror.folder / "tensorboard"
        folder.mkdir(parents=True, exist_ok=True)
        name = f"{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.{next(_file_numbers)}"
        self._file = open(folder / f"events.out.tfevents.{name}", "xb")
        with self._closed_on_error():
            self._write(Event(file_version="brain.Event:2"))
            if purge_step is not None:
                log = SessionLog(status=SessionLog.START)
                self._write(Event(step=purge_step, session_log=log))
            self._file.flush()

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._write(Event(step=step, summary=summary.scalar(name, value)))
        self._file.flush()  # so that an error shows now, not some entries later
        self._mirror.upload(UPLOAD_SECONDS)

    def picture(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        picture = summary.image(name, picture_HWC, dataformats="HWC")
        self._write(Event(step=step, summary=picture))
        self._file.flush()

    def close(self) -> None:
        with contextlib.closing(self._mirror):
            self._file.close()

    def _write(self, event: Event) -> None:
        event.wall_time = time.time()
        data = event.SerializeToString()
        header = struct.pack("<Q", len(data))
        for part in (header, data):  # the format of TFRecord files
            self._file.write(part + struct.pack("<I", masked_crc32c(part)))

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception:
            with contextlib.suppress(Exception):
                self.close()
            raise


def preview_path(run_dir: pathlib.Path, step: int, name: str) -> pathlib.Path:
    """Returns the path of a run's preview."""
    return run_dir / "previews" / f"step_{step:08d}_{name.replace('/', '_')}.png"


class PreviewWriter:
    """Writes pictures as <run_dir>/previews/step_<step>_<name>.png."""

    def __init__(self, run_dir: pathlib.Path):
        self._run_dir = run_dir

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def picture(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        image_io.write_png(preview_path(self._run_dir, step, name), picture_HWC)

    def close(self) -> None:
        pass


class WandbWriter:
    """Sends what a run logs to a project of Weights & Biases; a continued run continues there.

        writer = WandbWriter("my-project", run_dir)
        writer.scalars(50, {"loss": 1.5})

    Args:
        project: name of the project, NAME or ENTITY/NAME.
        run_dir: directory of the run. Its path is the run's name there, and it keeps the run's id
            and the files of the package.
    """

    def __init__(self, project: str, run_dir: pathlib.Path):
        entity, _, name = project.rpartition("/")
        path, config = run_dir / WANDB_ID_FILE, run_dir / "config.json"
        self._package, self._mirror = _wandb_package(), LocalMirror(run_dir)
        self._run = self._package.init(
            project=name,
            entity=entity or None,
            name=str(run_dir),
            id=files.read_json(path)["id"] if path.exists() else None,
            resume="allow",
            dir=str(self._mirror.folder),
            config=files.read_json(config) if config.exists() else None,
        )
        files.write_json(path, {"project": project, "id": self._run.id})
        # A run that continues after a kill logs some steps again, which the package's own step
        # counter would refuse.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        """Sends numbers by name."""
        self._run.log({"step": step, **metrics})

    def picture(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        """Sends a uint8 picture."""
        self._run.log({"step": step, name: self._package.Image(picture_HWC)})

    def close(self) -> None:
        """Ends the connection once all is sent."""
        self._run.finish()
        self._mirror.close()


def check_wandb(project: str) -> None:
    """Raises InputError if a project is named but the package is missing; "" names none."""
    if project:
        _wandb_package()


def _wandb_package() -> Any:
    """Imports Weights & Biases' package, which is not among varjax's dependencies."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise InputError(
            f"the setting wandb needs its package ({error}): pip install wandb, or leave it empty"
        ) from error
