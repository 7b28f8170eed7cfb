"""Shares work out to processes that can be watched, stopped, and do not outlive their parent."""

import concurrent.futures
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

Job = TypeVar("Job")
Result = TypeVar("Result")

POLL_SECONDS = 0.2  # between two looks at how far the workers are

_done: Any = None  # in a worker: the counter that all share, and the wish to stop
_stop: Any = None


class Stopped(Exception):
    """Ends a job from inside when no more of it is wanted."""


def map_unordered(
    function: Callable[[Job], Result],
    jobs: Sequence[Job],
    workers: int,
    progress: Callable[[int], None],
) -> Iterator[Result]:
    """Yields `function(job)` of all jobs, in the order in which they end.

    Any exception, Ctrl-C too, ends all jobs at their next step.

    Args:
        function: importable by name; calls `count_step()` now and then.
        jobs: its arguments, which can be pickled.
        workers: the number of processes.
        progress: called a few times a second with the number of steps counted so far.
    """
    if not jobs:
        return
    context = multiprocessing.get_context("spawn")  # forks of a process with threads may hang
    done, stop = context.Value("q", 0), context.Event()
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, _begin, (done, stop))
    with pool:
        try:
            waiting = {pool.submit(function, job) for job in jobs}
            while waiting:
                ended, waiting = concurrent.futures.wait(
                    waiting, POLL_SECONDS, concurrent.futures.FIRST_COMPLETED
                )
                progress(done.value)
                for future in ended:
                    yield future.result()
        except BaseException:
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def count_step() -> None:
    """Counts a part of a job as done; raises Stopped where the rest is not wanted any more."""
    if _stop.is_set():
        raise Stopped
    with _done.get_lock():
        _done.value += 1


def _begin(done: Any, stop: Any) -> None:
    global _done, _stop
    _done, _stop = done, stop
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which says stop
    threading.Thread(target=_follow_parent, daemon=True).start()


def _follow_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)  # killed: nobody would ever call for the results
