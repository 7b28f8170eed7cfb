import argparse
import os
import pickle
import time
import zipfile

import numpy as np
import pytest

from tests.helpers.checkpoint_files import (
    DATA,
    archive,
    entries,
    mapping,
    plain,
    refusal,
    stored,
    tensor,
)
from varjax.convert.pth.read import read_checkpoint

RNG = np.random.default_rng(0)
NAMESPACE = b"cargparse\nNamespace\n"
NEW_NAMESPACE = NAMESPACE + b")\x81"
CALLBACK = b"cpytorch_lightning.callbacks.model_checkpoint\nModelCheckpoint\n"


def test_views_match_index_arithmetic_and_stay_within_their_storage(tmp_path):
    outcomes = set()
    for _ in range(150):
        rank = RNG.integers(0, 4)
        size, stride = RNG.integers(0, 4, rank).tolist(), RNG.integers(0, 9, rank).tolist()
        offset = int(RNG.integers(0, 25))
        index = offset + sum(
            (np.arange(n) * step).reshape(-1, *[1] * (rank - axis - 1))
            for axis, (n, step) in enumerate(zip(size, stride, strict=True))
        )
        index = np.broadcast_to(index, size)
        pickled = entries(x=tensor(tuple(size), tuple(stride), offset))
        path = archive(tmp_path / "x.pth", pickled)
        inside = index.size == 0 or index.max() < 24
        outcomes.add(inside)
        if inside:
            assert np.array_equal(read_checkpoint(path)["x"], DATA[index])
        else:
            assert "elements, but its storage has 24" in refusal(path)
    assert outcomes == {True, False}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_tied_and_strided_tensors_share_memory(tmp_path, method):
    parts = entries(x=tensor((4, 6), (6, 1)), t=tensor((6, 4), (1, 6)), tail=tensor((3,), (1,), 21))
    back = read_checkpoint(archive(tmp_path / "x.pth", parts, method=method))
    assert np.array_equal(back["t"], back["x"].T) and np.array_equal(back["tail"], DATA[21:])
    assert np.shares_memory(back["t"], back["x"]) and np.shares_memory(back["tail"], back["x"])
    assert not back["x"].flags.writeable


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_and_numpy_scalars_of_a_trainer_are_read(tmp_path, protocol):
    saved = {"epoch": 3, "lr": 1e-4, "args": {"seed": None, "ok": True, "tlr": np.float64(0.1)}}
    saved |= {
        "patch_nums": (1, 2, 3),
        "n": np.int64(-7),
        "big": 2**70,
        "bytes": b"\xff",
        "set": {1},
    }
    saved |= {"same": [saved["args"]] * 2}
    path = archive(tmp_path / "x.pth", pickle.dumps(saved, protocol))
    assert read_checkpoint(path) == saved


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_namespace_of_settings_becomes_a_dict(tmp_path, protocol):
    args = argparse.Namespace(img_size=256, blr=1e-4, resume="", gpu=None, betas=(0.9, 0.95))
    args.nested = argparse.Namespace(deep=[args.betas])
    both = {"args": args, "again": args, "empty": argparse.Namespace()}
    back = read_checkpoint(archive(tmp_path / "x.pth", pickle.dumps(both, protocol)))
    assert back["args"] == vars(args) | {"nested": {"deep": [args.betas]}}
    assert back["again"] is back["args"] and back["empty"] == {}


def test_strange_namespaces_do_no_harm(tmp_path):
    names = {"__class__": "Touch", "__dict__": 3, "update": None, "__reduce__": (1, 2), "keys": 4}
    odd = NEW_NAMESPACE + plain(names) + b"b"
    itself = argparse.Namespace()
    itself.me, itself.both = itself, [itself, itself]
    pickled = entries(odd=odd, itself=plain(itself))
    back = read_checkpoint(archive(tmp_path / "x.pth", pickled))
    assert dict(back["odd"]) == names and callable(back["odd"].update)
    assert back["itself"]["me"] is back["itself"] and back["itself"]["both"][1] is back["itself"]
    # A second BUILD overwrites values of the first, as in Python's unpickler.
    twice = NEW_NAMESPACE + plain({"a": 1, "b": 2}) + b"b" + plain({"b": 3}) + b"b"
    back = read_checkpoint(archive(tmp_path / "x.pth", entries(x=twice)))
    assert back["x"] == {"a": 1, "b": 3}


