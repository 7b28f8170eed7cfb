import json
import os
import sys

import pytest

from varjax.analysis import runs
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


def test_run_status_has_state_progress_and_error(run, tmp_path):
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
    for name in ("error.txt", "error-10.txt", "error-2.txt"):
        (run / name).write_text(name)
    assert run_status(run).error == "error.txt"  # errors of other processes often follow from it
    (run / "error.txt").unlink()
    header, line, error = status_table([run_status(run)]).splitlines()
    assert error == "    Traceback"
    assert "first  failed  200 / 300   2.5       3.25" in line and line.endswith(" d ago")
    assert "1,234 87%" in " ".join(line.split())
    assert header.startswith("run ") and "productive" in header


@pytest.mark.parametrize(
    "line",
    [b"5", b"[1]", b'"step"', b"\xff\xfe{", b'{"step": "x"}', b'{"step": [1]}', b"{", b"[" * 10**5,
     b'{"step": 1, "loss": ' + b"9" * 5000 + b"}"],
)  # fmt: skip
def test_lines_without_metrics_are_counted_and_skipped(run, capsys, line):
    good = b'{"step": 200, "loss": 2.5, "eval/loss": [1], "images_per_second": "x"}'
    (run / "metrics.jsonl").write_bytes(b"\n".join((b'{"note": 1}', line, line, good, b"")))
    status = run_status(run)
    assert (status.step, status.loss) == (200, 2.5)
    assert status.eval_loss != status.eval_loss  # NaN, because a list is not a metric
    (said,) = capsys.readouterr().err.splitlines()
    assert said.endswith("metrics.jsonl: 2 of 4 lines contain no metrics and are skipped; "
                         "the first is line 2")  # fmt: skip
    assert read_run_log(run).points("loss")[1].tolist() == [2.5]


@pytest.mark.parametrize(
    "config",
    ["5", "[1]", '{"batch_size": "x"}', '{"batch_size": 1, "steps": [1]}', "\udcff", "[" * 10**5],
)
def test_a_damaged_config_does_not_hide_other_runs(run, tmp_path, capsys, config):
    bad = tmp_path / "a" / "bad"
    files.write_json(bad / "data.json", {})
    (bad / "config.json").write_text(config, errors="surrogateescape")
    assert main([str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert str(run) in out and str(bad) not in out
    assert f"note: {bad} is left out: {bad}" in err.replace("/config.json", "")
    assert main([str(bad)]) == 1  # an error if it is the only run
    assert capsys.readouterr().err.startswith(f"varjax runs: {bad}")


def save(run, step, **meta):
    files.write_json(run / "checkpoints" / str(step) / "meta" / "metadata", {"meta": meta})


def test_a_run_is_finished_once_its_last_step_is_saved(run):
    log(run, '{"step": 300, "loss": 1.0}')
    assert run_status(run).state == "stopped"  # killed during its last evaluation
    log(run, '{"step": 300, "loss": 1.0}', '{"step": 300, "eval/loss": 1.0}')
    assert run_status(run).state == "finished"  # checkpoints may have been removed
    save(run, 200)
    assert run_status(run).state == "stopped"  # killed during its last save
    (run / "error.txt").write_text("StorageError: the disk is full")
    assert run_status(run).state == "failed"
    save(run, 300)
    assert run_status(run).state == "finished"
    save(run, 300, evaluation_due=True)  # a signal interrupted the last evaluation
    (run / "error.txt").unlink()
    assert run_status(run).state == "stopped"
    save(run, 300, evaluation_due=False)
    assert run_status(run).state == "finished"


@pytest.mark.parametrize(("patience", "state"), [(0, "stopped"), (2, "finished"), (3, "stopped")])
def test_a_run_ended_by_its_patience_is_finished(run, patience, state):
    config = files.read_json(run / "config.json")
    settings = {"keep_best": "eval/accuracy", "patience": patience}
    files.write_json(run / "config.json", config | settings)
    save(run, 20, keep_best="eval/accuracy", evaluations_since_best=2)
    assert run_status(run).state == state
    save(run, 20, keep_best="eval/loss", evaluations_since_best=9)  # counted for another metric
    assert run_status(run).state == "stopped"
    (run / "checkpoints/20/meta/metadata").write_text("{")
    assert run_status(run).state == "stopped"


def test_runs_are_found_below_a_folder(run, tmp_path, capsys, monkeypatch):
    files.write_json(tmp_path / "data" / "data.json", {})  # not a run, without config.json
    assert find_runs(tmp_path) == find_runs(run) == [run]
    assert main([str(tmp_path)]) == 0
    assert str(run) in capsys.readouterr().out
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "first").symlink_to(run)
    assert find_runs(tmp_path / "links") == [tmp_path / "links" / "first"]
    for name in ("private", "images"):
        (tmp_path / name).mkdir()
        files.write_json(tmp_path / name / "run" / "data.json", {})
        files.write_json(tmp_path / name / "run" / "config.json", {})
    (run / "images").symlink_to(tmp_path / "images")  # links in a run's directory are not searched
    list_folder = os.scandir

    def scandir(path):
        if os.path.basename(path) == "private":
            raise PermissionError
        if os.path.basename(path) == "300":  # a checkpoint that its run has just removed
            raise FileNotFoundError
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    save(run, 300)
    assert find_runs(tmp_path / "a") == [run]
    assert find_runs(tmp_path) == [run, tmp_path / "images" / "run", tmp_path / "links" / "first"]
    with pytest.raises(InputError, match="has no training run"):
        find_runs(tmp_path / "data")
    with pytest.raises(InputError, match="is not a folder"):
        find_runs(tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("InputError: init_from=x does not exist; name a run\nor more\n", "InputError: init_f"),
        ("no progress for 30 minutes\n\nThread 1:\n  File x\n", "no progress for 30 minutes"),
        ("Traceback (most recent call last):\n  File a\n    f()\nKeyError: 1\n\nDuring …\n\n"
         "Traceback (most recent call last):\n  File b\n    g()\nOSError: x\nmore\n", "OSError: x"),
        ("RuntimeError: \x1b[31mred", "RuntimeError: \\x1b[31mred"),
        ("", ""),
    ],
)  # fmt: skip
def test_a_failed_start_shows_the_first_line_of_its_error(run, capsys, text, line):
    (run / "error.txt").write_text(text)
    status = run_status(run)
    assert status.state == "failed start"
    log(run, '{"step": 1, "loss": 2.5}')
    assert run_status(run).state == "failed" and run_status(run).error == status.error
    _, _, *below = status_table([status]).splitlines()
    assert [x.startswith(f"    {line}") for x in below] == [True] * bool(line)
    assert not status.error.endswith("more")


