import argparse
import threading

import jax
import pytest

from varjax.errors import InputError, StorageError
from varjax.runtime import distributed
from varjax.runtime.distributed import add_process_flags, connect_by_flags


def parse(text):
    parser = argparse.ArgumentParser()
    add_process_flags(parser)
    return parser.parse_args(text.split())


@pytest.fixture
def connected(monkeypatch):
    """Records the arguments of `jax.distributed.initialize`, and makes it do nothing."""
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


def test_work_is_divided_without_connecting(connected):
    flags = parse("--processes=8 --process=7")
    assert connect_by_flags(flags, communicate=False) == (7, 8)
    assert connected == []
    with pytest.raises(InputError, match="--coordinator missing"):
        connect_by_flags(flags)


def test_work_is_divided_in_a_cluster_without_connecting(connected, monkeypatch):
    """The other processes need not run, because only connected ones wait for each other."""
    flags, options = parse("--distributed"), {}
    monkeypatch.setattr(jax.config, "update", options.__setitem__)
    with pytest.raises(InputError, match="no cluster was found; --distributed alone works with"):
        connect_by_flags(flags, communicate=False)
    variables = ("JOB_ID", 7), ("STEP_NODELIST", "n1"), ("NTASKS", 8), ("PROCID", 5), ("LOCALID", 1)
    for name, value in variables:
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    assert connect_by_flags(flags, communicate=False) == (5, 8)
    assert options == {"jax_cuda_visible_devices": "1", "jax_rocm_visible_devices": "1"}
    monkeypatch.setenv("JAX_LOCAL_DEVICE_IDS", "2,3")
    connect_by_flags(flags, communicate=False)
    assert options["jax_cuda_visible_devices"] == "2,3"
    monkeypatch.delattr("jax._src.clusters.ClusterEnv._cluster_types")
    with pytest.raises(InputError, match="version of JAX .*--processes=COUNT and --process=NUMBER"):
        connect_by_flags(flags, communicate=False)
    assert connected == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--processes=2", "--coordinator and --process missing"),
        ("--coordinator=host:1", "--processes and --process missing"),
        ("--coordinator=host --processes=2 --process=1", "--coordinator=host is not HOST:PORT"),
        ("--coordinator=host:99999 --processes=2 --process=1", "host:99999 is not HOST:PORT"),
        ("--coordinator=host:² --processes=2 --process=1", "host:² is not HOST:PORT"),
        ("--coordinator=a:1 --processes=2 --process=2", "--process=2 must be from 0 to 1"),
    ],
)
def test_invalid_flags_are_refused(connected, text, message):
    with pytest.raises(InputError, match=message):
        connect_by_flags(parse(text))
    assert connected == []


def test_the_error_names_the_flags_if_no_cluster_is_found(monkeypatch):
    def initialize(*_, **__):
        raise ValueError("coordinator_address should be defined")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(InputError, match="no cluster was found.*--coordinator=HOST:PORT"):
        connect_by_flags(parse("--distributed"))


def test_gathering_works_in_a_single_process():
    assert distributed.gather_json({"a": 1}) == [{"a": 1}]
    assert distributed.on_first_process(lambda: 3) == 3
    assert distributed.on_all_processes(lambda: 3) == [3]


def test_an_error_in_any_process_is_raised_in_all(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    there = {"value": 4}
    monkeypatch.setattr(distributed, "gather_json", lambda mine: [mine, there])
    assert distributed.on_all_processes(lambda: 3) == [3, 4]
    there = {"kind": "StorageError", "error": "the disk is full"}
    with pytest.raises(StorageError, match="process 1: the disk is full"):
        distributed.on_all_processes(lambda: 3)


def test_check_shared_file_waits_for_a_late_file(tmp_path):
    timer = threading.Timer(0.3, (tmp_path / "a").touch)
    timer.start()
    distributed.check_shared_file(tmp_path / "a")
    timer.join()


def test_a_file_that_one_process_never_sees_is_an_error_in_all(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "NETWORK_SECONDS", 0.0)
    monkeypatch.setattr(distributed, "gather_json", lambda mine: [True, mine])
    with pytest.raises(InputError, match="a, which process 0 wrote, is not visible to process 1;"):
        distributed.check_shared_file(tmp_path / "a")
