"""A sample of `make damage`: files of runs damaged in every way, and what is read then.

In processes of their own, for TensorStore may report a failed read when its event loop is closed.
"""

import json
import sys

import pytest

from tests.helpers import forked
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def sweep(folder, *flags):
    """Returns the report of each part of the sweep."""
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


def test_two_processes_continue_after_damage_and_end_equal_to_the_bit(tmp_path):
    (report,) = sweep(tmp_path / "sweep", "--processes=2", "--limit=3").values()
    assert report["harmless"] + report["detected"] == 3
