import pytest

from varjax.runtime.messages import duration


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
def test_durations_have_a_unit_that_suits_them(seconds, text):
    assert duration(seconds) == text