def test_the_class_of_a_lightning_callback_becomes_a_string(tmp_path):
    callbacks = b"}" + CALLBACK + plain({"best_model_score": None}) + b"s"
    path = archive(tmp_path / "x.ckpt", entries(callbacks=callbacks, w=tensor((24,), (1,))))
    back = read_checkpoint(path)
    assert back["callbacks"] == {"ModelCheckpoint": {"best_model_score": None}}
    assert [type(key) for key in back["callbacks"]] == [str]
    assert np.array_equal(back["w"], DATA)


def rebuild(arguments: bytes) -> bytes:
    return b"ctorch._utils\n_rebuild_tensor\n(" + stored() + arguments + b"tR"


def test_many_copies_of_the_same_data_are_refused(tmp_path):
    """Each call of a few bytes copies a long list from the memo; two calls are allowed."""
    function, pairs = b"ccollections\nOrderedDict\nq\xf0", plain([[i, i] for i in range(60)])
    for calls, whole in ((2, True), (20000, False)):
        copies = b"](" + b"h\xf0h\xf1\x85R" * calls + b"e"
        path = archive(
            tmp_path / "x.pth", b"\x80\x02" + function + pairs + b"q\xf1" + copies + b"."
        )
        if whole:
            assert read_checkpoint(path) == [{i: i for i in range(60)}] * calls
        else:
            assert "copies the same data too often" in refusal(path)


def test_the_number_of_operations_is_limited(tmp_path, monkeypatch):
    path = archive(tmp_path / "x.pth", b"\x80\x02" + b"]" * 50 + b".")
    assert read_checkpoint(path) == []
    monkeypatch.setattr("varjax.convert.pth.unpickle.MAX_OPCODES", 50)
    assert "more than 50 operations" in refusal(path)


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", [2, 4])
def test_a_pickle_that_runs_code_is_refused_without_running_it(tmp_path, protocol):
    target = tmp_path / "touched"
    attack = pickle.dumps({"x": Touch(target)}, protocol)
    message = refusal(archive(tmp_path / "x.pth", attack))
    assert "mkdir" in message and "nothing was executed" in message and not target.exists()
    pickle.loads(attack)
    assert target.exists(), "the attack is harmless, so this test shows nothing"


