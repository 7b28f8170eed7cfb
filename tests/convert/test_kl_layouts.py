"""Tests the conversion of KL tokenizers of other sizes and layouts, and the latents' scale."""

import dataclasses
import functools
import json
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

import varjax
from tests.helpers import golden_kl as golden
from tests.helpers.checkpoint_files import write_nested
from tests.helpers.conversion import assert_official_files
from varjax.checkpoints.weights import abstract_params
from varjax.convert import apply_map, convert
from varjax.convert.__main__ import main
from varjax.convert.from_torch import find_kind
from varjax.convert.name_maps import kl
from varjax.convert.name_maps.diffusers import with_official_names
from varjax.convert.name_maps.kl import KL_MAP
from varjax.convert.weights_dir import sha256_of
from varjax.errors import InputError
from varjax.mar.latents import from_model_units, to_model_units
from varjax.models import read_tokenizer
from varjax.storage.safetensors_io import read_safetensors
from varjax.tokenizers.kl.model import PRESETS, KLConfig
from varjax.weight_files import convert_to_torch

TINY = KLConfig(
    8, width=8, channel_mult=(1, 2), blocks=1, groups=4, latent_channels=4, encoder_attention=()
)
VARIANTS = {
    "attention in the middle alone": {},
    "in both halves": {"encoder_attention": (-1,), "decoder_attention": (-2, -1)},
    "no quant convs": {"quant_convs": False},
    "features of other channels": {"feature_channels": 6},
}


@functools.cache
def tiny(**changes):
    """Returns (config, official tensors) of a tiny tokenizer; callers must not change them."""
    config = dataclasses.replace(TINY, **changes)
    shapes = jax.tree.map(lambda x: x.shape, abstract_params(config))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda shape: rng.normal(size=shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    official = apply_map.to_official(config, params)
    return config, {name: np.asarray(x) for name, x in official.items()}


def read(out):
    config, params = read_tokenizer(out)
    return config, params, float(params["latent_std"])


def convert_file(path, out, ema=None, **options):
    given = {"image_size": 8, "groups": 4} | options
    convert(out, given, ema, kl=path)
    return read(out)


@pytest.mark.parametrize("name", golden.LAYOUTS)
def test_the_config_is_inferred_from_the_tensors(name):
    config, official = golden.LAYOUTS[name], golden.layout_official(name)
    options = KL_MAP.options(image_size=config.image_size)
    assert find_kind(official, "kl").infer(official, options) == config
    expected = {tensor: x.shape for tensor, x in official.items()}
    assert apply_map.official_shapes(config) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.LAYOUTS)
def test_layouts_reproduce_the_outputs_of_latent_diffusion(name, tmp_path):
    config, official = golden.LAYOUTS[name], golden.layout_official(name)
    save_file(
        golden.diffusers_names(official, len(config.channel_mult)), tmp_path / "vae.safetensors"
    )
    options = dict(image_size=config.image_size, latent_scale=0.5)
    convert(tmp_path / "out", options, kl=tmp_path / "vae.safetensors")
    tokenizer, expected = varjax.load_tokenizer(tmp_path / "out"), golden.layout_outputs(name)
    latents = tokenizer.encode((golden.layout_images(name) + 1) / 2)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=5e-5)
    for key in ("mean", "std"):
        close(latents[key], expected[key])
    images_BHWC = tokenizer.decode(expected["mean"])
    close(2 * np.asarray(images_BHWC) - 1, np.clip(expected["decoded"], -1, 1))


ATTENTION = {  # levels with attention in encoder and decoder, besides the middle blocks
    "kl16": ([4], []),
    "kl_f4": ([], []),
    "kl_f8": ([], []),
    "kl_f16": ([4], [4]),
    "kl_f32": ([4, 5], [4, 5]),
}


