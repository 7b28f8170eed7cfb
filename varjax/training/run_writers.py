"""Writers of what is only for watching a run: TensorBoard's files, and previews as PNG."""

import contextlib
import itertools
import os
import pathlib
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from typing import Protocol

import numpy as np
from tensorboardX import summary
from tensorboardX.proto.event_pb2 import (
    Event,  # pyright: ignore[reportAttributeAccessIssue]  (made when it is imported)
    SessionLog,  # pyright: ignore[reportAttributeAccessIssue]
)
from tensorboardX.record_writer import masked_crc32c

from varjax.storage import image_io
from varjax.storage.buckets import LocalMirror

UPLOAD_SECONDS = 60.0  # at least, between two uploads to a bucket

_file_numbers = itertools.count()  # an error leads to another file, perhaps in the same second


class RunWriter(Protocol):
    """Takes what a run logs to one more place, as `TensorBoardWriter` does; may raise anything."""

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

    Not by tensorboardX's `SummaryWriter`: an error of the disk ends its thread unseen, and then
    adding an event waits for ever.

    Args:
        run_dir: directory of the run; the files are written to its folder tensorboard, in a bucket
            once a minute.
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
        self._uploaded = time.monotonic()

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._write(Event(step=step, summary=summary.scalar(name, value)))
        self._file.flush()  # an error shows now, not some entries later
        if time.monotonic() - self._uploaded > UPLOAD_SECONDS:
            self._mirror.upload()
            self._uploaded = time.monotonic()

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


class PreviewWriter:
    """Writes pictures as <run_dir>/previews/step_<step>_<name>.png."""

    def __init__(self, run_dir: pathlib.Path):
        self._folder = run_dir / "previews"

    def scalars(self, step: int, metrics: Mapping[str, float]) -> None:
        pass

    def picture(self, step: int, name: str, picture_HWC: np.ndarray) -> None:
        path = self._folder / f"step_{step:08d}_{name.replace('/', '_')}.png"
        image_io.write_png(path, picture_HWC)

    def close(self) -> None:
        pass