@pytest.mark.parametrize(
    "body, problem",
    [
        (b"ctorch.storage\n_load_from_bytes\n", "_load_from_bytes"),
        (b"ctorch\nQInt8Storage\n", "QInt8Storage"),
        (b"cbuiltins\neval\n", "builtins.eval"),
        (b"ctorch\nfloat32\n)R", "calls a"),
        (b"ccollections\nOrderedDict\n)\x81", "other than a plain argparse.Namespace"),
        (b"ctorch\nSize\n}b", "sets the state of a function"),
        (NAMESPACE + b")R", "calls a type"),
        (NAMESPACE + b"}\x81", "other than a plain argparse.Namespace"),
        (NAMESPACE + plain((1,)) + b"\x81", "other than a plain argparse.Namespace"),
        (NAMESPACE + b"]K\x01a\x81", "other than a plain argparse.Namespace"),
        (NAMESPACE + b")}\x92", "opcode NEWOBJ_EX"),
        (b"carg\nNamespace\n)\x81", "asks for 'arg.Namespace'"),
        (b"cargparse\nArgumentParser\n)\x81", "asks for 'argparse.ArgumentParser'"),
        (b"cargparse\n_sys.exit\n)\x81", "asks for 'argparse._sys.exit'"),
        (CALLBACK + b")R", "calls a str"),
        (CALLBACK + b")\x81", "other than a plain argparse.Namespace"),
        (CALLBACK + b"}b", "sets the state of a str"),
        (NAMESPACE + b"b", "pickle is damaged"),
        (NAMESPACE + b"}b", "sets the state of a type"),
        (NEW_NAMESPACE + plain([("a", 1)]) + b"b", "Namespace to a list"),
        (NEW_NAMESPACE + plain((None, {"a": 1})) + b"b", "Namespace to a tuple"),
        (NEW_NAMESPACE + plain({1: 2}) + b"b", "Namespace to a dict"),
        (NEW_NAMESPACE + NAMESPACE + b"b", "Namespace to a type"),
        (NEW_NAMESPACE + mapping({"a": b"cos\nsystem\n"}) + b"b", "asks for 'os.system'"),
        (NEW_NAMESPACE + mapping({"a": b"cpathlib\nPosixPath\n)R"}) + b"b", "pathlib.PosixPath"),
        (NEW_NAMESPACE + b"K\x01a", "items added to a Namespace"),
        (tensor((2,), (1,), storage=stored(count=10**18)), "should hold 1000000000000000000"),
        (tensor((2,), (1,), storage=stored(count=-1)), "has -1 elements"),
        (tensor((2,), (1,), storage=stored(key="9")), "which the file lacks"),
        (tensor((2,), (-1,), 5), "non-negative integers"),
        (tensor((2.0,), (1,)), "non-negative integers"),
        (tensor((2, 2), (1,)), "one stride per dimension"),
        (tensor((10**9,), (0,)), "more than is plausible"),
        (b"](" + tensor((2**17,), (0,)) * 3 + b"e", "more than is plausible"),
        (b"ctorch\nSize\n" + tensor((24,), (0,)) + b"\x85R", "size or stride a ndarray"),
        (rebuild(plain(0) + tensor((2,), (0,)) + plain((1,))), "size or stride a ndarray"),
        (rebuild(plain(0) + plain((1,)) + tensor((2,), (0,))), "size or stride a ndarray"),
        (rebuild(plain(0) + plain((1,) * 65) + plain((1,) * 65)), "at most 64 integers"),
        (tensor((2**47, 2**47, 0), (1, 1, 1)), "larger than any memory"),
        (tensor((1,), (1,), storage=stored(count=2**70)), "has about 10^21 elements"),
        (b"ctorch\nSize\n" + tensor((1,), (0,)) + b"R", "a call with a ndarray of arguments"),
        (b"cbuiltins\nset\n" + tensor((1,), (0,)) + b"\x85R", "where a list of items belongs"),
        (tensor((5,), (1,)) + b"Q", "a storage called by a ndarray"),
        (plain({2**61 - 1: 0}), "has the key 2305843009213693951"),
        (plain({-(2**61): 0}), "has the key -2305843009213693952"),
        (tensor((2,), (1,), storage=tensor((24,), (0,))), "a tensor over a ndarray"),
        (b"cnumpy\ndtype\n" + plain(("O8", False, True)) + b"R", "NumPy scalar of type 'O8'"),
        (b"}" + plain(((1, 2), 3)) + b"s", "pickle is damaged"),
        (b"}(" + plain((1, 2)) + plain(3) + b"u", "key of type tuple"),
        (b"r\xff\xff\xff\xff", "pickle is damaged"),
        (b"h\x07", "pickle is damaged"),
    ],
)
def test_hostile_and_damaged_pickles_are_refused(tmp_path, body, problem):
    message = refusal(archive(tmp_path / "x.pth", b"\x80\x02" + body + b"."))
    assert problem in message


def test_nested_bombs_end_quickly(tmp_path):
    # Each of 60 pairs holds the previous one twice, so hashing or printing the last never ends.
    doubling = b"\x80\x02]q\x00" + b"".join(b"(h\x00h\x00tq\x00" for _ in range(60))
    deep = b"\x80\x02" + b"]" * 10**5 + b"a" * (10**5 - 1) + b"."
    start = time.monotonic()
    assert len(read_checkpoint(archive(tmp_path / "deep.pth", deep))) == 1
    for last in (b"}h\x00K\x01s.", b"ctorch\ndevice\nh\x00\x85R.", b"ctorch\nSize\nh\x00\x93."):
        refusal(archive(tmp_path / "x.pth", doubling + last))
    assert time.monotonic() - start < 5
    # Attributes are not hashed, so this file is read.
    read_checkpoint(
        archive(tmp_path / "x.pth", doubling + NEW_NAMESPACE + b"}" + plain("x") + b"h\x00sb.")
    )
    zeros = np.zeros(2**21, np.uint8)
    path = archive(tmp_path / "x.pth", entries(), zeros, zipfile.ZIP_DEFLATED)
    assert "more than weights can" in refusal(path)
