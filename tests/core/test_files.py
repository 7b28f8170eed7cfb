import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.paths import ROOT
from varjax.core import files
from varjax.core.errors import InputError, StorageError


def test_a_failure_leaves_the_old_content_and_no_temporary(tmp_path):
    path = tmp_path / "a.json"
    files.write_json(path, {"a": 1})
    with pytest.raises(RuntimeError), files.atomic_path(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_directories_are_replaced_whole(tmp_path):
    for content in ("old", "new"):
        with files.atomic_path(tmp_path / "d") as temporary:
            temporary.mkdir()
            (temporary / content).write_text(content)
    assert [p.name for p in (tmp_path / "d").iterdir()] == ["new"]


def test_tensors_there_and_back_are_equal_to_the_bit(tmp_path):
    tree = {
        "a": {"kernel": np.arange(6.0).reshape(2, 3).T, "scale": jnp.float32(3)},
        "half": jnp.linspace(0, 1, 5, dtype=jnp.bfloat16),
        "flags": np.array([True, False]),
    }
    files.write_tensors(tmp_path / "t.safetensors", tree, {"from": "here"})
    read, metadata = files.read_tensors(tmp_path / "t.safetensors")
    assert metadata == {"from": "here"}
    assert read["half"].dtype == jnp.bfloat16 and read["a"]["scale"].shape == ()
    for a, b in ((tree["a"], read["a"]), (tree, read)):
        for name in a.keys() - {"a"}:
            np.testing.assert_array_equal(np.asarray(a[name]), b[name])


def test_missing_and_damaged_files_are_named(tmp_path):
    path = tmp_path / "t.safetensors"
    with pytest.raises(ValueError, match="t.safetensors does not exist"):
        files.read_tensors(path)
    files.write_tensors(path, {"a": np.ones(100)}, {})
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(ValueError, match="t.safetensors: truncated"):
        files.read_tensors(path)
    with pytest.raises(ValueError, match="is a directory"):
        files.read_json(tmp_path)
    path.write_text("{")
    with pytest.raises(ValueError, match="t.safetensors is not valid JSON"):
        files.read_json(path)


def test_a_folder_is_one_process_s_until_it_is_done_or_killed(tmp_path):
    lock = f"with files.lock_folder({str(tmp_path)!r}): print(); input()"
    code = f"from varjax.core import files\n{lock}"
    command = [sys.executable, "-c", code]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, cwd=ROOT, **pipes) as other:
        other.stdout.readline()
        with (
            pytest.raises(ValueError, match="another process is at work in"),
            files.lock_folder(tmp_path),
        ):
            pass
        other.kill()
    for _ in range(2):
        with files.lock_folder(tmp_path):
            pass


def test_a_folder_that_would_be_replaced_may_hold_nothing_of_others(tmp_path):
    out = tmp_path / "out"
    files.check_replaceable(out)
    out.mkdir()
    files.check_replaceable(out)
    for name in ("config.json", ".git"):
        (out / name).touch()
    files.check_replaceable(out, {"config.json", ".git", "absent"})
    with pytest.raises(InputError, match=r"holds .git, which would be lost; choose another"):
        files.check_replaceable(out, {"config.json"})
    with pytest.raises(InputError, match=r"holds config.json, which would be lost"):
        files.check_replaceable(out / "config.json")


def test_a_folder_is_gone_on_with_for_the_same_request_only(tmp_path):
    out, request = tmp_path / "out", {"size": (3, 4), "seed": 0}
    out.mkdir()
    (out / ".hidden").touch()
    files.claim_folder(out, "request.json", request, write=False)
    assert not (out / "request.json").exists()
    for _ in range(2):
        files.claim_folder(out, "request.json", request)
        (out / "0.png").touch()
    with pytest.raises(InputError, match="seed: 0 there, 1 asked for") as caught:
        files.claim_folder(out, "request.json", {"size": [3, 4], "seed": 1})
    assert "size" not in str(caught.value)
    with pytest.raises(InputError, match="cfg: None there, 2 asked for"):
        files.claim_folder(out, "request.json", request | {"cfg": 2})
    with pytest.raises(InputError, match="holds files and no other.json"):
        files.claim_folder(out, "other.json", request)
    with pytest.raises(InputError, match="request.json is a file; choose another out"):
        files.claim_folder(out / "request.json", "request.json", request)


def test_what_cannot_be_written_is_a_storage_error_that_names_it(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="file/a.json could not be written: .*File exists"):
        files.write_json(tmp_path / "file" / "a.json", {})
    full = OSError(28, "No space left on device")
    with (
        pytest.raises(StorageError, match="b could not be written: .*No space left"),
        files.atomic_path(tmp_path / "b") as temporary,
    ):
        temporary.write_text("half")
        raise full
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
