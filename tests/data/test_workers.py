import os

from varjax.data import workers
from varjax.data.workers import ReaderPool, ReadOptions


def test_there_are_as_many_threads_as_cpus_that_may_be_used(monkeypatch):
    """Of a machine's 64 a cluster may give a job one."""
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {17}, raising=False)
    pool, seen = ReaderPool("subject", ReadOptions()), []
    pool.submit(seen.extend, lambda _, chunk: chunk, range(8)).result()
    assert workers.available_cpus() == pool._threads._max_workers == 1
    assert seen == [range(0, 2), range(2, 4), range(4, 6), range(6, 8)]  # four chunks a thread
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert workers.available_cpus() == 64
