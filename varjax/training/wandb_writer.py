"""Writes a run's numbers and pictures to Weights & Biases, where a project is named."""

import importlib
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from varjax.errors import InputError
from varjax.storage import files
from varjax.storage.buckets import LocalMirror

ID_FILE = "wandb.json"  # which run of Weights & Biases this run goes on in


def check_wandb(project: str) -> None:
    """Raises InputError where a project is named but the package is missing; "" names none."""
    if project:
        _package()


class WandbWriter:
    """Sends what a run logs to a project of Weights & Biases; a continued run continues there.

        writer = WandbWriter("my-project", run_dir)
        writer.scalars(50, {"loss": 1.5})

    Args:
        project: name of the project, NAME or ENTITY/NAME.
        run_dir: directory of the run, whose path is its name there. It keeps the run's id and the
            files of the package.
    """

    def __init__(self, project: str, run_dir: pathlib.Path):
        entity, _, name = project.rpartition("/")
        path, config = run_dir / ID_FILE, run_dir / "config.json"
        self._package, self._mirror = _package(), LocalMirror(run_dir)
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
        # A run that continues after a kill tells of some steps again, which a step counter of
        # Weights & Biases' own would refuse.
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


def _package() -> Any:
    """Weights & Biases' package, which is not among varjax's dependencies."""
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise InputError(
            f"the setting wandb needs its package ({error}): pip install wandb, or leave it empty"
        ) from error
