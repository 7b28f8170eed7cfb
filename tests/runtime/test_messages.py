import io
import sys

import pytest
from tqdm import tqdm

from varjax.runtime.messages import duration, hide_bars, say


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.3, "0 s"),
        (99, "99 s"),
        (100, "2 min"),
        (5000, "83 min"),
        (7200, "2.0 h"),
        (2e5, "2.3 days"),
    ],
)
def test_durations_have_a_suitable_unit(seconds, text):
    assert duration(seconds) == text


def test_a_hidden_bar_reappears_after_the_next_line(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with tqdm(total=9, file=stream, desc="a bar", ascii=True):
        say("one")
        assert "a bar" in stream.getvalue().rpartition("\n")[2]  # below the line
        hide_bars()
        assert not stream.getvalue().split("\r")[-1]  # the cursor is at the start of an empty line
        assert not stream.getvalue().split("\r")[-2].strip()
        say("two")
        assert "a bar" in stream.getvalue().rpartition("two\n")[2]
