import os
import pickle
import struct
import zipfile

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.helpers.checkpoint_files import DATA, archive, entries, refusal, tensor
from varjax.convert.official_files import find_state_dicts
from varjax.convert.pth.allowed import STORAGES
from varjax.convert.pth.read import read_checkpoint
from varjax.convert.pth.write import write_pth

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("shape", [(), (0, 3), (7,), (3, 1, 4)])
@pytest.mark.parametrize("dtype", STORAGES.values(), ids=lambda dtype: dtype.name)
def test_written_weights_are_read_back_bit_for_bit(tmp_path, dtype, shape):
    bits = RNG.integers(
        0, 2 if dtype.kind == "b" else 256, np.prod((*shape, dtype.itemsize), dtype=int)
    )
    x = bits.astype(np.uint8).view(dtype).reshape(shape)
    transposed = RNG.integers(0, 2, (5, 3)).astype(dtype).T
    write_pth(tmp_path / "x.pth", {"é.weight": x, "transposed": transposed})
    back = read_checkpoint(tmp_path / "x.pth")
    assert list(back) == ["é.weight", "transposed"]
    for ours, theirs in ((x, back["é.weight"]), (transposed, back["transposed"])):
        assert (ours.dtype, ours.shape, ours.tobytes()) == (
            theirs.dtype,
            theirs.shape,
            theirs.tobytes(),
        )


def test_writing_is_aligned_reproducible_and_leaves_no_partial_file(tmp_path):
    weights = {f"layer{'x' * n}": np.full(n, n, ml_dtypes.bfloat16) for n in range(1, 70, 7)}
    for name in ("a.pth", "b.pth"):
        write_pth(tmp_path / name, weights)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    assert all(x.ctypes.data % 64 == 0 for x in read_checkpoint(tmp_path / "a.pth").values())

    class Broken:
        dtype, shape = np.dtype(np.float32), (2,)

        def __array__(self, dtype=None, copy=None):
            raise OSError("the disk of this lazy array is gone")

    before = (tmp_path / "a.pth").read_bytes()
    with pytest.raises(OSError, match="is gone"):
        write_pth(tmp_path / "a.pth", {"x": DATA, "y": Broken()})
    assert (tmp_path / "a.pth").read_bytes() == before
    assert sorted(os.listdir(tmp_path)) == ["a.pth", "b.pth"]


def test_64_bit_zip_sizes_keep_the_alignment(tmp_path, monkeypatch):
    monkeypatch.setattr("varjax.convert.pth.write.ZIP64_BYTES", 50)
    write_pth(tmp_path / "x.pth", {"x": DATA, "y": DATA[:3]})
    back = read_checkpoint(tmp_path / "x.pth")
    assert np.array_equal(back["x"], DATA) and np.array_equal(back["y"], DATA[:3])
    assert back["x"].ctypes.data % 64 == back["y"].ctypes.data % 64 == 0


def test_weights_that_pytorch_cannot_hold_are_refused(tmp_path):
    with pytest.raises(ValueError, match="x has type uint32; convert it to one of float64"):
        write_pth(tmp_path / "x.pth", {"x": np.zeros(2, np.uint32)})
    with pytest.raises(ValueError, match="the name 3 is a int"):
        write_pth(tmp_path / "x.pth", {3: DATA})  # type: ignore
    with pytest.raises(ValueError, match="does not exist; create it"):
        write_pth(tmp_path / "nowhere" / "x.pth", {"x": DATA})
    assert not os.listdir(tmp_path)


