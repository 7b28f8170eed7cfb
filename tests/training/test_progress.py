import errno
import io
import sys

import pytest
from tqdm import tqdm

from varjax.training.progress import ProgressReporter


class Full(io.StringIO):
    """A stream whose writes fail, like a file on a full disk."""

    def __init__(self, terminal):
        super().__init__()
        self.isatty = lambda: terminal
        self.attempts = 0

    def write(self, text):
        self.attempts += 1
        raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("terminal", [False, True])
def test_an_unwritable_stderr_does_not_end_a_run(monkeypatch, terminal):
    """For example, `train.py 2> FILE` on a full disk."""
    full = Full(terminal)
    monkeypatch.setattr(sys, "stderr", full)
    with ProgressReporter(0, 10) as progress:
        progress.say("a line")
        progress.show(10, {"loss": 1.5})
    monkeypatch.undo()
    assert full.attempts


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_and_the_bar_reach_stderr(monkeypatch, terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressReporter(0, 10) as progress:
        progress.say("a line")
        progress.show(10, {"loss": 1.5})
    monkeypatch.undo()
    said = stream.getvalue()
    assert "a line\n" in said
    assert ("10/10" in said) if terminal else ("step 10/10: loss 1.5" in said)


def test_lines_written_by_tqdm_clear_the_bar(monkeypatch):
    """For example, those about broken images."""
    stream = io.StringIO()
    stream.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", stream)
    with ProgressReporter(0, 10):
        tqdm.write("skipped: x", file=sys.stderr)
    monkeypatch.undo()
    assert "\rskipped: x\n" in stream.getvalue()
