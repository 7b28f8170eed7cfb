import contextlib
import dataclasses
import errno
import functools
import hashlib
import json
import sys
import types

import numpy as np
import pytest
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

import varjax
from tests.golden import weights
from tests.helpers import golden_cases as golden
from tests.helpers.checkpoint_files import write_trainer
from tests.helpers.conversion import assert_official_files, refused
from varjax import trees
from varjax.convert import __main__ as command
from varjax.convert import apply_map, convert, weights_dir
from varjax.convert.__main__ import main
from varjax.convert.from_torch import find_kind
from varjax.convert.pth.write import write_pth
from varjax.models import read_model, read_tokenizer
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.pyramid import SCALES_512
from varjax.var.model import VARConfig
from varjax.weight_files import convert_to_torch

OFFICIAL = json.loads((weights.HERE / "official_state_dicts.json").read_text())
HEADS = {"no_qk_norm": ["--heads=3"]}  # these tensors do not determine the heads


@functools.cache
def official(name, part):
    """Returns a golden case's official weights and buffers; callers must not change them."""
    config = golden.configs(name)[("vae", "var").index(part)]
    buffers = apply_map.official_buffers(config)
    return weights.state_dict(name, part) | {n: np.asarray(x) for n, x in buffers.items()}


@pytest.fixture
def base(tmp_path):
    """Writes vae.pth and var.pth of the base case; returns their paths."""
    for part in ("vae", "var"):
        write_pth(tmp_path / f"{part}.pth", official("base", part))
    return tmp_path / "vae.pth", tmp_path / "var.pth"


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
def test_official_files_reproduce_the_reference_and_round_trip_exactly(name, tmp_path, capsys):
    vae, var = tmp_path / "vae.pth", tmp_path / "var.safetensors"
    write_pth(vae, official(name, "vae"))
    save_file(official(name, "var"), var)
    flags = [f"--tokenizer={vae}", f"--var={var}", f"--out={tmp_path / 'out'}"]
    assert main(flags + HEADS.get(name, [])) == 0
    capsys.readouterr()

    model = varjax.load(tmp_path / "out")
    assert (model.tokenizer, model.var) == golden.configs(name)
    expected = golden.outputs(name)
    tokens_BL, label_B = expected["tokens"], expected["label"]
    images_BHWC = (golden.images(name) + 1) / 2
    np.testing.assert_array_equal(model.encode(images_BHWC), tokens_BL)
    np.testing.assert_allclose(model.logits(tokens_BL, label_B), expected["logits"], atol=2e-4)
    images_BHWC = model.sample(label_B, guidance=2.5, top_k=1, top_p=0.0)
    np.testing.assert_allclose(
        golden.strided(name, images_BHWC), expected["generate.cfg1.5.image"], atol=2e-4
    )

    convert_to_torch(tmp_path / "out", tmp_path / "torch")
    for ours, part in (("tokenizer", "vae"), ("var", "var")):
        assert_official_files(tmp_path / "torch", ours, official(name, part))


@pytest.mark.slow
def test_a_directory_records_its_sources_and_is_replaced_without_losing_files(base, tmp_path):
    out = tmp_path / "out"
    convert(out, tokenizer=base[0], var=base[1])
    config = json.loads((out / "config.json").read_text())
    assert config["sources"] == {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in base
    }
    first = {path.name: path.read_bytes() for path in out.iterdir()}
    convert(out, tokenizer=base[0], var=base[1])
    assert {path.name: path.read_bytes() for path in out.iterdir()} == first
    with pytest.raises(ValueError, match="contains tokenizer.safetensors, which would be lost"):
        convert(out, var=base[1])
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="contains notes.txt, which would be lost"):
        convert(out, tokenizer=base[0], var=base[1])
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="file exists"):
        convert(tmp_path / "file", tokenizer=base[0], var=base[1])
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"task": {}}')
    with pytest.raises(ValueError, match="run exists and contains config.json"):
        convert(run, tokenizer=base[0], var=base[1])


