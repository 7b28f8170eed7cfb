import shutil

import numpy as np
import pytest

from tests.helpers import tiny
from varjax.errors import InputError
from varjax.storage import files
from varjax.training import loop
from varjax.training.dry_run import dry_run
from varjax.training.fid_evaluation import FIDConfig
from varjax.training.run_dir import write_config


@pytest.mark.slow
def test_a_dry_run_takes_a_step_and_writes_nothing(tmp_path):
    lines = []
    dry_run(tiny.experiment(tmp_path / "run", accumulate=2), lines.append)
    said = "\n".join(lines)
    for words in (
        "mesh: data 1, fsdp 1, tensor 1 on 1 × cpu",
        "batch: 64 images, 64 on a device, 32 at a time",
        "length: 30 steps, 1.3 epochs of 1,442 images of 10 classes",
        "state: 1,200 parameters",
        "step: loss 2.3",
        "whole run: about ",
        "evaluation: compiled",
    ):
        assert words in said
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_settings_that_training_refuses(tmp_path):
    write_config(tiny.experiment(tmp_path))
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(InputError, match="task.width: 16 in the run, 4 in the config"):
        dry_run(tiny.experiment(tmp_path, width=4))
    with pytest.raises(InputError, match="a batch of 64 cannot be split into 3 equal"):
        dry_run(tiny.experiment(tmp_path / "other", accumulate=3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keep_best": "eval/nonsense"}, "keep_best is 'eval/nonsense', but an evaluation gives"),
        ({"fid": FIDConfig(every=10, reference="absent.npz", features="pixels")}, "absent.npz"),
        ({"init_from": "absent"}, "absent"),
        ({"fork_from": "absent"}, "absent has no checkpoint"),
    ],
)
def test_a_dry_run_refuses_what_training_refuses_after_setup(tmp_path, changes, message):
    experiment = tiny.experiment(tmp_path / "run", **changes)
    for start in (dry_run, loop.train):
        with pytest.raises(InputError, match=message):
            start(experiment)


@pytest.mark.slow
def test_a_dry_run_refuses_other_images_and_nonfinite_steps(whole, tmp_path):
    copy = shutil.copytree(whole[0], tmp_path / "run")
    shutil.rmtree(copy / "checkpoints" / "30")
    data = files.read_json(copy / "data.json")
    files.write_json(copy / "data.json", data | {"train": {"images": 3}})
    other_images = tiny.experiment(copy, keep_best="eval/loss", preview_every=20)
    exploding = tiny.experiment(tmp_path / "new", explode_at=0)
    for start in (dry_run, loop.train):
        with pytest.raises(InputError, match="was trained on other images"):
            start(other_images)
        with pytest.raises(InputError, match="after step 1, .'grad_norm'.* are not finite"):
            start(exploding)


def test_a_dry_run_uses_the_frozen_weights_of_an_existing_run(whole, tmp_path):
    copy = shutil.copytree(whole[0], tmp_path / "run")
    settings = dict(keep_best="eval/loss", preview_every=20, offset_file=str(tmp_path / "absent"))
    config = files.read_json(copy / "config.json")
    config["task"]["offset_file"] = settings["offset_file"]
    files.write_json(copy / "config.json", config)
    with pytest.raises(OSError, match="absent"):
        dry_run(tiny.experiment(copy, **settings))
    files.write_tensors(copy / "frozen.safetensors", {"offset": np.float32(1)}, {})
    lines = []
    dry_run(tiny.experiment(copy, **settings), lines.append)
    assert lines[-1].startswith("everything works")


def test_a_run_with_a_checkpoint_no_longer_needs_its_fork_source(whole, tmp_path):
    copy = shutil.copytree(whole[0], tmp_path / "run")
    lines = []
    settings = dict(keep_best="eval/loss", preview_every=20, fork_from="absent")
    dry_run(tiny.experiment(copy, **settings), lines.append)
    assert lines[-1].startswith("everything works")
