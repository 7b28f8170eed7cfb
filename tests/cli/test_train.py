import pytest

from varjax.cli import train
from varjax.convert import pretrained

CONFIG = """
from tests.helpers import tiny

def get_config(arg="4"):
    return tiny.experiment({run_dir!r}, steps=int(arg))
"""


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG.format(run_dir=str(tmp_path / "run")))
    return f"--config={path}"


def test_without_a_config_the_usage_is_printed(capsys):
    assert train.main([]) == 2
    assert "python train.py --config=configs/" in capsys.readouterr().err


@pytest.mark.slow
def test_config_argument_and_overrides_reach_the_run(config, tmp_path, capsys):
    assert train.main([f"{config}:2", "--config.task.width=3"]) == 0
    assert (tmp_path / "run" / "checkpoints" / "2").is_dir()
    assert train.main([f"{config}:2", "--config.task.width=4"]) == 1
    error = capsys.readouterr().err
    assert "task.width: 3 in the run, 4 in the config" in error and "Traceback" not in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.task.widht=3"], "Tiny has no field 'widht'"),
        (["--config.task.width=wide"], "task.width must be int, not 'wide'"),
        (["--config.steps", "3", "4"], "settings are --config.FIELD=VALUE"),
        (["--confg.steps=3"], "settings are --config.FIELD=VALUE"),
    ],
)
def test_mistakes_give_a_one_line_error(config, capsys, arguments, message):
    assert train.main([config, *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_settings_are_checked_before_anything_is_downloaded(config, monkeypatch, capsys):
    monkeypatch.setattr(pretrained, "_fetch", None)
    for change in ("batch_size=0", "run_dir="):
        for more in ([], ["--dry_run"]):
            flags = [config, "--config.init_from=var_d16", f"--config.{change}", *more]
            assert train.main(flags) == 1
            assert change.split("=")[0] in capsys.readouterr().err