@pytest.mark.parametrize("dtype", [np.float16, bfloat16, np.float64])
def test_other_dtypes_become_float32(dtype, tmp_path):
    half = {
        n: x.astype(dtype) if x.dtype == np.float32 else x
        for n, x in official("base", "var").items()
    }
    write_pth(tmp_path / "var.pth", half)
    convert(tmp_path / "out", var=tmp_path / "var.pth")
    _, config, params, _ = read_model(tmp_path / "out")
    expected = apply_map.from_official(config, {n: x.astype(np.float32) for n, x in half.items()})
    assert trees.difference(expected, params) == ""
    for path, x in trees.paths(params).items():
        np.testing.assert_array_equal(x, trees.paths(expected)[path])


@pytest.mark.slow
def test_a_checkpoint_of_the_official_trainer_provides_both_models(tmp_path):
    path = tmp_path / "ar-ckpt-best.pth"
    var = {f"_orig_mod.{n}": x for n, x in official("base", "var").items()}
    write_trainer(path, {"var_wo_ddp": var, "vae_local": official("base", "vae")})
    configs = convert(tmp_path / "both", var=path)
    assert (configs["tokenizer"], configs["var"]) == golden.configs("base")
    convert(tmp_path / "tokenizer", tokenizer=path, options=dict(scales=(1, 2, 3, 4)))
    for location in ("both", "tokenizer"):
        _, params = read_tokenizer(tmp_path / location)
        expected = golden.tokenizer_params("base")["quantizer"]["codebook"]
        np.testing.assert_array_equal(params["quantizer"]["codebook"], expected)
    write_trainer(path, {"vae_local": official("base", "vae")})
    with pytest.raises(ValueError, match="best.pth: is a trainer's checkpoint that holds only vae"):
        convert(tmp_path / "var", var=path)


def infer_config(tensors, part, options):
    kind = find_kind(tensors, part)
    return kind.infer(tensors, kind.options(**options))


@pytest.mark.parametrize("name", OFFICIAL)
def test_configs_of_the_released_models_are_inferred_from_tensor_shapes(name):
    tensors = {n: np.broadcast_to(np.float32(0), s) for n, s in OFFICIAL[name].items()}
    if not name.startswith("var"):
        assert infer_config(tensors, "tokenizer", {}) == VQConfig()
        of_512 = infer_config(tensors, "tokenizer", dict(scales=SCALES_512))
        assert of_512 == VQConfig(scales=SCALES_512)
        return
    preset = VARConfig.preset(name.removeprefix("var_"))
    # The tensors do not show how the model was initialized.
    preset = dataclasses.replace(preset, gate_init=VARConfig.gate_init)
    tensors["lvl_1L"] = preset.pyramid.level_L[None]
    assert infer_config(tensors, "var", {}) == preset
    del tensors["lvl_1L"]
    assert infer_config(tensors, "var", {}) == preset


def test_settings_that_tensors_do_not_determine_are_requested():
    var = dict(official("no_qk_norm", "var"))
    with pytest.raises(ValueError, match="heads is unknown for width 48; give --heads"):
        infer_config(var, "var", {})
    del var["lvl_1L"]
    with pytest.raises(ValueError, match="4 scales with 39 tokens in total, .* --scales"):
        infer_config(var, "var", dict(heads=3))
    wide = ((1, 1), (2, 2), (3, 3), (1, 25))
    with pytest.raises(ValueError, match="a map is smaller|comes after"):
        infer_config(var, "var", dict(heads=3, scales=wide))
    assert (
        infer_config(var, "var", dict(heads=3, scales=(1, 2, 3, 5)))
        == golden.configs("no_qk_norm")[1]
    )
    var["lvl_1L"] = np.repeat([0, 1], [2, 37])[None]
    with pytest.raises(ValueError, match=r"scales of \[2, 37\] tokens are not square"):
        infer_config(var, "var", dict(heads=3))
    for problem, levels in {
        "int64 .1, 1.; expected integers .1, 39.": [[200000000]],
        r"levels from 0 to 2e.08; there are 4": [[0] * 38 + [200000000]],
        "levels from -1 to 0; there are 4": [[-1] + [0] * 38],
        "levels from nan to nan": [[np.nan] * 39],
        "complex128 .1, 39.; expected integers": [[0j] * 39],
    }.items():
        var["lvl_1L"] = np.array(levels)
        with pytest.raises(ValueError, match=problem):
            infer_config(var, "var", dict(heads=3))
    var["lvl_1L"] = np.repeat([0, 1, 2, 3], [1, 4, 9, 25])[None].astype(bfloat16)
    assert infer_config(var, "var", dict(heads=3)).scales == (1, 2, 3, 5)
    with pytest.raises(ValueError, match="the tensors have 3; omit --heads"):
        infer_config(official("base", "var"), "var", dict(heads=4))
    options = dict(scales=(1, 2, 3, 4), groups=8, phi_ratio=0.25, cosine_codes=True)
    assert infer_config(official("base", "vae"), "tokenizer", options) == dataclasses.replace(
        golden.configs("base")[0], groups=8, phi_ratio=0.25, cosine_codes=True
    )


