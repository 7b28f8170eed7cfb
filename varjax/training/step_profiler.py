"""Records what devices and host do during some steps, for xprof and TensorBoard."""

import contextlib
import pathlib
import re
import threading
from collections.abc import Iterator
from typing import Any

import jax

from varjax.errors import InputError
from varjax.runtime.messages import say
from varjax.storage.buckets import LocalMirror

CLOSE_SECONDS = 5.0  # limit on how long the end of a run waits for the upload of a trace


class StepProfiler:
    """Traces steps START to STOP of this start of a run, into <run_dir>/profile.

        with StepProfiler("10:13", run_dir) as profiler:
            for step in steps:
                profiler.begin_step()
                state = train_step(state)
                profiler.end_step(state)

    Each process writes its own trace. `tensorboard --logdir=RUN/profile` shows them, with
    tensorboard and xprof installed. If a trace cannot be written, the run reports it and continues.

    Args:
        steps: "START:STOP", counted from 1 at this start of the run, inclusive; "" for none. The
            first step compiles the program, so START should be above 2.
        run_dir: directory of the run.

    Raises:
        InputError: `steps` is not START:STOP with 1 <= START <= STOP.
    """

    def __init__(self, steps: str, run_dir: pathlib.Path):
        match = re.fullmatch(r"(\d+):(\d+)", steps)
        self._first, self._last = (int(match[1]), int(match[2])) if match else (0, 0)
        if steps and not 1 <= self._first <= self._last:
            raise InputError(
                f"profile={steps}: must be START:STOP, steps counted from 1, such as 10:13"
            )
        self._folder, self._step, self._tracing = run_dir / "profile", 0, False
        self._upload: threading.Thread | None = None

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *_: Any) -> None:
        self._stop()
        if self._upload is not None:
            self._upload.join(CLOSE_SECONDS)

    def begin_step(self) -> None:
        """Starts the trace before its first step."""
        self._step += 1
        if self._step == self._first:
            with self._reporting_failure():
                self._trace = LocalMirror(self._folder)
                jax.profiler.start_trace(str(self._trace.folder))
                self._tracing = True

    def end_step(self, result: Any) -> None:
        """Ends the trace after its last step, once `result` is computed."""
        if self._step == self._last and self._tracing:
            jax.block_until_ready(result)
            self._stop()

    def _stop(self) -> None:
        if self._tracing:
            self._tracing = False
            with self._reporting_failure():
                jax.profiler.stop_trace()
                if jax.process_index() == 0:
                    say(
                        f"steps {self._first} to {self._last} are traced; to see them: pip install "
                        f"tensorboard xprof; tensorboard --logdir={self._folder}"
                    )
            self._upload = threading.Thread(target=self._close_trace, daemon=True)
            self._upload.start()  # to a bucket, this may take long

    def _close_trace(self) -> None:
        with self._reporting_failure():
            self._trace.close()

    @contextlib.contextmanager
    def _reporting_failure(self) -> Iterator[None]:
        """Turns any error into a line on stderr, because a trace must not stop the run."""
        try:
            yield
        except Exception as error:
            say(f"note: no trace of the steps: {error}"[:500])
