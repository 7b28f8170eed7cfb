"""Tests that hostile arrays, JSON, runs, bucket listings and checkpoints are refused quickly.

One process with a memory limit reads them all, while an audit hook forbids running programs,
importing more code, and writing outside the cache.
"""

import json
import os
import subprocess
import sys

import pytest

from tests.helpers import forked, hostile_data, hostile_files
from tests.helpers.paths import ROOT

MUTATIONS = 100


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Returns the reader's report on each file, by file name."""
    folder = tmp_path_factory.mktemp("hostile")
    hostile_data.write_data(folder)
    good = (folder / "good.npz").read_bytes()
    for i, damaged in enumerate(hostile_files.mutations(good, MUTATIONS, seed=0)):
        (folder / f"npz.damaged.{i}.npz").write_bytes(damaged)
    command = [sys.executable, "-m", "tests.helpers.hostile_reader", str(folder)]
    done = forked.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert {line["name"] for line in lines} == {path.name for path in folder.iterdir()}
    return {line["name"]: line for line in lines}


GUARDED = """
import os, pathlib, subprocess, sys
from tests.helpers.guard import ForbiddenError, Guard
target = pathlib.Path(sys.argv[1])
guard = Guard(target)
inside, outside = target / "a", target.parent / "b"
inside.write_text("x")
os.rename(inside, target / "c")
(target / "c").read_text()
pathlib.Path("/etc/hostname").exists()
guard.complete = True
for forbidden in (
    lambda: outside.write_text("x"),
    lambda: (target / "../b").touch(),
    lambda: os.rename(target / "c", outside),
    lambda: (target / "c").symlink_to(outside) or outside.mkdir(),
    lambda: os.remove(os.path.basename(__file__), dir_fd=os.open(os.path.dirname(__file__), 0)),
    lambda: subprocess.run(["true"]),
    lambda: os.system("true"),
    lambda: __import__("antigravity"),
):
    try:
        forbidden()
    except ForbiddenError:
        continue
    sys.exit("allowed")
assert len(guard.broken) == 8, guard.broken
"""


def test_the_guard_forbids_what_readers_never_need_to_do(tmp_path):
    (tmp_path / "target").mkdir()
    (tmp_path / "guarded.py").write_text(GUARDED)
    command = [sys.executable, str(tmp_path / "guarded.py"), str(tmp_path / "target")]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"target", "guarded.py"}


@pytest.mark.slow
def test_good_data_are_read(outcomes):
    good = {name: line["outcome"] for name, line in outcomes.items() if name[:5] == "good."}
    kinds = {"npz", "json", "run", "bucket", "orbax"}
    assert good == {f"good.{kind}": "read" for kind in kinds}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "json", "run", "bucket", "orbax"])
def test_hostile_data_are_refused_quickly(outcomes, kind):
    found = {n: x for n, x in outcomes.items() if n.startswith(f"{kind}.") and "damaged" not in n}
    assert len(found) >= 8
    for name, line in found.items():
        assert line["seconds"] < 10 and line["length"] < 6000, (name, line)
        assert all(text.isprintable() for text in line["message"].splitlines()), (name, line)
        # Damaged lines of metrics are skipped, and the names of handlers are not used.
        read = name.startswith(("run.metrics.", "orbax.handlers."))
        allowed = {"read"} if read else {"refused"}
        assert line["outcome"] in allowed | ({"read"} if "a_little" in name else set()), name


@pytest.mark.slow
def test_damaged_arrays_are_refused_or_read(outcomes):
    damaged = [x["outcome"] for n, x in outcomes.items() if n.startswith("npz.damaged.")]
    assert set(damaged) == {"refused", "read"} and len(damaged) == MUTATIONS