def test_errors_about_wrong_files_say_what_to_do(base, tmp_path, capsys):
    vae, var = base
    refuse = functools.partial(refused, capsys, tmp_path)
    text = refuse(f"--tokenizer={var}", f"--var={vae}")
    assert f"{vae}: holds a tokenizer (VQVAE), not a transformer" in text and "--tokenizer" in text
    text = refuse(f"--tokenizer={var}")
    assert f"{var}: holds a transformer (VAR), not a tokenizer" in text and "--var" in text
    write_pth(tmp_path / "other.pth", {"fc.weight": np.zeros((2, 2), np.float32)})
    assert "other.pth: holds neither" in refuse(f"--var={tmp_path / 'other.pth'}")
    assert "missing.pth: does not exist" in refuse(f"--var={tmp_path / 'missing.pth'}")
    var.write_bytes(var.read_bytes()[:-100])
    assert f"{var}: the zip file is cut short or damaged" in refuse(f"--var={var}")


def test_one_error_lists_all_tensors_that_do_not_fit(tmp_path, capsys):
    tensors = dict(official("base", "var"))
    del tensors["blocks.2.ffn.fc1.weight"], tensors["head.bias"]
    tensors["blocks.0.attn.extra"] = np.zeros(3, np.float32)
    tensors["pos_start"] = np.zeros((1, 2, 48), np.float32)
    write_pth(tmp_path / "var.pth", tensors)
    text = refused(capsys, tmp_path, f"--var={tmp_path / 'var.pth'}")
    assert "missing: blocks.2.ffn.fc1.weight (192, 48)" in text and "missing: head.bias" in text
    assert "unexpected: blocks.0.attn.extra" in text and "misshapen: pos_start" in text


def test_models_that_do_not_fit_each_other_are_refused(base, tmp_path, capsys):
    vae, var = base
    refuse = functools.partial(refused, capsys, tmp_path, f"--var={var}")
    tensors = dict(official("base", "vae"))
    tensors["quantize.embedding.weight"] = np.zeros((32, 8), np.float32)
    write_pth(tmp_path / "small.pth", tensors)
    assert "vocab: tokenizer 32, transformer 64" in refuse(f"--tokenizer={tmp_path / 'small.pth'}")
    write_pth(tmp_path / "ten.pth", official("ten_scales", "vae"))
    text = refuse(f"--tokenizer={tmp_path / 'ten.pth'}")
    assert "ten.pth: the tokenizer has 10 scales, but the transformer" in text


def test_weights_that_are_not_finite_are_named(base, tmp_path, capsys):
    tensors = dict(official("base", "var"))
    tensors["head.weight"] = np.full_like(tensors["head.weight"], np.nan)
    tensors["lvl_embed.weight"] = np.full_like(tensors["lvl_embed.weight"], np.inf)
    write_pth(base[1], tensors)
    convert(tmp_path / "out", tokenizer=base[0], var=base[1])
    err = capsys.readouterr().err
    assert f"{base[1]}: NaN or infinite" in err and "lvl_embed.weight, head.weight" in err
    assert str(base[0]) not in err and "attn_bias_for_masking" not in err