@pytest.mark.parametrize("name", PRESETS)
def test_presets_match_the_released_autoencoders(name):
    config = KLConfig.preset(name)
    shapes = apply_map.official_shapes(config)
    for half, way, blocks, levels in zip(
        ("encoder", "decoder"), ("down", "up"), (2, 3), ATTENTION[name], strict=True
    ):
        found = {n for n in shapes if re.match(rf"{half}\.{way}\.\d+\.attn\.\d\.q\.weight", n)}
        expected = {f"{half}.{way}.{i}.attn.{j}.q.weight" for i in levels for j in range(blocks)}
        assert found == expected
    tensors = {n: np.broadcast_to(np.float32(0), shape) for n, shape in shapes.items()}
    assert find_kind(tensors, "kl").infer(tensors, KL_MAP.options()) == config
    if name == "kl_f8":  # used by Stable Diffusion
        assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) == 83_653_863


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_round_trip(variant, tmp_path):
    config, official = tiny(**VARIANTS[variant])
    write_nested(tmp_path / "vae.ckpt", {"state_dict": official})
    found, _, std = convert_file(tmp_path / "vae.ckpt", tmp_path / "out", latent_scale=2.0)
    assert (found, std) == (config, 0.5)
    convert_to_torch(tmp_path / "out", tmp_path / "torch")
    assert_official_files(tmp_path / "torch", "tokenizer", official)
    if config.features != config.latent_channels:
        with pytest.raises(InputError, match="diffusers' AutoencoderKL has one number for both"):
            convert_to_torch(tmp_path / "out", tmp_path / "diffusers", layout="diffusers")
        return
    flags = [f"--weights={tmp_path / 'out'}", f"--out={tmp_path / 'diffusers'}"]
    assert main(["--to_torch", "--layout=diffusers", *flags]) == 0
    path = tmp_path / "diffusers/diffusion_pytorch_model.safetensors"
    theirs = golden.diffusers_names(official, len(config.channel_mult))
    held, _ = read_safetensors(path)
    assert held.keys() == theirs.keys()
    for name, x in theirs.items():
        np.testing.assert_array_equal(held[name], x, err_msg=name)
    # The scale is in the config.json next to the file.
    back = convert_file(path, tmp_path / "back")
    assert back[0] == config and back[2] == 0.5
    jax.tree.map(np.testing.assert_array_equal, back[1], read(tmp_path / "out")[1])


def test_the_diffusers_config_describes_blocks_and_scale(tmp_path, capsys):
    config, official = tiny(**VARIANTS["in both halves"])
    write_nested(tmp_path / "vae.ckpt", {"state_dict": official})
    convert_file(tmp_path / "vae.ckpt", tmp_path / "out", latent_scale=0.3611, latent_shift=0.1159)
    convert_to_torch(tmp_path / "out", tmp_path / "torch")
    assert "latent_std is 2.76932, which official files do not hold\n" in capsys.readouterr().err
    convert_to_torch(tmp_path / "out", tmp_path / "diffusers", layout="diffusers")
    about = json.loads((tmp_path / "diffusers/config.json").read_text())
    assert about["down_block_types"] == ["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]
    assert about["up_block_types"] == ["AttnUpDecoderBlock2D", "AttnUpDecoderBlock2D"]
    assert about["block_out_channels"] == [8, 16] and about["norm_num_groups"] == 4
    assert (about["scaling_factor"], about["shift_factor"]) == (0.3611, 0.1159)
    assert about["use_quant_conv"] and about["layers_per_block"] == config.blocks


def test_old_tensor_names_of_diffusers_are_read():
    _, official = tiny()
    theirs = golden.diffusers_names(official, 2)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {
        re.sub(r"to_(q|k|v|out\.0)", lambda found: old[found[0]], name): x
        for name, x in theirs.items()
    }
    assert renamed.keys() != theirs.keys()
    found = with_official_names(renamed)
    assert found.keys() == official.keys()
    for name, x in official.items():
        np.testing.assert_array_equal(found[name], x, err_msg=name)
    both = theirs | {"encoder.mid_block.attentions.0.query.weight": np.zeros((16, 16))}
    with pytest.raises(InputError, match="two tensors, one of them .*query"):
        with_official_names(both)


def test_the_latent_scale_comes_from_flag_file_or_digest(tmp_path, capsys, monkeypatch):
    config, official = tiny()
    whole = {f"first_stage_model.{name}": x for name, x in official.items()}
    whole |= {"scale_factor": np.array(0.25, np.float32), "model.diffusion_model.w": np.zeros(3)}
    write_nested(tmp_path / "whole.ckpt", {"state_dict": whole})
    assert convert_file(tmp_path / "whole.ckpt", tmp_path / "out")[2] == 4
    assert (
        "latents are multiplied by 0.25, according to its scale_factor" in capsys.readouterr().err
    )
    found = convert_file(tmp_path / "whole.ckpt", tmp_path / "out", latent_scale=0.5)
    assert found[2] == 2 and found[0] == config  # the flag takes precedence

    write_nested(tmp_path / "vae.ckpt", {"state_dict": official})
    with pytest.raises(
        InputError, match=r"vae.ckpt: this file does not hold .* give --latent_scale: 0.18"
    ):
        convert_file(tmp_path / "vae.ckpt", tmp_path / "out")
    (digest,) = sha256_of([tmp_path / "vae.ckpt"]).values()
    monkeypatch.setitem(kl.KNOWN_FILES, digest, (0.125, 0.5))
    found = convert_file(tmp_path / "vae.ckpt", tmp_path / "out")
    assert found[2] == 8 and found[0] == dataclasses.replace(config, latent_shift=0.5)
    said = capsys.readouterr().err
    assert "multiplied by 0.125 after subtracting 0.5, as published for this file" in said

    folder = tmp_path / "vae"
    folder.mkdir()
    save_file(golden.diffusers_names(official, 2), folder / "model.safetensors")
    about = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "shift_factor": None}
    (folder / "config.json").write_text(json.dumps(about))
    assert convert_file(folder / "model.safetensors", tmp_path / "out")[2] == 2
    (folder / "config.json").write_text(json.dumps(about | {"scaling_factor": 0}))
    with pytest.raises(InputError, match="scaling_factor=0.0: expected a finite number above 0"):
        convert_file(folder / "model.safetensors", tmp_path / "out")


