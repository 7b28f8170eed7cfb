"""Threads and worker processes that read examples ahead, or work through a list of jobs."""

import atexit
import collections
import contextlib
import dataclasses
import inspect
import multiprocessing
import os
import pickle
import queue
import signal
import traceback
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from typing import Any

from varjax.errors import InputError

MAX_DEFAULT_THREADS = 16
CHUNKS_PER_THREAD = 4  # of a batch, so that all threads finish at about the same time
Worker = tuple[Any, Connection]  # a process, and this end of the pipe to it


@dataclasses.dataclass(frozen=True)
class ReadOptions:
    """Sets the threads and processes that read examples; the examples do not depend on them.

    Attributes:
        threads: number of threads; 0 for one per CPU that this process may use, at most 16.
        workers: number of processes that decode and augment instead of the threads; 0 for none.
            They are worth their overhead only if augmentation holds the GIL.
    """

    threads: int = 0
    workers: int = 0

    def __post_init__(self):
        for name in ("threads", "workers"):
            if (value := getattr(self, name)) < 0:
                raise InputError(f"reading.{name} is {value}, but must be 0 or more")


def available_cpus() -> int:
    """Counts the CPUs that this process may use, which may be fewer than the machine has."""
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
            subject: first argument of every function; pickled for worker processes.
            options: numbers of threads and worker processes.
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
        """Computes `join([function(subject, chunk of items, *arguments), …])` in the background.

        Args:
            join: function that joins the chunks' results, in order.
            function: importable by name where there are worker processes.
            items: arguments that are split into chunks.
            arguments: further arguments of `function`.
        """
        size = -(-len(items) // (self._count * CHUNKS_PER_THREAD))
        chunks = [
            self._threads.submit(self._call, function, items[i : i + size], *arguments)
            for i in range(0, len(items), size)
        ]

        def joined() -> Any:
            results = [chunk.result() for chunk in chunks]
            chunks.clear()  # frees memory before they are joined
            return join(results)

        return PendingResult(self._joiner.submit(joined), chunks)

    def map_ahead(
        self,
        join: Callable[[list], Any],
        function: Callable,
        batches: Iterable[Sequence],
        *arguments: Any,
        ahead: int,
    ) -> Iterator[Any]:
        """Yields the results of `submit` for each batch of items, while later ones are computed.

        Args:
            join: function that joins the chunks' results, in order.
            function: importable by name where there are worker processes.
            batches: items of each call.
            arguments: further arguments of `function`.
            ahead: number of batches to compute meanwhile.
        """
        pending: collections.deque[PendingResult] = collections.deque()
        try:
            for items in batches:
                pending.append(self.submit(join, function, items, *arguments))
                if len(pending) > ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for result in pending:
                result.cancel()


@dataclasses.dataclass(frozen=True)
class PendingResult:
    """A pending result of `ReaderPool.submit`."""

    joined: Future
    chunks: list[Future]

    def result(self) -> Any:
        """Waits for the result; raises the function's exception."""
        return self.joined.result()

    def cancel(self) -> None:
        """Cancels everything that has not started."""
        for future in (*self.chunks, self.joined):
            future.cancel()


class WorkerProcesses:
    """Processes that call functions of a copy of `subject`, and end with this object or process.

    Signals for the run do not reach them. They are spawned, because a fork would copy JAX's threads
    in an undefined state. A dead process raises ChildProcessError, or InputError if it ended with
    an error, as in a script without a `__main__` guard.

        with contextlib.closing(WorkerProcesses(encoding, 16)) as processes:
            for step in processes.stream(write_record_shard, shards):
                bar.update()

    Raises InputError if `subject` cannot be pickled.
    """

    def __init__(self, subject: Any, count: int):
        """Starts the processes.

        Args:
            subject: first argument of every function.
            count: number of worker processes.
        """
        try:
            subject = pickle.dumps(subject)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise InputError(
                f"the data cannot be sent to worker processes ({error}); define its classes in an "
                "installed module, or read in threads: reading.workers=0"
            ) from error
        context = multiprocessing.get_context("spawn")
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        processes = []
        self.close = weakref.finalize(self, _kill, processes)  # even if they are busy
        self.close.atexit = False
        atexit.register(self.close)  # runs before multiprocessing waits for its children
        resource_tracker.ensure_running()  # starting it later would unblock the signals
        # New processes inherit blocked signals from their first instruction on.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            for _ in range(count):
                ours, theirs = context.Pipe()
                process = context.Process(target=_serve, args=(theirs, subject), daemon=True)
                process.start()
                theirs.close()  # so that reading ends if the process dies
                processes.append(process)
                self._idle.put((process, ours))
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def call(self, function: Callable, *arguments: Any) -> Any:
        """Returns `function(subject, *arguments)`, computed by the next idle process.

        Raises the function's exception, with a note of its traceback.
        """
        worker = self._idle.get()
        try:
            _send(worker, function, arguments)
            kind, answer = _receive(worker)
        finally:
            self._idle.put(worker)
        if kind == "raise":
            raise answer
        return answer

    def stream(self, function: Callable, jobs: Iterable) -> Iterator[Any]:
        """Yields the items of the generators `function(subject, job)` of all jobs, as they come.

        Raises the exception of any of them. Closes the processes if it ends early.
        """
        left, busy = collections.deque(jobs), {}
        try:
            while left or busy:
                while left and not self._idle.empty():
                    worker = self._idle.get()
                    _send(worker, function, (left.popleft(),))
                    busy[worker[1]] = worker
                for connection in wait(list(busy)):
                    kind, item = _receive(busy[connection])
                    if kind == "raise":
                        raise item
                    if kind == "yield":
                        yield item
                    else:
                        self._idle.put(busy.pop(connection))
        finally:
            if busy:
                self.close()


def _send(worker: Worker, function: Callable, arguments: Sequence) -> None:
    with contextlib.suppress(OSError):  # `_receive` reports a dead process
        worker[1].send((function, arguments))


def _receive(worker: Worker) -> tuple[str, Any]:
    """Returns ("yield", "return" or "raise", what)."""
    process, connection = worker
    try:
        return connection.recv()
    except (EOFError, OSError) as error:
        process.join(1)
        if process.exitcode == 1:  # an exception outside of jobs, whose exceptions are sent
            raise InputError(
                "a worker process ended with the error above. If it is in your script, put the "
                'code that starts workers under `if __name__ == "__main__":`, because each worker '
                "imports the script"
            ) from error
        raise ChildProcessError(
            f"a worker process died (exit code {process.exitcode}; -9 often means that memory ran "
            "out: try fewer workers)"
        ) from error


def _serve(connection: Connection, subject: Any) -> None:
    try:
        while True:
            function, arguments = connection.recv()
            try:
                if isinstance(subject, bytes):
                    subject = pickle.loads(subject)
                kind, answer = "return", function(subject, *arguments)
                if inspect.isgenerator(answer):
                    for item in answer:
                        connection.send(("yield", item))
                    answer = None
            except Exception as error:
                error.add_note(f"in a worker process:\n{traceback.format_exc()}")
                kind, answer = "raise", error
            connection.send((kind, answer))
    except (EOFError, OSError):  # the run is over
        pass


def _kill(processes: list) -> None:
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
