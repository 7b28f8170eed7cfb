"""Tests that hostile files are refused quickly, and damaged ones are refused or read.

One process with a memory limit does with each file what a conversion does before it writes.
"""

import json
import sys

import pytest

from tests.helpers import forked, hostile_files
from tests.helpers.paths import ROOT

MUTATIONS = 500


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Returns the reader's report on each file, by file name."""
    folder = tmp_path_factory.mktemp("hostile")
    hostile_files.write_corpus(folder)
    hostile_files.write_damaged(folder, MUTATIONS // 4)
    command = [sys.executable, "-m", "tests.helpers.hostile_reader", str(folder)]
    done = forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert {line["name"] for line in lines} == {path.name for path in folder.iterdir()}
    return {line["name"]: line for line in lines}


def assert_harmless(name, line):
    assert line["outcome"] in ("read", "refused"), (name, line)
    assert line["seconds"] < 10 and line["length"] < 6000, (name, line)
    assert "too little memory" not in line["message"], (name, line)
    assert all(text.isprintable() for text in line["message"].splitlines()), (name, line)


@pytest.mark.slow
def test_hostile_files_are_refused_quickly(outcomes):
    hostile = {n: x for n, x in outcomes.items() if ".damaged." not in n and n[:5] != "good."}
    assert len(hostile) > 150
    for name, line in hostile.items():
        assert_harmless(name, line)
        assert line["outcome"] == "refused", (name, line)


@pytest.mark.slow
def test_damaged_files_are_refused_or_read(outcomes):
    damaged = {n: x for n, x in outcomes.items() if ".damaged." in n}
    assert len(damaged) >= MUTATIONS
    for name, line in damaged.items():
        assert_harmless(name, line)
    for kind in ("pth", "legacy", "safetensors", "pickle"):
        assert kind == "pickle" or outcomes[f"good.{kind}"]["outcome"] == "read"
        found = [line["outcome"] for n, line in damaged.items() if n.endswith(f".{kind}")]
        assert 20 < found.count("refused") < len(found), kind  # damage in weights goes undetected
