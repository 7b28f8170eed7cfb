import argparse

import jax
import pytest

from varjax.core import distributed
from varjax.core.distributed import add_process_flags, connect_by_flags
from varjax.core.errors import InputError


def parse(text):
    parser = argparse.ArgumentParser()
    add_process_flags(parser)
    return parser.parse_args(text.split())


@pytest.fixture
def connected(monkeypatch):
    """The arguments of every `jax.distributed.initialize`, which does nothing."""
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *numbers, **_: calls.append(numbers))
    return calls


def test_without_flags_a_process_is_the_only_one(connected):
    assert connect_by_flags(parse("")) == (0, 1)
    assert connected == []


def test_flags_reach_jax(connected):
    connect_by_flags(parse("--distributed"))
    connect_by_flags(parse("--coordinator=host:7777 --processes=3 --process=2"))
    assert connected == [(None, None, None), ("host:7777", 3, 2)]


def test_work_is_shared_out_without_connecting(connected):
    flags = parse("--processes=8 --process=7")
    assert connect_by_flags(flags, communicate=False) == (7, 8)
    assert connected == []
    with pytest.raises(InputError, match="--coordinator missing"):
        connect_by_flags(flags)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--processes=2", "--coordinator and --process missing"),
        ("--coordinator=host:1", "--processes and --process missing"),
        ("--coordinator=host --processes=2 --process=1", "--coordinator=host is not HOST:PORT"),
        ("--coordinator=a:1 --processes=2 --process=2", "--process=2 is none of the 2"),
    ],
)
def test_flags_that_do_not_fit_are_refused(connected, text, message):
    with pytest.raises(InputError, match=message):
        connect_by_flags(parse(text))
    assert connected == []


def test_where_no_cluster_is_found_the_flags_are_told(monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="no cluster was found.*--coordinator=HOST:PORT"):
        connect_by_flags(parse("--distributed"))


def test_one_process_agrees_with_itself():
    assert distributed.gather_json({"a": 1}) == [{"a": 1}]
    assert distributed.on_first_process(lambda: 3) == 3
