"""Arrays, JSON, runs, buckets' listings and checkpoints made to eat memory or to do harm.

Each is refused in a moment, in one process that has little memory, in which an audit hook forbids
to run programs, to import more code, and to write elsewhere than into the cache.
"""

import json
import subprocess
import sys

import pytest

from tests.helpers import hostile_data, hostile_files
from tests.helpers.paths import ROOT

MUTATIONS = 100


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """What came of each file, by the file's name."""
    folder = tmp_path_factory.mktemp("hostile")
    hostile_data.write_data(folder)
    good = (folder / "good.npz").read_bytes()
    for i, damaged in enumerate(hostile_files.mutations(good, MUTATIONS, seed=0)):
        (folder / f"npz.damaged.{i}.npz").write_bytes(damaged)
    command = [sys.executable, "-m", "tests.helpers.hostile_reader", str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr[-2000:]
    assert {line["name"] for line in lines} == {path.name for path in folder.iterdir()}
    return {line["name"]: line for line in lines}


@pytest.mark.slow
def test_good_data_are_read(outcomes):
    good = {name: line["outcome"] for name, line in outcomes.items() if name[:5] == "good."}
    kinds = {"npz", "npy", "json", "run", "bucket", "orbax"}
    assert good == {f"good.{kind}": "read" for kind in kinds}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["npz", "npy", "json", "run", "bucket", "orbax"])
def test_hostile_data_are_refused_in_a_moment(outcomes, kind):
    found = {n: x for n, x in outcomes.items() if n.startswith(f"{kind}.") and "damaged" not in n}
    assert len(found) >= 8
    for name, line in found.items():
        assert line["seconds"] < 10 and line["length"] < 6000, (name, line)
        assert all(text.isprintable() for text in line["message"].splitlines()), (name, line)
        # A damaged line of metrics is left out, and descriptions that nobody needs are not read.
        harmless = name.startswith(("run.metrics.", "orbax."))
        assert line["outcome"] in {"refused", "read" if harmless else "refused"}, (name, line)
    if kind == "orbax":
        claims = ("a_huge_array", "a_large_array", "a_large_chunk", "nothing", "text")
        for name in claims:
            assert found[f"orbax.array.{name}"]["outcome"] == "refused"


@pytest.mark.slow
def test_damaged_arrays_are_refused_or_read(outcomes):
    damaged = [x["outcome"] for n, x in outcomes.items() if n.startswith("npz.damaged.")]
    assert set(damaged) == {"refused", "read"} and len(damaged) == MUTATIONS