def test_a_restarted_run_shows_no_earlier_error(run):
    (run / "error.txt").write_text("Traceback (most recent call last):\nKeyError: 1")
    with folders.lock_folder(run):
        assert (run_status(run).state, run_status(run).error) == ("running", "")


def test_runs_are_filtered_by_state_and_name_and_listed_as_json(run, tmp_path, capsys):
    other = tmp_path / "b" / "second"
    files.write_json(other / "config.json", {"batch_size": 64})
    files.write_json(other / "data.json", {})
    log(other, '{"step": 300, "loss": 1.5}')
    (run / "error.txt").write_text("InputError: no tokenizer")
    folder = str(tmp_path)
    for flags, kept in (
        (["--state=failed start,running"], [run]),
        (["--name=second"], [other]),
        (["--name=second", "--state=finished"], []),
        ([], [run, other]),
    ):
        assert main([folder, *flags]) == 0
        out = capsys.readouterr().out
        assert [x for x in (run, other) if str(x) in out] == kept
        left_out = f"{2 - len(kept)} of 2 runs are left out"
        assert (left_out in out) == (len(kept) < 2)
    assert main([folder, "--json", "--name=b/"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert (found["directory"], found["state"], found["step"]) == (str(other), "stopped", 300)
    assert (found["loss"], found["eval_loss"], found["steps"]) == (1.5, None, None)
    for flag, message in (
        ("--state=broken", "state=broken: must be one of running, finished"),
        ("--watch=inf", "watch=inf: must be 0 … 86,400 seconds"),
    ):
        assert main([folder, flag]) == 1
        assert message in capsys.readouterr().err


class Ended(Exception):
    """Ends `--watch`."""


@pytest.mark.parametrize("terminal", [True, False])
def test_watch_redraws_the_list_in_a_terminal(run, tmp_path, capsys, monkeypatch, terminal):
    times = []

    def sleep(seconds):
        times.append(seconds)
        if len(times) == 2:
            raise Ended

    monkeypatch.setattr(runs.time, "sleep", sleep)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setenv("LINES", "4")
    with pytest.raises(Ended):
        main([str(tmp_path), "--watch=5"])
    assert times == [5, 5]
    out = capsys.readouterr().out
    assert out.count("last written") == (0 if terminal else 2)  # the terminal is too narrow for it
    first, *screens = out.split(runs.HOME)
    assert len(screens) == (3 if terminal else 0)  # the first one clears the terminal
    for screen in screens[1:]:
        lines = screen.replace(runs.CLEAR_LINE, "").replace(runs.CLEAR_BELOW, "").splitlines()
        assert [len(line) <= 40 for line in lines[:2]] == [True, True] and len(lines) == 3
        assert lines[2].startswith("… 2 more lines")
