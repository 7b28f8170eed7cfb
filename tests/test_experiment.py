import dataclasses

import pytest

from tests import tiny
from varjax import files
from varjax.training.experiment import record_config


@dataclasses.dataclass(frozen=True)
class Task:
    """Has the free settings of a transformer's task."""

    tokenizer_weights: str = "here"
    compute: tiny.AdamW = tiny.AdamW()  # any settings will do
    width: int = 4
    plan: tiny.Plan = tiny.Plan()


def experiment(run_dir, **changes):
    return dataclasses.replace(tiny.experiment(run_dir), task=Task(**changes))


def test_what_the_run_s_steps_do_not_depend_on_may_change(tmp_path):
    record_config(experiment(tmp_path))
    compute = tiny.AdamW(clip=1.0)
    record_config(experiment(tmp_path, tokenizer_weights="there", compute=compute))
    assert files.read_json(tmp_path / "config.json")["task"]["tokenizer_weights"] == "there"
    with pytest.raises(ValueError, match="task.width: 4 in the run, 5 in the config") as error:
        record_config(experiment(tmp_path, width=5, tokenizer_weights="elsewhere"))
    assert "elsewhere" not in str(error.value)


def test_a_field_the_run_does_not_know_must_keep_its_default(tmp_path):
    record_config(experiment(tmp_path))
    path = tmp_path / "config.json"
    config = files.read_json(path)
    del config["task"]["width"], config["seed"]
    files.write_json(path, config)
    with pytest.raises(ValueError, match="task.width: absent in the run, 5 in the config"):
        record_config(experiment(tmp_path, width=5))
    record_config(experiment(tmp_path))
    assert files.read_json(path)["task"]["width"] == 4