def test_a_scale_flag_alone_keeps_the_shift_of_the_file(tmp_path, capsys):
    config, official = tiny()
    save_file(golden.diffusers_names(official, 2), tmp_path / "model.safetensors")
    about = {"_class_name": "AutoencoderKL", "scaling_factor": 0, "shift_factor": 0.25}
    (tmp_path / "config.json").write_text(json.dumps(about))
    found = convert_file(tmp_path / "model.safetensors", tmp_path / "out", latent_scale=0.5)
    assert found[0] == dataclasses.replace(config, latent_shift=0.25) and found[2] == 2
    assert "0.25 is subtracted from the latents, according to" in capsys.readouterr().err
    flags = {"latent_scale": 0.5, "latent_shift": 0.0}
    assert convert_file(tmp_path / "model.safetensors", tmp_path / "out", **flags)[0] == config


def test_diffusers_config_determines_the_groups_unless_a_flag_does(tmp_path, capsys):
    config, official = tiny()
    save_file(golden.diffusers_names(official, 2), tmp_path / "model.safetensors")
    about = {"_class_name": "AutoencoderKL", "scaling_factor": 0.5, "norm_num_groups": 4}
    (tmp_path / "config.json").write_text(json.dumps(about))
    found = convert_file(tmp_path / "model.safetensors", tmp_path / "out", groups=None)[0]
    assert found == config and "norms have 4 groups, as" in capsys.readouterr().err
    found = convert_file(tmp_path / "model.safetensors", tmp_path / "out", groups=2)[0]
    assert found == dataclasses.replace(config, groups=2)
    flags = {"groups": None, "latent_scale": 0.5, "latent_shift": 0.0}
    assert convert_file(tmp_path / "model.safetensors", tmp_path / "out", **flags)[0] == config
    (tmp_path / "config.json").write_text(json.dumps(about | {"norm_num_groups": "4"}))
    with pytest.raises(InputError, match="norm_num_groups='4'; expected a whole number above 0"):
        convert_file(tmp_path / "model.safetensors", tmp_path / "out", groups=None)


def test_the_latent_shift_is_applied_in_both_directions():
    config, params = KLConfig(latent_shift=0.5), {"latent_std": np.float32(2)}
    z_BhwZ = np.array([0.5, 4.5], np.float32)
    np.testing.assert_array_equal(to_model_units(config, params, z_BhwZ), [0, 2])
    np.testing.assert_array_equal(from_model_units(config, params, np.float32([0, 2])), z_BhwZ)


def test_wrong_tensors_and_settings_are_refused():
    _, official = tiny(**VARIANTS["in both halves"])
    config = find_kind(official, "kl").infer(official, KL_MAP.options(groups=4, image_size=8))
    cut = {n: x for n, x in official.items() if n != "decoder.up.0.attn.1.q.bias"}
    with pytest.raises(InputError, match=r"missing: decoder.up.0.attn.1.q.bias \(8,\)"):
        apply_map.lazy_leaves(config, cut)
    high = official | {"encoder.down.7.attn.0.q.weight": np.zeros((8, 8, 1, 1), np.float32)}
    with pytest.raises(InputError):
        find_kind(high, "kl").infer(high, KL_MAP.options(groups=4))
    high = official | {"decoder.up.7.attn.0.q.weight": np.zeros((8, 8, 1, 1), np.float32)}
    with pytest.raises(InputError, match="the decoder has attention at level 7 of 2 levels"):
        find_kind(high, "kl").infer(high, KL_MAP.options(groups=4))
    for attention in ((0,), (-1, -1), (-1, -2), (-6,)):
        with pytest.raises(InputError, match=r"decoder_attention=.*from -5 .* to -1"):
            KLConfig(decoder_attention=attention)
    with pytest.raises(InputError, match="feature_channels=8: without quant_convs"):
        KLConfig(quant_convs=False, feature_channels=8)
    with pytest.raises(InputError, match="latent_shift=nan"):
        KLConfig(latent_shift=float("nan"))
    with pytest.raises(InputError, match="preset 'kl_f64': allowed are kl16, kl_f4"):
        KLConfig.preset("kl_f64")


def test_latent_caches_of_older_versions_remain_valid():
    fields = {"image_size", "image_channels", "width", "channel_mult", "blocks", "groups"}
    assert KLConfig().identity({}).keys() == fields | {"latent_channels", "weights"}
    assert KLConfig.preset("kl_f16").identity({})["decoder_attention"] == [-1]
