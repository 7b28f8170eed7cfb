import os

import pytest

from varjax.analysis.runs import find_runs, main, run_status, status_table
from varjax.core import files, folders
from varjax.core.errors import InputError


@pytest.fixture
def run(tmp_path):
    run = tmp_path / "a" / "first"
    files.write_json(run / "config.json", {"batch_size": 64, "epochs": 2, "plan": {"steps": 300}})
    files.write_json(run / "data.json", {})
    return run


def log(run, *lines):
    (run / "metrics.jsonl").write_text("\n".join(lines))


def test_a_run_tells_where_it_stands(run, tmp_path):
    assert run_status(run).state == "stopped"
    log(
        run,
        '{"step": 100, "loss": 2.5, "images_per_second": 1234.5}',
        '{"step": 200, "eval/loss": 3.5, "eval_ema/loss": 3.25}',
        '{"step": 250, "loss": nul',
    )
    os.utime(run / "metrics.jsonl", (0, 0))
    status = run_status(run)
    assert (status.state, status.step, status.steps) == ("stopped", 200, 300)
    assert (status.loss, status.eval_loss, status.images_per_second) == (2.5, 3.25, 1234.5)
    with folders.lock_folder(run):
        assert run_status(run).state == "running"
    (run / "error-1.txt").write_text("Traceback")
    assert run_status(run).state == "failed"
    header, line = status_table([run_status(run)]).splitlines()
    assert "first  failed  200 / 300   2.5       3.25" in line and line.endswith(" d ago")
    assert header.startswith("run ")


def test_a_run_at_its_last_step_is_finished(run):
    log(run, '{"step": 300, "loss": 1.0}')
    assert run_status(run).state == "finished"


def test_runs_are_found_below_a_folder(run, tmp_path, capsys):
    files.write_json(tmp_path / "data" / "data.json", {})  # no run's
    assert find_runs(tmp_path) == find_runs(run) == [run]
    assert main([str(tmp_path)]) == 0
    assert str(run) in capsys.readouterr().out
    with pytest.raises(InputError, match="holds no training run"):
        find_runs(tmp_path / "data")
    with pytest.raises(InputError, match="is no folder"):
        find_runs(tmp_path / "none")
