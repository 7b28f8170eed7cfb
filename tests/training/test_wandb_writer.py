import sys
import types

import numpy as np
import pytest

from tests.helpers import tiny
from varjax.errors import InputError
from varjax.storage import files
from varjax.training.metric_writers import MetricWriter


class StandIn(types.ModuleType):
    """Replaces the part of wandb that the writer uses, and records what it is given."""

    def __init__(self):
        super().__init__("wandb")
        self.begun, self.logged, self.finished = [], [], 0

    def init(self, **settings):
        self.begun.append(settings)
        run = types.SimpleNamespace(id=settings["id"] or "abc", define_metric=lambda *a, **k: None)
        run.log = self.logged.append
        run.finish = lambda: setattr(self, "finished", self.finished + 1)
        return run

    @staticmethod
    def Image(picture_HWC):
        return picture_HWC.shape


def test_numbers_and_pictures_arrive_and_a_resumed_run_continues(tmp_path, monkeypatch):
    package = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", package)
    files.write_json(tmp_path / "config.json", {"seed": 3})
    for step in (1, 2):
        with MetricWriter(tmp_path, step - 1, wandb="team/digits") as writer:
            writer.write(step, {"loss": 0.5})
            writer.images(step, "samples", np.zeros((2, 8, 8, 1)))
    first, second = package.begun
    assert (first["entity"], first["project"], first["id"]) == ("team", "digits", None)
    assert first["config"] == {"seed": 3}
    assert second["id"] == "abc" and second["resume"] == "allow"
    assert [line for line in package.logged if "loss" in line] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.5},
    ]
    assert len(package.logged[1]["samples"]) == 3 and package.finished == 2


def test_an_inactive_process_sends_nothing(tmp_path, monkeypatch):
    package = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", package)
    with MetricWriter(tmp_path, 0, active=False, wandb="digits") as writer:
        writer.write(1, {"loss": 0.5})
    assert not package.begun


def test_a_missing_package_is_refused_before_the_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(InputError, match="pip install wandb"):
        tiny.experiment(tmp_path, wandb="digits").check()
