"""Reads examples ahead, in threads and worker processes."""

import atexit
import dataclasses
import multiprocessing
import os
import pickle
import queue
import signal
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from typing import Any

from varjax.core.errors import InputError

MAX_DEFAULT_THREADS = 16
CHUNKS_PER_THREAD = 4  # of a batch, so that all threads end at about the same time


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """How examples are read; which examples does not depend on it.

    Attributes:
        threads: 0 is one for each CPU that this process may use, at most 16.
        workers: processes that decode and augment instead of the threads; 0 is none. They are worth
            their start and their copies only where augmentation holds Python's lock.
    """

    threads: int = 0
    workers: int = 0

    def __post_init__(self):
        for name in ("threads", "workers"):
            if (value := getattr(self, name)) < 0:
                raise InputError(f"reading.{name} is {value}, but must be 0 or more")


def available_cpus() -> int:
    """Counts the CPUs that this process may use: a cluster seldom gives a job all of a machine."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class ReaderPool:
    """Calls functions of one object in threads, or in worker processes that hold a copy of it.

    pool = ReaderPool(stream, ReadOptions(threads=8))
    pending = pool.submit(join, ExampleStream.train, range(256))
    batch = pending.result()
    """

    def __init__(self, subject: Any, options: ReadOptions):
        """Starts the threads or processes.

        Args:
            subject: the first argument of every function; pickled for worker processes.
            options: how many of which.
        """
        cpus = min(available_cpus(), MAX_DEFAULT_THREADS)
        self._count = options.workers or options.threads or cpus
        self._call: Callable[..., Any] = lambda f, *arguments: f(subject, *arguments)
        if options.workers:
            self._call = WorkerProcesses(subject, options.workers).call
        self._threads = ThreadPoolExecutor(self._count, "read")
        self._joiner = ThreadPoolExecutor(1, "join")

    def submit(
        self, join: Callable[[list], Any], function: Callable, items: Sequence, *arguments: Any
    ) -> "PendingResult":
        """Starts `join([function(subject, chunk of items, *arguments), …])` in the background.

        Args:
            join: puts the chunks' results together, in order.
            function: importable by name where there are worker processes.
            items: split into chunks.
            arguments: further ones of `function`.
        """
        size = -(-len(items) // (self._count * CHUNKS_PER_THREAD))
        chunks = [
            self._threads.submit(self._call, function, items[i : i + size], *arguments)
            for i in range(0, len(items), size)
        ]

        def joined() -> Any:
            results = [chunk.result() for chunk in chunks]
            chunks.clear()  # or else they would stay in memory beside what they make together
            return join(results)

        return PendingResult(self._joiner.submit(joined), chunks)


@dataclasses.dataclass(frozen=True)
class PendingResult:
    """A result in the making, by `ReaderPool.submit`."""

    joined: Future
    chunks: list[Future]

    def result(self) -> Any:
        """Waits for it; raises what the function raised."""
        return self.joined.result()

    def cancel(self) -> None:
        """Leaves undone whatever has not begun."""
        for future in (*self.chunks, self.joined):
            future.cancel()


class WorkerProcesses:
    """Processes that call functions of a copy of `subject`. They end with this object or process.

    Signals meant for the run do not reach them. Started anew rather than forked, for a fork copies
    JAX's threads in whatever state they are.

    Raises InputError where `subject` cannot be pickled.
    """

    def __init__(self, subject: Any, count: int):
        try:
            subject = pickle.dumps(subject)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"the data cannot be sent to worker processes ({error}); define its classes in an "
                "installed module, or read in threads: reading.workers=0"
            ) from error
        context = multiprocessing.get_context("spawn")
        self._idle: queue.SimpleQueue[tuple[Any, Connection]] = queue.SimpleQueue()
        processes = []
        close = weakref.finalize(self, _kill, processes)
        close.atexit = False
        atexit.register(close)  # thus before multiprocessing waits for its children
        resource_tracker.ensure_running()  # its own start would unblock the signals again
        # What is blocked here is so in the new processes, from their first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, subject), daemon=True)
                process.start()
                theirs.close()  # so that the death of the process ends what is read from it
                processes.append(process)
                self._idle.put((process, ours))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def call(self, function: Callable, *arguments: Any) -> Any:
        """Calls `function(subject, *arguments)` in the next process that is free.

        Raises what the function raises, and ChildProcessError where the process has died.
        """
        process, connection = worker = self._idle.get()
        try:
            connection.send((function, arguments))
            answer = connection.recv()
        except (EOFError, OSError) as error:
            process.join(1)
            raise ChildProcessError(
                f"a worker process that reads data died (exit code {process.exitcode}; -9 often "
                "means that memory ran out: try fewer reading.workers)"
            ) from error
        finally:
            self._idle.put(worker)
        if isinstance(answer, Exception):
            raise answer
        return answer


def _serve(connection: Connection, subject: Any) -> None:
    try:
        while True:
            function, arguments = connection.recv()
            try:
                if isinstance(subject, bytes):
                    subject = pickle.loads(subject)
                answer = function(subject, *arguments)
            except Exception as error:
                answer = error
            connection.send(answer)
    except (EOFError, OSError):  # the run is over
        pass


def _kill(processes: list) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