def test_files_that_are_not_checkpoints_are_refused(tmp_path):
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    texts = {
        b"": "is empty",
        b"<!DOCTYPE html><html>": "web page",
        b"\n <html>": "web page",
        b"version https://git-lfs.github.com/spec/v1\n": "git lfs pull",
        magic + pickle.dumps(1002, 2): "version 1002 of an old format",
        pickle.dumps({"a": 1}, 4): "bare pickle",
        b"\0" * 257 + b"ustar\x0000" + b"\0" * 300: "tar file",
        b"Access denied.": "b'Access denied.'",
    }
    for content, problem in texts.items():
        (tmp_path / "x.pth").write_bytes(content)
        assert problem in refusal(tmp_path / "x.pth")
    assert "does not exist" in refusal(tmp_path / "y.pth")
    assert "is a folder" in refusal(tmp_path)
    with zipfile.ZipFile(tmp_path / "x.pth", "w") as file:
        file.writestr("readme.txt", "no weights")
    assert "no data.pkl" in refusal(tmp_path / "x.pth")
    big = archive(tmp_path / "x.pth", entries(x=tensor((24,), (1,))), byteorder="big")
    assert "big-endian" in refusal(big)


def test_damaged_and_truncated_files_are_refused(tmp_path):
    path = tmp_path / "x.pth"
    write_pth(path, {"x": DATA})
    whole = path.read_bytes()
    for end in (4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:end])
        assert "cut short or damaged" in refusal(path)
    at = whole.index(b"_rebuild_tensor_v2")
    path.write_bytes(whole[:at] + b"X" + whole[at + 1 :])
    assert "Bad CRC" in refusal(path)
    at = whole.index(b"PK\x03\x04", whole.index(b"archive/byteorder"))  # local header of data/0
    path.write_bytes(whole[:at] + b"XX" + whole[at + 2 :])
    assert "damaged at 'archive/data/0'" in refusal(path)
    path.write_bytes(whole[: at + 28] + b"\xff\xff" + whole[at + 30 :])
    assert "ends inside 'archive/data/0'" in refusal(path)


def test_safetensors_of_another_writer_are_read(tmp_path):
    weights = {"x": DATA.reshape(4, 6), "h": np.ones(3, ml_dtypes.bfloat16), "s": np.array(5)}
    first_bytes = set()
    for pad in range(0, 256, 8):
        save_file(weights, tmp_path / "x.safetensors", metadata={"pad": "p" * pad})
        back = read_checkpoint(tmp_path / "x.safetensors")
        first_bytes.add((tmp_path / "x.safetensors").read_bytes()[0])
        assert back.keys() == weights.keys()
        for name, x in weights.items():
            assert back[name].dtype == x.dtype and np.array_equal(back[name], x)
    assert 0x80 in first_bytes, "no header has the length that looks like the start of a pickle"


def test_an_error_names_a_damaged_safetensors_file_once(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file({"x": DATA}, path)
    path.write_bytes(path.read_bytes()[:-1])
    message = refusal(path)
    assert "truncated" in message and message.count("x.safetensors") == 1
    header = b'{"x":{"dtype":"F4","shape":[32],"data_offsets":[0,16]}}'
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(16))
    assert "type F4; allowed: F64" in refusal(path)


def test_state_dicts_are_found_and_their_prefixes_removed():
    x, y = np.zeros(2), np.ones(3)
    trainer = {"config": {}, "var_wo_ddp": {"_orig_mod.a": x}, "vae_local": {"b": y}, "var_opt": {}}
    official = find_state_dicts({"epoch": 1, "trainer": trainer, "args": {}})
    assert official["var"]["a"] is x and official["tokenizer"]["b"] is y and len(official) == 2
    names = {"module._orig_mod.a.module.weight": x, "enc._orig_mod.b": y}
    for checkpoint in (names, {"state_dict": names}, {"model": names, "epoch": 3}):
        assert list(find_state_dicts(checkpoint)[""]) == ["a.module.weight", "enc.b"]
    with pytest.raises(ValueError, match=r"1 of 2 entries are not arrays: \['epoch'\]"):
        find_state_dicts({"a": x, "epoch": 3})
    with pytest.raises(ValueError, match="differ only in"):
        find_state_dicts({"module.a": x, "a": y})
    with pytest.raises(ValueError, match="is a list, not a dict"):
        find_state_dicts([x])
    with pytest.raises(ValueError, match="no weights"):
        find_state_dicts({})
