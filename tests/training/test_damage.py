"""Runs a sample of `make damage`, which damages files of runs and checks what is read then.

Each sweep is a separate process, because TensorStore may report failed reads to an event loop that
is already closed.
"""

import json
import sys

import pytest

from tests.helpers import forked
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def sweep(folder, *flags):
    """Runs a sweep and returns its reports by part."""
    command = [sys.executable, "-m", "tests.helpers.damage_sweep", f"--folder={folder}", *flags]
    done = forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return {report["part"]: report for report in map(json.loads, done.stdout.splitlines())}


def test_flipped_bits_and_damaged_files_are_detected_or_harmless(tmp_path):
    reports = sweep(tmp_path / "sweep", "--every=9973", "--limit=17")
    assert len(reports) == 4
    for report in reports.values():
        assert not report["failures"]
    for part in ("checkpoint, files", "checkpoint, bits"):
        assert reports[part]["detected"] > 4


def test_two_processes_continue_bit_identically_after_damage(tmp_path):
    (report,) = sweep(tmp_path / "sweep", "--processes=2", "--limit=3").values()
    assert report["harmless"] + report["detected"] == 3
