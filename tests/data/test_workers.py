import os
import signal
import subprocess
import sys
import time
from contextlib import closing

import pytest

from tests.helpers.paths import ROOT
from varjax.data import workers
from varjax.data.workers import ReaderPool, ReadOptions, WorkerProcesses


def numbers(subject, job):
    for i in range(job):
        yield subject, job, i


def sleep(subject, job):
    yield os.getpid()
    time.sleep(job)


def divide(subject, job):
    yield 1 / job


def test_jobs_are_distributed_and_their_results_are_streamed():
    with closing(WorkerProcesses("a", 2)) as processes:
        # One worker sleeps, so the other one gets the other job.
        stream = processes.stream(sleep, [60, 0])
        sleeper, other = next(stream), next(stream)
        assert sleeper != other
        begin = time.monotonic()
    assert time.monotonic() - begin < 10  # closing does not wait for busy workers
    for pid in (sleeper, other):
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.fixture(scope="module")
def processes():
    with closing(WorkerProcesses("a", 2)) as processes:
        yield processes


def test_every_job_is_done_once(processes):
    jobs = [3, 0, 5, 1, 200]
    found = list(processes.stream(numbers, jobs))
    assert sorted(found) == sorted(("a", job, i) for job in jobs for i in range(job))
    assert list(processes.stream(numbers, [])) == []
    assert len(list(processes.stream(numbers, [7]))) == 7  # all workers are free again


def test_an_error_keeps_its_type_and_traceback():
    with closing(WorkerProcesses("a", 1)) as processes:
        with pytest.raises(ZeroDivisionError) as raised:
            list(processes.stream(divide, [1, 0]))
    assert "yield 1 / job" in "".join(raised.value.__notes__)


def test_a_killed_worker_ends_a_stream():
    with closing(WorkerProcesses("a", 1)) as processes:
        stream = processes.stream(sleep, [60])
        os.kill(next(stream), signal.SIGKILL)
        with pytest.raises(ChildProcessError, match="exit code -9"):
            next(stream)


UNGUARDED = """
from varjax.data.workers import WorkerProcesses
print(WorkerProcesses("a", 1).call(str.upper))
"""


def test_a_script_without_a_main_guard_gets_advice(tmp_path):
    (tmp_path / "script.py").write_text(UNGUARDED)
    command = [sys.executable, str(tmp_path / "script.py")]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert 'put the code that starts workers under `if __name__ == "__main__":`' in done.stderr


def test_by_default_there_is_one_thread_per_available_cpu(monkeypatch):
    """A cluster may give a job one of a machine's 64 CPUs."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {17}, raising=False)
    pool, seen = ReaderPool("subject", ReadOptions()), []
    pool.submit(seen.extend, lambda _, chunk: chunk, range(8)).result()
    assert workers.available_cpus() == pool._threads._max_workers == 1
    assert seen == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]  # four chunks per thread
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert workers.available_cpus() == 64
