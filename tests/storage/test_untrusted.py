import math
import time

import numpy as np
import pytest

from varjax.errors import InputError
from varjax.storage.untrusted import (
    abridged,
    bytes_on_disk,
    check_integers,
    check_name,
    check_settings,
    check_shape,
    differences,
    parse_json,
    path_inside,
    reason,
    shown,
)


def test_values_of_any_kind_are_shown_briefly():
    pairs, itself = [], []
    for _ in range(60):
        pairs = (pairs, pairs)
    itself.append(itself)
    dense = np.broadcast_to(np.float32(0), (2,) * 26)  # NumPy would print all of its elements
    start = time.monotonic()
    for value, text in {
        "x": "'x'",
        2.5: "2.5",
        True: "True",
        None: "None",
        (1, "a"): "(1, 'a')",
        (3,): "(3,)",
        tuple(range(9)): "(0, 1, 2, 3, 4, 5, …)",
        -(2**70): "about -10^21",
        2**100000: "about 10^30103",
        b"\x1b[2J" * 50: repr(b"\x1b[2J" * 20) + " … (200 in all)",
    }.items():
        assert shown(value) == text
    text = shown([pairs, dense, {}, itself])  # outside the assertion, which may print all of it
    assert text == "[a tuple, a ndarray, a dict, a list]"
    assert time.monotonic() - start < 1
    assert len(shown(["x" * 1000] * 1000)) < 1000


def test_shapes_that_numpy_cannot_hold_are_refused():
    for shape in ((), [0, 3], (1,) * 64, (2**40, 0)):
        assert np.zeros(check_shape(shape, 4), np.float32).shape == tuple(shape)
    for shape in ((1,) * 65, ("4",), (2.0,), (-1,), (True,), (2**2000,), 3, "12", np.ones(2, int)):
        with pytest.raises(InputError, match="size or stride"):
            check_shape(shape, 4)
    for shape in ((2**47, 2**47, 0), (2**31, 2**30)):
        assert check_integers(shape) == shape
        with pytest.raises(InputError, match="larger than any memory"):
            check_shape(shape, 4)


def test_long_and_unprintable_names_are_refused():
    assert check_name("é.weight") == "é.weight"
    for name in ("x" * 513, "\x1b[2J", "a\nb", "\u202e", 3, b"x"):
        with pytest.raises(InputError, match="name"):
            check_name(name)


def test_settings_of_implausible_size_are_refused():
    check_settings({"width": 1024, "scales": [1, 2], "a": {"b": None, "c": "x" * 999}}, "var")
    for bad in (2**70, -(2**21), math.inf, math.nan, [0] * 257, [[2**30]]):
        with pytest.raises(InputError, match=r"^var\.a\.b.* are allowed"):
            check_settings({"a": {"b": bad}}, "var")


def test_differences_name_every_path():
    a = {"leaf": {"rate": 0.5, "mode": "fast"}, "depth": 3, "new": None, "gone": 1, "x": "1," * 500}
    b = {"leaf": {"rate": 1.0, "mode": "fast"}, "depth": None, "added": "", "x": "2," * 500}
    *lines, long, added = differences(a, b, "there", "requested")
    assert [*lines, added] == [
        "leaf.rate: 0.5 there, 1.0 requested",
        "depth: 3 there, None requested",
        "gone: 1 there, absent requested",
        "added: absent there, '' requested",
    ]
    assert long.startswith("x: '1,1,") and " … there, '2,2," in long and len(long) < 400
    assert differences(a, a, "there", "requested") == []


def test_long_messages_are_truncated():
    assert abridged(["a", "b"]) == ["a", "b"]
    lines = abridged([str(i) for i in range(1000)])
    assert len(lines) == 51 and lines[-1] == "… and 950 more"
    assert reason(ValueError("bad")) == "bad"
    assert reason(ValueError("\x1b" + "x" * 1000)) == repr("\x1b" + "x" * 199)


@pytest.mark.parametrize(
    "text", [b"\xff", "", "{", "[" * 10**6, "[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65,
             str(2**64), "-" + str(2**64), "9" * 5000]
)  # fmt: skip
def test_invalid_and_implausible_json_raises_value_error(text):
    with pytest.raises(ValueError) as caught:
        parse_json(text)
    assert len(str(caught.value)) < 200


def test_json_is_parsed():
    text = '{"a": [1, -2.5, true, null, "x"], "b": {"c": 18446744073709551615}}'
    assert parse_json(text) == {"a": [1, -2.5, True, None, "x"], "b": {"c": 2**64 - 1}}
    assert parse_json("[" * 63 + "1" + "]" * 63)


@pytest.mark.parametrize("name", ["a", "a/b", "a b", "...", ".hidden", "ä/ß", "a\\b", "c:d"])
def test_names_of_files_below_a_folder_are_accepted(tmp_path, name):
    assert path_inside(tmp_path, name, "x") == tmp_path / name


@pytest.mark.parametrize(
    "name",
    ["", "/", "/a", "a/", "a//b", ".", "..", "a/..", "../a", "a/./b", "a\0", "\ud800", 5, None],
)
def test_names_that_lead_elsewhere_are_refused(tmp_path, name):
    with pytest.raises(InputError, match="the index names a file .*must be relative") as caught:
        path_inside(tmp_path, name, "the index")
    assert str(caught.value).isprintable()


def test_a_link_that_leads_out_of_the_folder_is_refused(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "out").symlink_to(tmp_path)
    (inside / "in").symlink_to(inside)
    assert path_inside(inside, "in/a", "x") == inside / "in/a"
    with pytest.raises(InputError, match="is a link that leads out of .*inside"):
        path_inside(inside, "out/a", "x")


def test_a_linked_file_counts_as_its_target(tmp_path):
    """Snapshots of the Hugging Face Hub consist of links and would otherwise look damaged."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot/d").mkdir(parents=True)
    (tmp_path / "blobs/x").write_bytes(bytes(5000))
    (tmp_path / "snapshot/d/x").symlink_to(tmp_path / "blobs/x")
    (tmp_path / "snapshot/gone").symlink_to(tmp_path / "nothing")
    assert bytes_on_disk(tmp_path / "snapshot") == 5000
