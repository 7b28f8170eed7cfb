"""Tests fault injection, and that commands with faults end as usual or say why and can continue."""

import errno
import json
import os
import shutil
import subprocess
import sys

import pytest

from tests.helpers.faults import COMPILER, Faults, path_pattern
from tests.helpers.paths import ROOT

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs a C compiler: cc")

# Executes each line of its input, and prints the errno; 0 on success.
OPERATOR = """
import os, sys
for line in sys.stdin:
    try:
        exec(line)
        print(0, flush=True)
    except OSError as error:
        print(error.errno, flush=True)
"""


class Operator:
    """Executes lines of Python in a process whose file operations can fail."""

    def __init__(self, faults, folder):
        self._process = subprocess.Popen(
            [sys.executable, "-c", OPERATOR],
            env=os.environ | faults.environment(),
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, line):
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())

    def close(self):
        with self._process:
            self._process.stdin.close()


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """Returns the folder of the fault-injection library, which is compiled once."""
    folder = tmp_path_factory.mktemp("library")
    Faults(folder, [])
    return folder


@pytest.fixture
def disturbed(tmp_path, library):
    """Yields (faults for the folder "run", an Operator in its parent folder)."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "a").write_text("text")
    shutil.copy(library / "faults.so", tmp_path)
    faults = Faults(tmp_path, [tmp_path / "run"])
    operator = Operator(faults, tmp_path)
    yield faults, operator
    operator.close()


CALLS = {
    "write": "open('run/w', 'wb', buffering=0).write(b'1')",
    "fsync": "os.fsync(os.open('run/a', os.O_RDONLY))",
    "rename": "os.rename('run/a', 'run/a')",
    "open": "os.close(os.open('run/a', os.O_RDONLY))",
    "create": "open('run/c', 'w').close()",
    "read": "os.read(os.open('run/a', os.O_RDONLY), 3)",
    "stat": "os.stat('run/a')",
    "mkdir": "os.mkdir('run/d'); os.rmdir('run/d')",
    "unlink": "open('run/e', 'w').close(); os.unlink('run/e')",
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_fails_only_where_and_when_requested(disturbed, tmp_path, call):
    faults, operator = disturbed
    elsewhere = CALLS[call].replace("run/", "")
    (tmp_path / "a").write_text("text")
    assert operator(CALLS[call]) == 0
    faults.arm([call], errno.EIO, first=1, count=1)
    assert [operator(elsewhere), operator(CALLS[call])] == [0, 0]
    assert operator(CALLS[call]) == errno.EIO
    assert operator(CALLS[call]) == 0
    faults.arm([call], errno.ESTALE, pattern=f"{tmp_path}/run/*")
    assert [operator(CALLS[call]), operator(CALLS[call])] == 2 * [errno.ESTALE]
    faults.disarm()
    assert operator(CALLS[call]) == 0
    assert {c for c, _ in faults.logged("fail")} == {call}


def test_a_full_disk_first_accepts_half_of_a_write(disturbed, tmp_path):
    faults, operator = disturbed
    faults.arm(["write"], errno.ENOSPC, count=1)
    assert operator("file = open('run/w', 'wb', buffering=0); assert file.write(b'1234') == 2") == 0
    assert operator("file.write(b'34')") == errno.ENOSPC
    assert operator("file.write(b'34')") == 0
    assert (tmp_path / "run" / "w").read_text() == "1234"


def test_path_patterns_match_files_of_one_kind(disturbed, tmp_path):
    faults, operator = disturbed
    faults.record(True)
    for name in ("12.x", "345.x", ".config.json.0a1b2c3d-77-00112233.tmp"):
        assert operator(f"open('run/{name}', 'w').close()") == 0
    made = [path_pattern(path) for call, path in faults.logged("pass") if call == "create"]
    assert [path.rpartition("/")[2] for path in made] == ["*.x", "*.x", ".config.json.*-*-*.tmp"]
    faults.record(False)
    faults.arm(["create"], errno.EMFILE, pattern=path_pattern(str(tmp_path / "run" / "8.x")))
    assert operator("open('run/9.x', 'w')") == errno.EMFILE
    assert operator("open('run/x.8', 'w')") == 0


@pytest.mark.slow
def test_a_run_with_faults_ends_as_usual_or_can_continue(tmp_path):
    command = [sys.executable, "-m", "tests.helpers.fault_sweep", f"--folder={tmp_path / 'sweep'}"]
    command += ["--cases=4", "--seed=0", "train"]
    swept = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert swept.returncode == 0, swept.stdout[-4000:] + swept.stderr[-4000:]
    report = json.loads(swept.stdout.splitlines()[-1])
    assert report["cases"] == report["reached"] == 4