def test_a_full_disk_leaves_nothing(base, tmp_path, capsys, monkeypatch):
    flags = (f"--tokenizer={base[0]}", f"--var={base[1]}")

    def fill_up(path, named, metadata):
        path.write_bytes(b"half of it")
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(weights_dir.safetensors_io, "write_safetensors", fill_up)
        text = refused(capsys, tmp_path, *flags)
        assert "refused could not be written" in text and "No space left on device" in text
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(weights_dir.shutil, "disk_usage", lambda path: usage)
    assert "needs 0.018 GB; 0.000 GB are free" in refused(capsys, tmp_path, *flags)


def test_contradictory_command_lines_are_refused(base, tmp_path, capsys):
    refuse = functools.partial(refused, capsys, tmp_path)
    assert "), or --run, or --to_torch, or --lpips_vgg" in refuse()
    assert "or --run" in refuse(f"--var={base[1]}", "--run=runs/x")
    assert "belong together" in refuse("--to_torch")
    assert "scales=1,b: give side lengths" in refuse(f"--var={base[1]}", "--scales=1,b")
    assert "nowhere does not exist" in refuse("--to_torch", "--weights=nowhere")
    with pytest.raises(SystemExit, match="2"):
        main(["--multiplier=3", "--out=x"])
    with pytest.raises(ValueError, match="heads: no option of a tokenizer .VQVAE.; leave it out"):
        convert(tmp_path / "out", {"heads": 3}, tokenizer=base[0])
    with pytest.raises(ValueError, match="unknown part vae; known parts are tokenizer, kl"):
        convert(tmp_path / "out", vae=base[0])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--var=x --layout=diffusers", "--layout: not used with --var; leave it out"),
        ("--run=x --no-ema --latent_shift=0", "--latent_shift: not used with --run; leave it out"),
        ("--run=x --repo=a/b --groups=4", "--groups, --repo: not used with --run"),
        ("--run=x --weights=y", "--weights: not used with --run"),
        ("--to_torch --weights=x --revision=y", "--revision: not used with --to_torch"),
        ("--to_torch --weights=x --layout=diffusers", "x does not exist"),
        ("--lpips_vgg=x --lpips_heads=y --no-ema", "--no-ema: not used with --lpips_heads, --lp"),
        ("--inception=x --ema", "--ema: not used with --inception"),
        ("--var=x --revision=y", "give --repo as well"),
    ],
)
def test_flags_that_do_not_apply_are_refused(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, tmp_path, *flags.split())


def test_downloads_use_the_given_repository_and_revision(base, tmp_path, capsys, monkeypatch):
    flags = ("--repo=FoundationVision/var", "--revision=abc", "--var=var.pth")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert "pip install huggingface_hub" in refused(capsys, tmp_path, *flags)
    asked = []

    def hf_hub_download(repo, name, revision):
        asked.append((repo, name, revision))
        if len(asked) == 1:
            raise RuntimeError("no route\nto host")
        return str(tmp_path / name)

    library = types.SimpleNamespace(hf_hub_download=hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", library)
    text = refused(capsys, tmp_path, *flags)
    assert "revision abc (RuntimeError: no route); check" in text
    with contextlib.redirect_stdout(None):
        assert main([*flags, f"--out={tmp_path / 'out'}"]) == 0
    assert asked[1] == ("FoundationVision/var", "var.pth", "abc")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--var=var.pth"], "contains notes.txt, which would be lost"),
        (["--var=var.pth", "--scales=1,b"], "scales=1,b: give side lengths"),
        (["--tokenizer=vae.pth", "--kl=kl.ckpt"], "--tokenizer and --kl both give the tokenizer"),
        (["--var=var.pth", "--mar=mar.pth"], "are both models of latents"),
        (["--var=var.pth", "--resnet=resnet.pth"], "--resnet needs a directory for itself"),
        (["--resnet=resnet.pth", "--kl=kl.ckpt"], "--resnet needs a directory for itself"),
    ],
)
def test_nothing_is_downloaded_for_a_refused_request(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "download", None)
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["--repo=FoundationVision/var", *flags, f"--out={tmp_path}"]) == 1
    assert message in capsys.readouterr().err
