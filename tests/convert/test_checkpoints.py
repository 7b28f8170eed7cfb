"""Tests checkpoint variants: EMA weights, name prefixes, half precision, several parts, HMAR."""

import functools
import json

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.convert.test_kl_layouts import convert_file, tiny
from tests.golden import weights
from tests.helpers.checkpoint_files import write_nested
from tests.helpers.conversion import refused
from varjax.convert.from_torch import find_kind
from varjax.convert.official_files import find_state_dicts
from varjax.errors import InputError
from varjax.storage.safetensors_io import write_safetensors


@functools.cache
def official():
    """Returns the tensors of a tiny KL tokenizer; callers must not change them."""
    return tiny()[1]


def converted(path, out, **options):
    return convert_file(path, out, latent_scale=1.0, **options)[1]


def bias(params):
    return params["decoder"]["conv_out"]["bias"]


def test_ema_weights_of_a_deit_style_checkpoint_are_used_and_reported(tmp_path, capsys):
    last = {name: x + 1 for name, x in official().items()}
    checkpoint = {"model": last, "ema": official(), "epoch": 3}
    write_nested(tmp_path / "both.pth", checkpoint)
    expected = official()["decoder.conv_out.bias"]
    np.testing.assert_array_equal(
        bias(converted(tmp_path / "both.pth", tmp_path / "out")), expected
    )
    said = capsys.readouterr().err
    assert "both.pth: using the EMA weights (ema)\n" in said
    params = converted(tmp_path / "both.pth", tmp_path / "out", ema=False)
    np.testing.assert_array_equal(bias(params), expected + 1)
    assert "EMA" not in capsys.readouterr().err
    # A dict of settings named "ema" holds no EMA weights.
    write_nested(tmp_path / "one.pth", {"model": last, "ema": {"decay": 0.99}})
    params = converted(tmp_path / "one.pth", tmp_path / "out")
    np.testing.assert_array_equal(bias(params), expected + 1)
    with pytest.raises(InputError, match="has no EMA weights"):
        converted(tmp_path / "one.pth", tmp_path / "out", ema=True)


def test_the_trainer_entry_may_be_a_state_dict():
    """CCA's fine-tuning of VAR saves it like this, next to the epoch and the arguments."""
    var = weights.state_dict("base", "var")
    found = find_state_dicts({"epoch": 1, "iter": 0, "trainer": var, "args": {"depth": 16}})
    assert found.keys() == {""} and found[""].keys() == var.keys()
    with pytest.raises(InputError, match="entries are not arrays"):
        find_state_dicts({"trainer": {"config": {}}, "args": {}})


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_prefixes_of_ddp_and_torch_compile_are_removed(prefix, tmp_path):
    renamed = {prefix + name: x for name, x in official().items()}
    write_nested(tmp_path / "vae.pth", {"ema": renamed, "model": renamed})
    params = converted(tmp_path / "vae.pth", tmp_path / "out")
    np.testing.assert_array_equal(bias(params), official()["decoder.conv_out.bias"])


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_half_precision_becomes_float32(dtype, tmp_path):
    half = {name: x.astype(dtype) for name, x in official().items()}
    write_safetensors(tmp_path / "vae.safetensors", half, {"format": "pt"})
    found = bias(converted(tmp_path / "vae.safetensors", tmp_path / "out"))
    expected = half["decoder.conv_out.bias"].astype(np.float32)
    assert found.dtype == np.float32 and (expected != official()["decoder.conv_out.bias"]).any()
    np.testing.assert_array_equal(found, expected)


def write_parts(folder):
    """Writes a checkpoint in two parts; returns the index's path and content, and file names."""
    names = sorted(official())
    parts = {
        f"vae-0000{i + 1}-of-00002.safetensors": {n: official()[n] for n in names[i::2]}
        for i in range(2)
    }
    for file, tensors in parts.items():
        save_file(tensors, folder / file)
    weight_map = {name: file for file, tensors in parts.items() for name in tensors}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (folder / "vae.safetensors.index.json").write_text(json.dumps(index))
    return folder / "vae.safetensors.index.json", index, list(parts)


def test_a_checkpoint_in_parts_is_read_by_its_index(tmp_path, capsys):
    index, about, parts = write_parts(tmp_path)
    params = converted(index, tmp_path / "out")
    np.testing.assert_array_equal(bias(params), official()["decoder.conv_out.bias"])
    sources = json.loads((tmp_path / "out/config.json").read_text())["sources"]
    assert sources.keys() == {index.name, *parts}
    refuse = functools.partial(refused, capsys, tmp_path)
    text = refuse(f"--kl={tmp_path / parts[0]}")
    assert "is one of several parts; give the index, vae.safetensors.index.json" in text
    about["weight_map"]["more"] = parts[0]
    index.write_text(json.dumps(about))
    assert "its parts lack more" in refuse(f"--kl={index}")
    for wrong in ("../vae.pth", "/etc/passwd", "..", ""):
        index.write_text(json.dumps({"weight_map": {"a": wrong}}))
        assert "are not names of files in the same folder" in refuse(f"--kl={index}")
    for wrong in ("[]", '{"weight_map": {}}', "{", '{"weight_map": 3}'):
        index.write_text(wrong)
        assert "is not an index of a checkpoint's parts" in refuse(f"--kl={index}")
    index.write_text(json.dumps({"weight_map": {"a": "absent.safetensors"}}))
    assert "absent.safetensors: does not exist" in refuse(f"--kl={index}")


def test_hmar_checkpoints_are_recognized_and_refused():
    var = weights.state_dict("base", "var")
    hmar = {n: x for n, x in var.items() if n != "word_embed.bias"} | {
        "ns_head.weight": var["head.weight"]
    }
    with pytest.raises(InputError, match=r"holds an HMAR model .*, as ns_head.weight shows"):
        find_kind(hmar, "var")
    masks = var | {"mask_embed.weight": np.zeros((1, 48))}
    with pytest.raises(InputError, match=r"HMAR .*, as mask_embed.weight shows"):
        find_kind(masks, "var")
    assert find_kind(var, "var").flag == "var"
    with pytest.raises(InputError, match=r"HMAR .*, as transformer_wo_ddp shows"):
        find_state_dicts({"trainer": {"transformer_wo_ddp": hmar, "vae_local": {}}, "epoch": 1})
