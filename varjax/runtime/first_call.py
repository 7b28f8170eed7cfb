"""Shows that a program is being compiled, which takes minutes for a large model."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from typing import Generic, ParamSpec, TypeVar

import jax

from varjax.runtime.messages import duration, hide_bars, say

SILENT_SECONDS = 1.0  # a compilation that takes less is not worth a line
P = ParamSpec("P")
R = TypeVar("R")


class FirstCall(Generic[P, R]):
    """Calls a jitted function; the first call, which compiles it, is made in a context.

        step = FirstCall(jax.jit(step), lambda: announce_compilation("the training step"))

    Args:
        function: jitted function to call.
        context: function that makes the context of the first call.
    """

    def __init__(
        self,
        function: Callable[P, R],
        context: Callable[[], contextlib.AbstractContextManager[None]],
    ):
        self._function, self._context = function, context
        self._called = False

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R:
        if self._called:
            return self._function(*args, **kwargs)
        self._called = True
        with self._context():
            return self._function(*args, **kwargs)


@contextlib.contextmanager
def announce_compilation(program: str) -> Iterator[None]:
    """Prints "compiling PROGRAM …" and how long it took, unless the code inside is quick.

    Of several processes, only the first prints.

    Args:
        program: name of what is compiled inside, such as "the sampler".
    """
    if jax.process_index():
        yield
        return
    announced, begin = threading.Event(), time.monotonic()

    def announce() -> None:
        announced.set()
        say(f"compiling {program} …")
        hide_bars()  # a bar that stands still looks like a hang

    # A timer, because nobody knows in advance whether a program comes from the disk.
    timer = threading.Timer(SILENT_SECONDS, announce)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
    if announced.is_set():
        say(f"compiled {program} in {duration(time.monotonic() - begin)}")
