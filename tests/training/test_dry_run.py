import pytest

from tests.helpers import tiny
from varjax.errors import InputError
from varjax.training.dry_run import dry_run
from varjax.training.run_dir import check_or_write_config


@pytest.mark.slow
def test_it_takes_a_step_and_writes_nothing(tmp_path):
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


def test_what_training_refuses_it_refuses(tmp_path):
    check_or_write_config(tiny.experiment(tmp_path))
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(InputError, match="task.width: 16 in the run, 4 in the config"):
        dry_run(tiny.experiment(tmp_path, width=4))
    with pytest.raises(InputError, match="a batch of 64 cannot be split into 3 equal"):
        dry_run(tiny.experiment(tmp_path / "other", accumulate=3))
