import os

import pytest

from varjax.analysis.run_log import read_run_log
from varjax.analysis.runs import find_runs, main, run_status, status_table
from varjax.errors import InputError
from varjax.storage import files, folders


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
        '{"step": 100, "loss": 2.5, "images_per_second": 1234.5, "goodput/fraction": 0.5}',
        '{"step": 150, "goodput/fraction": 0.874}',
        '{"step": 200, "eval/loss": 3.5, "eval_ema/loss": 3.25}',
        '{"step": 250, "loss": nul',
    )
    os.utime(run / "metrics.jsonl", (0, 0))
    status = run_status(run)
    assert (status.state, status.step, status.steps) == ("stopped", 200, 300)
    assert (status.loss, status.eval_loss, status.images_per_second) == (2.5, 3.25, 1234.5)
    assert status.productive == 0.874
    with folders.lock_folder(run):
        assert run_status(run).state == "running"
    (run / "error-1.txt").write_text("Traceback")
    assert run_status(run).state == "failed"
    header, line = status_table([run_status(run)]).splitlines()
    assert "first  failed  200 / 300   2.5       3.25" in line and line.endswith(" d ago")
    assert "1,234 87%" in " ".join(line.split())
    assert header.startswith("run ") and "productive" in header


@pytest.mark.parametrize(
    "line",
    [b"5", b"[1]", b'"step"', b"\xff\xfe{", b'{"step": "x"}', b'{"step": [1]}', b"{", b"[" * 10**5,
     b'{"step": 1, "loss": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_lines_that_are_no_metrics_are_counted_and_left_out(run, capsys, line):
    good = b'{"step": 200, "loss": 2.5, "eval/loss": [1], "images_per_second": "x"}'
    (run / "metrics.jsonl").write_bytes(b"\n".join((b'{"note": 1}', line, line, good, b"")))
    status = run_status(run)
    assert (status.step, status.loss) == (200, 2.5)
    assert status.eval_loss != status.eval_loss  # no number is no metric
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("metrics.jsonl: 2 of 4 lines contain no metrics and are skipped; "
                         "the first is line 2")  # fmt: skip
    assert read_run_log(run).points("loss")[1].tolist() == [2.5]


@pytest.mark.parametrize(
    "config",
    ["5", "[1]", '{"batch_size": "x"}', '{"batch_size": 1, "steps": [1]}', "\udcff", "[" * 10**5],
)
def test_a_damaged_config_leaves_the_other_runs_in_the_list(run, tmp_path, capsys, config):
    bad = tmp_path / "a" / "bad"
    files.write_json(bad / "data.json", {})
    (bad / "config.json").write_text(config, errors="surrogateescape")
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert str(run) in out and str(bad) not in out
    assert f"note: {bad} is left out: {bad}" in err.replace("/config.json", "")
    assert main([str(bad)]) == 1  # alone it is an error
    assert capsys.readouterr().err.startswith(f"varjax runs: {bad}")


def test_a_run_at_its_last_step_is_finished(run):
    log(run, '{"step": 300, "loss": 1.0}')
    assert run_status(run).state == "finished"


def test_runs_are_found_below_a_folder(run, tmp_path, capsys):
    files.write_json(tmp_path / "data" / "data.json", {})  # no run's
    assert find_runs(tmp_path) == find_runs(run) == [run]
    assert main([str(tmp_path)]) == 0
    assert str(run) in capsys.readouterr().out
    with pytest.raises(InputError, match="has no training run"):
        find_runs(tmp_path / "data")
    with pytest.raises(InputError, match="is not a folder"):
        find_runs(tmp_path / "none")
