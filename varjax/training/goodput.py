"""Measures what the time of a run was spent on, summed over all of its starts."""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Generic, ParamSpec, TypeVar

# restore: all of a start before its first step; lost: steps that a kill had a later start do again.
KINDS: tuple[str, ...] = ("compile", "restore", "data", "evaluate", "save", "step", "lost")
PREFIX = "goodput/"
STEPS_LOST = PREFIX + "steps_lost"
P = ParamSpec("P")
R = TypeVar("R")


class Goodput:
    """Sorts the time of a start of a run into KINDS; every moment belongs to one of them.

        goodput = Goodput()  # from here on it restores
        goodput.begin("step")
        with goodput.measure("save"):
            checkpoints.save(step, state)
        writer.write(step, goodput.metrics())

    A kill cuts off what was not yet written, which is at most the time since the last line.
    """

    def __init__(self):
        self._seconds = dict.fromkeys(KINDS, 0.0)
        self._steps_lost = 0.0
        self._kind, self._since = "restore", time.monotonic()

    def begin(self, kind: str) -> str:
        """Counts the time from now on as `kind`; returns what it was counted as before."""
        now, before = time.monotonic(), self._kind
        self._seconds[before] += now - self._since
        self._kind, self._since = kind, now
        return before

    @contextlib.contextmanager
    def measure(self, kind: str) -> Iterator[None]:
        """Counts the time inside as `kind`, and not as the kind around it."""
        before = self.begin(kind)
        try:
            yield
        finally:
            self.begin(before)

    def add(self, earlier: Mapping[str, float]) -> None:
        """Adds what earlier starts took, as `earlier_goodput` gives it."""
        for kind in KINDS:
            self._seconds[kind] += earlier.get(_name(kind), 0.0)
        self._steps_lost += earlier.get(STEPS_LOST, 0.0)

    def metrics(self) -> dict[str, float]:
        """Returns the sums so far: "goodput/KIND_seconds", "goodput/steps_lost", "goodput/share".

        The share is that of the time in steps that lasted, 0 … 1.
        """
        self.begin(self._kind)
        found = {_name(kind): seconds for kind, seconds in self._seconds.items()}
        total = sum(self._seconds.values())
        share = self._seconds["step"] / total if total else 0.0
        return found | {STEPS_LOST: self._steps_lost, PREFIX + "share": share}


def earlier_goodput(lines: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """Returns what earlier starts of a run took, of which the last may have been killed.

    Args:
        lines: lines of metrics.jsonl after the last start, in order.
        step: step that the run continues from; time spent on later ones is "lost".

    Returns:
        Sums as `Goodput.metrics` gives them; {} where no line has any.
    """
    lines = [line for line in lines if isinstance(line.get(_name("step")), int | float)]
    if not lines:
        return {}
    last = lines[-1]
    found = {name: x for name, x in last.items() if name.startswith(PREFIX)}
    lost = last["step"] - step
    if lost > 0:
        again = last[_name("step")] - _step_seconds_at(step, lines)
        found[_name("step")] -= again
        found[_name("lost")] = found.get(_name("lost"), 0.0) + again
        found[STEPS_LOST] = found.get(STEPS_LOST, 0.0) + lost
    return found


def _step_seconds_at(step: int, lines: Sequence[Mapping[str, Any]]) -> float:
    """Returns the seconds in steps when `step` was done, which is before the last line."""
    before, seconds = step, 0.0  # without a line of before: the run began there
    for line in lines:
        after, seconds_after = line["step"], line[_name("step")]
        if after > step:
            return seconds + (seconds_after - seconds) * (step - before) / (after - before)
        before, seconds = after, seconds_after
    raise AssertionError


class FirstCall(Generic[P, R]):
    """Calls a jitted function, for the first time in a context: it is compiled then.

    step = FirstCall(jax.jit(step), lambda: goodput.measure("compile"))

    Args:
        function: function that is jitted.
        context: function that makes the context; called once.
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


def _name(kind: str) -> str:
    return f"{PREFIX}{kind}_seconds"
