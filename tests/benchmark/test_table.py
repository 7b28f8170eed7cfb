"""Tests `varjax benchmark table`: which commands run, and how figures are compared."""

import json
import re

import pytest

from tests.helpers.paths import ROOT
from varjax.benchmark import __main__ as benchmark
from varjax.benchmark import table
from varjax.benchmark.table import ROWS, Row, measured_rows

NOW = {"jax": "0.10.2", "processor": "Pentium"}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.command} {row.part} {row.jax}")
def test_each_row_is_in_the_documentation(row):
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    sections = [s for s in re.split(r"^#+ ", page, flags=re.M) if f"benchmark {row.command}" in s]
    number = re.escape(f"{row.documented:.2f}".rstrip("0").rstrip("."))
    (section,) = sections
    _, _, after = section.partition(f"benchmark {row.command}")
    assert re.search(rf"(?<![\d.]){number}0?(?![\d.]*\d)", after)
    assert row.jax in page and (row.matmul_gflops is not None) == (row.figure == "seconds")


@pytest.mark.parametrize(
    ("figure", "documented", "line", "ratio"),
    [
        ("efficiency", 0.8, {"efficiency": 0.4}, 0.5),
        ("ms", 100, {"ms": 80.0}, 1.25),
        ("seconds", 10, {"seconds": 10.0, "matmul_gflops": 200.0}, 0.5),  # on a faster machine
    ],
)
def test_a_ratio_below_1_is_slower_than_documented(figure, documented, line, ratio):
    row = Row("data", "a", figure, documented, "", 9, matmul_gflops=100)
    result = {"state": "done", "lines": [{"part": "b"}, {"part": "a"} | line | NOW]}
    (compared,) = measured_rows([row], lambda *_: result)
    assert compared["measured"] == line[figure] and compared["ratio"] == ratio
    assert (compared["jax_now"], compared["processor_now"]) == ("0.10.2", "Pentium")


def test_short_commands_run_once_and_are_compared(capsys, monkeypatch):
    ran = []

    def run(arguments, seconds):
        ran.append((" ".join(arguments), seconds))
        line = {"part": "features", "efficiency": 0.36, "matmul_gflops": 99.0} | NOW
        return {"state": "failed", "lines": [line], "error": "no memory"}

    monkeypatch.setattr(table, "run_part", run)
    monkeypatch.setattr(table, "describe_machine", lambda: {"platform": "cpu"})
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["table"]) == 1  # figures are missing
    assert ran == [("evaluate --images=10000", 120)]
    output = capsys.readouterr().out.splitlines()
    lines = [json.loads(line) for line in output if line.startswith("{")]
    assert [(x["documented"], x["ratio"]) for x in lines[:2]] == [(0.72, 0.5), (0.89, 0.404)]
    assert lines[2]["part"] == "fid" and lines[2]["error"] == "no memory"
    assert "| features | efficiency | 0.72 | 0.36 | 0.5 | jax 0.10.2, AMD" in "\n".join(output)
    assert benchmark.main(["table", "--minutes=20"]) == 1
    commands = [command for command, _ in ran[1:]]
    assert len(commands) == len(set(commands)) > 3
    assert not any(command.startswith("tpu ") for command in commands)  # libtpu is missing


def test_without_rows_for_this_machine_the_error_gives_advice(capsys, monkeypatch):
    monkeypatch.setattr(table, "describe_machine", lambda: {"platform": "gpu"})
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda name: None)
    assert benchmark.main(["table", "--minutes=99"]) == 1
    assert "JAX_PLATFORMS=cpu" in capsys.readouterr().err
