import contextlib
import threading

import pytest

from varjax.runtime import first_call
from varjax.runtime.first_call import FirstCall, announce_compilation


def test_only_the_first_call_is_in_the_context():
    entered = []

    @contextlib.contextmanager
    def context():
        entered.append("begin")
        yield
        entered.append("end")

    call = FirstCall(lambda x: (entered.append(x), x)[1], context)
    assert [call(1), call(2)] == [1, 2]
    assert entered == ["begin", 1, "end", 2]


@pytest.fixture
def said(monkeypatch):
    """Returns the printed lines, and an event that the first of them sets."""
    lines, event = [], threading.Event()
    monkeypatch.setattr(first_call, "say", lambda text: (lines.append(text), event.set()))
    return lines, event


def test_a_long_compilation_is_announced_while_it_lasts(said, monkeypatch):
    lines, event = said
    monkeypatch.setattr(first_call, "SILENT_SECONDS", 0.01)
    with announce_compilation("the sampler"):
        assert event.wait(60)
        assert lines == ["compiling the sampler …"]
    assert lines[1:] == ["compiled the sampler in 0 s"]


def test_a_failed_compilation_is_not_reported_as_compiled(said, monkeypatch):
    lines, event = said
    monkeypatch.setattr(first_call, "SILENT_SECONDS", 0.01)
    with pytest.raises(MemoryError), announce_compilation("the sampler"):
        assert event.wait(60)
        raise MemoryError
    assert lines == ["compiling the sampler …"]


def test_cached_programs_and_other_processes_print_nothing(said, monkeypatch):
    lines, _ = said
    threads = threading.active_count()
    with announce_compilation("the sampler"):
        pass
    assert threading.active_count() == threads
    monkeypatch.setattr(first_call, "SILENT_SECONDS", 0.0)
    monkeypatch.setattr(first_call.jax, "process_index", lambda: 1)
    with announce_compilation("the sampler"):
        assert threading.active_count() == threads
    assert not lines
