"""Tests the conversion of MAR's official files in both directions, and the converted model."""

import argparse
import dataclasses
import functools
import json

import jax
import numpy as np
import pytest

import varjax
from tests.golden import weights
from tests.helpers import runs
from tests.helpers.checkpoint_files import write_nested
from tests.helpers.conversion import assert_official_files, refused
from tests.mar import golden
from varjax.config import config_tree
from varjax.convert import apply_map, convert
from varjax.convert.__main__ import main
from varjax.convert.from_torch import find_kind, infer_configs
from varjax.convert.name_maps import MAR_MAP
from varjax.convert.name_maps.name_map import Source
from varjax.convert.pth.read import read_checkpoint
from varjax.convert.pth.write import write_pth
from varjax.errors import InputError
from varjax.mar.heads import CategoricalHead
from varjax.mar.model import MARConfig
from varjax.mar.pipeline import MARPipeline
from varjax.mar.sample import MAROptions
from varjax.models import read_model, read_tokenizer
from varjax.tokenizers.kl.model import KLConfig
from varjax.weight_files import convert_to_torch

OFFICIAL = json.loads((weights.HERE / "official_mar_state_dicts.json").read_text())
RELEASED = {"mar_base": ("mar_b", 2.9), "mar_large": ("mar_l", 3.0), "mar_huge": ("mar_h", 3.2)}
KL = KLConfig(8, width=8, channel_mult=(1, 2), blocks=1, groups=4, latent_channels=4)
FLAGS = ("--mar_heads=3,3", "--groups=4")  # not determined by these tensors
OPTIONS = dict(mar_heads=(3, 3), groups=4)


@functools.cache
def official(name="mar_base"):
    """Returns a golden case's weights by official name; callers must not change them."""
    return weights.state_dict(name, "mar")


@functools.cache
def official_kl():
    """Returns the weights of a tiny tokenizer whose latents fit the golden cases."""
    return {n: np.asarray(x) for n, x in apply_map.to_official(KL, kl_params()).items()}


@functools.cache
def kl_params():
    return jax.device_get(jax.jit(KL.init)(jax.random.key(3)))


def released(name):
    """Returns tensors with the shapes of a released model that take no memory."""
    return {n: np.broadcast_to(np.float32(0), shape) for n, shape in OFFICIAL[name].items()}


def write_official_trainer(path, averaged, **changes):
    """Writes a checkpoint as MAR's trainer does; the weights are the EMA weights plus 1."""
    checkpoint = {
        "model": {name: x + 1 for name, x in averaged.items()},
        "model_ema": averaged,
        "optimizer": {
            "state": {0: {"step": np.ones((), np.float32), "exp_avg": np.zeros((2, 3))}},
            "param_groups": [{"params": [0, 1], "betas": (0.9, 0.95), "weight_decay": 0.02}],
        },
        "epoch": 399,
        "scaler": {"scale": 65536.0, "_growth_tracker": 3},
        "args": argparse.Namespace(model="mar_large", img_size=256, lr=None, distributed=True),
    }
    write_nested(path, checkpoint | changes)
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Writes checkpoint-last.pth and kl.ckpt; returns their paths."""
    folder = tmp_path_factory.mktemp("official")
    write_nested(folder / "kl.ckpt", {"model": official_kl()})
    return write_official_trainer(folder / "checkpoint-last.pth", official()), folder / "kl.ckpt"


@pytest.fixture(scope="module")
def directory(files, tmp_path_factory):
    out = tmp_path_factory.mktemp("converted") / "mar"
    assert main([f"--mar={files[0]}", f"--kl={files[1]}", *FLAGS, f"--out={out}"]) == 0
    return out


def assert_close(ours, theirs):
    """Checks equality to within 1e-4 of the largest magnitude."""
    scale = np.abs(theirs).max()
    np.testing.assert_allclose(np.asarray(ours) / scale, theirs / scale, atol=1e-4, rtol=0)


def check_golden_numbers(model):
    """Checks that the public API computes the official code's numbers."""
    case = golden.case("mar_base")
    known_Bhw = case.out["mask"].reshape(2, *model.edit_shape) == 0
    z_BLC = model.hidden(case.latents_BhwZ, known_Bhw, case.label_B)
    assert_close(z_BLC, case.out["decoder_output"])
    z_NC = case.out["decoder_output"].reshape(-1, case.config.width)
    assert_close(
        model.denoise(case.out["loss.noise"], case.out["loss.t"], z_NC), case.out["net.output"]
    )


@pytest.mark.slow
def test_converted_files_reproduce_the_official_numbers_and_sample(directory):
    model = varjax.load(directory)
    assert (model.tokenizer, model.mar) == (KL, golden.case("mar_base").config)
    check_golden_numbers(model)
    asked = dict(seed=2, steps=2, diffusion_steps="3", clip_denoised=3.0)
    images_BHWC = np.asarray(model.sample([1, 9], **asked))
    assert images_BHWC.shape == (2, 8, 8, 3) and 0 <= images_BHWC.min() < images_BHWC.max() <= 1
    latents_BhwZ = model.sample_latents([1, 9], **asked)
    np.testing.assert_allclose(model.decode(latents_BhwZ), images_BHWC, atol=1e-5)
    # The two differ by the scale of the released tokenizer.
    mean_BhwZ = varjax.load_tokenizer(directory).encode(images_BHWC)["mean"]
    np.testing.assert_allclose(model.encode(images_BHWC), mean_BhwZ * 0.2325, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_without_a_tokenizer_everything_but_images_works(files, tmp_path):
    options = ["--mar_heads=3,3", "--latent_channels=4"]
    assert main([f"--mar={files[0]}", *options, f"--out={tmp_path / 'out'}"]) == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "mar.safetensors",
    ]
    model = varjax.load(tmp_path / "out")
    check_golden_numbers(model)
    asked = dict(steps=2, diffusion_steps="3", clip_denoised=3.0)
    latents_BhwZ = np.asarray(model.sample_latents([1, 9], **asked))
    assert latents_BhwZ.shape == (2, 4, 4, 4) and np.isfinite(latents_BhwZ).all()
    for needs_images in (
        lambda: model.sample([1, 9], **asked),
        lambda: model.decode(latents_BhwZ),
        lambda: model.encode(np.zeros((1, 8, 8, 3))),
        lambda: model.image_shape,
    ):
        with pytest.raises(InputError, match="has no tokenizer, .* convert it again with --kl"):
            needs_images()


def test_the_export_to_pytorch_is_exact(directory, tmp_path):
    convert_to_torch(directory, tmp_path / "torch")
    assert_official_files(tmp_path / "torch", "mar", official())
    assert_official_files(tmp_path / "torch", "tokenizer", official_kl())


@pytest.mark.slow
def test_a_run_round_trips_through_pytorch(tmp_path, capsys):
    convert_to_torch(runs.mar(), tmp_path / "torch", ema=False)
    _, tokenizer_params = read_tokenizer(runs.mar())
    std = float(tokenizer_params["latent_std"])
    note = f"note: tokenizer: latent_std is {std:.6g}, which official files do not hold; "
    assert note + "the official code has 4.30108\n" in capsys.readouterr().err
    tensors = read_checkpoint(tmp_path / "torch/mar.pth")
    shapes = {name: x.shape for name, x in tensors.items()}
    assert shapes == apply_map.official_shapes(runs.MAR)
    convert(
        tmp_path / "back",
        dict(mar_heads=(2, 2), groups=4, latent_scale=1 / std),
        mar=tmp_path / "torch/mar.pth",
        kl=tmp_path / "torch/tokenizer.pth",
    )
    _, config, params, _ = read_model(tmp_path / "back")
    assert config == runs.MAR and read_tokenizer(tmp_path / "back")[0] == runs.KL
    jax.tree.map(np.testing.assert_array_equal, params, read_model(runs.mar(), ema=False)[2])
    averaged = read_model(runs.mar())[2]["class_embed"]
    assert not np.array_equal(params["class_embed"], averaged)


@pytest.mark.parametrize(
    "change, says",
    [
        (dict(head=CategoricalHead(7)), "causal=False and a CategoricalHead has no"),
        (dict(causal=True), "causal=True and a DiffusionHead has no official"),
    ],
)
def test_variants_without_official_counterpart_are_refused(change, says):
    config = MARConfig(16, 1, 1, 2, 2, latent_map=(4, 4), classes=3, buffer_size=2, **change)
    with pytest.raises(InputError, match=says):
        apply_map.to_official(config, {})


def test_ema_weights_are_preferred(files, tmp_path, capsys):
    def class_embed(path, *flags):
        flags = (*flags, "--mar_heads=3,3", "--latent_channels=4", f"--out={tmp_path / 'out'}")
        assert main([f"--mar={path}", *flags]) == 0, capsys.readouterr().err
        return read_model(tmp_path / "out")[2]["class_embed"]

    averaged = official()["class_emb.weight"]
    np.testing.assert_array_equal(class_embed(files[0]), averaged)
    np.testing.assert_array_equal(class_embed(files[0], "--ema"), averaged)
    np.testing.assert_array_equal(class_embed(files[0], "--no-ema"), averaged + 1)
    none = write_official_trainer(tmp_path / "none.pth", official(), model_ema=None)
    np.testing.assert_array_equal(class_embed(none), averaged + 1)
    write_pth(tmp_path / "plain.pth", official())
    np.testing.assert_array_equal(class_embed(tmp_path / "plain.pth"), averaged)
    text = refused(capsys, tmp_path, f"--mar={none}", "--ema")
    assert f"{none} has no EMA weights (model_ema, ema)" in text
    only = write_official_trainer(tmp_path / "only.pth", official(), model=None)
    np.testing.assert_array_equal(class_embed(only), averaged)
    text = refused(capsys, tmp_path, f"--mar={only}", "--no-ema")
    assert f"{only}: ema=False, but it has only EMA weights (model_ema)" in text


@pytest.mark.parametrize("name", RELEASED)
def test_config_and_guidance_of_the_released_models_are_inferred(name):
    preset, guidance = RELEASED[name]
    config = MAR_MAP.infer(released(name), MAR_MAP.options())
    assert config == MARConfig.preset(preset)
    assert MAR_MAP.sampling is not None
    assert MAR_MAP.sampling(config) == MAROptions(guidance=guidance)


def test_sampling_defaults_are_written_and_suit_the_model(directory):
    sampling = json.loads((directory / "config.json").read_text())["sampling"]
    # The model has 16 tokens, so it takes at most 16 steps.
    assert config_tree.from_dict(MAROptions, sampling) == MAROptions(steps=16)
    assert varjax.load(directory).options().steps == 16


def together(mar, kl, tmp_path, **options):
    sources = {
        "tokenizer": Source(tmp_path / "kl", find_kind(kl, "kl"), kl),
        "mar": Source(tmp_path / "mar", find_kind(mar, "mar"), mar),
    }
    configs = infer_configs(sources, options)
    return configs["tokenizer"], configs["mar"]


@pytest.mark.slow
def test_the_transformer_gives_the_image_size_and_the_tokenizer_the_latent_size(tmp_path):
    kl16, mar = released("kl16"), released("mar_base")
    assert together(mar, kl16, tmp_path) == (KLConfig(), MARConfig())
    kl, wide = together(mar, kl16, tmp_path, image_size=(128, 512))
    assert (kl.image_size, wide.latent_map) == ((128, 512), (8, 32))
    # With latents of 4 channels at half resolution, tokens are 2x2 patches, and images are smaller.
    small = {n: np.broadcast_to(np.float32(0), x.shape) for n, x in official_kl().items()}
    kl, patches = together(mar, small, tmp_path, groups=4)
    assert (patches.head.patch, patches.head.channels) == (2, 4)
    assert (patches.latent_map, kl.image_size) == ((32, 32), 64)
    case = golden.case("mar_patch2").config
    options = dict(mar_heads=(3, 3), groups=4)
    kl, config = together(official("mar_patch2"), small, tmp_path, **options)
    assert config == case and kl.image_size == tuple(2 * n for n in case.latent_map)[0]


def test_a_transformer_without_a_tokenizer_takes_an_image_size():
    mar = released("mar_base")
    assert MAR_MAP.infer(mar, MAR_MAP.options(image_size=(512, 128))).latent_map == (32, 8)
    wanted = "the transformer has 256 tokens of 16x16 pixels"
    for size in (512, (256, 384), (256, 250), (0, 0), (-256, -256)):
        with pytest.raises(InputError, match=rf"image_size=.*: {wanted}, which do not form"):
            MAR_MAP.infer(mar, MAR_MAP.options(image_size=size))
    mar = {n: np.broadcast_to(np.float32(0), _longer(x.shape)) for n, x in mar.items()}
    with pytest.raises(
        InputError, match="its 288 tokens do not form a square; give --image_size=HxW"
    ):
        MAR_MAP.infer(mar, MAR_MAP.options())
    assert MAR_MAP.infer(mar, MAR_MAP.options(image_size=(256, 288))).latent_map == (16, 18)


def _longer(shape):
    """Changes a shape from 256 to 288 tokens; 320 and 352 include the 64 tokens of the buffer."""
    return tuple({256: 288, 320: 352}.get(n, n) if len(shape) == 3 else n for n in shape)


def test_settings_that_tensors_do_not_determine_are_requested():
    mar = official()
    with pytest.raises(InputError, match="4 numbers, .* 16 channels; .* or --latent_channels"):
        MAR_MAP.infer(mar, MAR_MAP.options(mar_heads=(3, 3)))
    with pytest.raises(InputError, match="4 numbers, .* of 3 channels"):
        MAR_MAP.infer(mar, MAR_MAP.options(mar_heads=(3, 3), latent_channels=3))
    for channels in (0, -1):
        with pytest.raises(InputError, match=f"latent_channels={channels}: must be 1 or more"):
            MAR_MAP.infer(mar, MAR_MAP.options(latent_channels=channels))
    with pytest.raises(InputError, match="heads is unknown for width 48; give --mar_heads"):
        MAR_MAP.infer(mar, MAR_MAP.options(latent_channels=4))
    with pytest.raises(InputError, match="decoder_heads=5: must be a divisor of width=48"):
        MAR_MAP.infer(mar, MAR_MAP.options(latent_channels=4, mar_heads=(3, 5)))
    config = MAR_MAP.infer(mar, MAR_MAP.options(latent_channels=4, mar_heads=(3, 2)))
    assert (config.encoder_heads, config.decoder_heads) == (3, 2)


def twice_as_wide_encoder(official):
    """Returns weights of an encoder twice as wide that computes the same function.

    Each half of its features is a copy of the official ones. Layer norms preserve this, and weights
    that multiply both halves are divided by 2.
    """
    ahead = ("z_proj.", "class_emb.", "fake_latent", "encoder_", "z_proj_ln.", "decoder_embed.")
    wide = {}
    for name, x in official.items():
        if not name.startswith(ahead) or name == "decoder_embed.bias":
            wide[name] = x
        elif name == "z_proj.weight":  # (out, in); the input, a token, keeps its size
            wide[name] = np.tile(x, (2, 1))
        elif name == "decoder_embed.weight":
            wide[name] = np.tile(x, (1, 2)) / 2
        elif ".attn.qkv." in name:
            tiles = (2, 2) if x.ndim == 2 else 2
            parts = [np.tile(part, tiles) for part in np.split(x, 3)]
            wide[name] = np.concatenate(parts) / (x.ndim)  # halves weights, not biases
        elif x.ndim == 2 and name.startswith("encoder_blocks."):
            wide[name] = np.tile(x, (2, 2)) / 2
        else:  # embeddings, norms and biases: only the last axis doubles
            wide[name] = np.tile(x, (*[1] * (x.ndim - 1), 2))
    return wide


def test_encoder_and_decoder_may_differ_in_width_depth_and_heads(tmp_path):
    case = golden.case("mar_base")
    wide = twice_as_wide_encoder(official())
    # Two more layers, which add zero to the residual stream.
    more = {n: x for n, x in wide.items() if n.startswith("encoder_blocks.0.")}
    depth = case.config.encoder_depth
    for i in (depth, depth + 1):
        for name, x in more.items():
            last = name.endswith(("attn.proj.weight", "attn.proj.bias", "fc2.weight", "fc2.bias"))
            wide[name.replace("blocks.0.", f"blocks.{i}.")] = 0 * x if last else x
    options = MAR_MAP.options(mar_heads=(6, 3), latent_channels=4)
    config = MAR_MAP.infer(wide, options)
    assert config == dataclasses.replace(
        case.config, width=96, decoder_width=48, encoder_heads=6, encoder_depth=depth + 2
    )
    params = apply_map.from_official(config, wide)
    back = apply_map.to_official(config, params)
    assert back.keys() == wide.keys()
    for name, x in wide.items():
        np.testing.assert_array_equal(np.asarray(back[name]), x, err_msg=name)
    model = MARPipeline(None, config, {"tokenizer": {}, "mar": params}, MAROptions(steps=2))
    known_Bhw = case.out["mask"].reshape(2, *model.edit_shape) == 0
    z_BLC = model.hidden(case.latents_BhwZ, known_Bhw, case.label_B)
    assert_close(z_BLC, case.out["decoder_output"])


def test_heads_of_encoder_and_decoder_are_inferred_from_their_own_widths():
    mar = released("mar_large") | {
        name: np.broadcast_to(np.float32(0), (*shape[:-1], 1280))
        for name, shape in OFFICIAL["mar_large"].items()
        if name == "diffusion_pos_embed_learned"
    }
    config = MAR_MAP.infer(mar, MAR_MAP.options())
    assert (config.width, config.hidden_width) == (1024, 1280)
    assert (config.encoder_heads, config.decoder_heads) == (16, 16)
    mar["diffusion_pos_embed_learned"] = np.broadcast_to(np.float32(0), (1, 256, 512))
    assert MAR_MAP.infer(mar, MAR_MAP.options()).decoder_heads == 8
    mar["diffusion_pos_embed_learned"] = np.broadcast_to(np.float32(0), (1, 256, 500))
    with pytest.raises(InputError, match="heads is unknown for width 500; give --mar_heads"):
        MAR_MAP.infer(mar, MAR_MAP.options())


def test_swapped_files_are_refused_with_the_reason(files, tmp_path, capsys):
    mar, kl = files
    refuse = functools.partial(refused, capsys, tmp_path)
    write_pth(tmp_path / "vq.pth", weights.state_dict("base", "vae"))
    write_pth(tmp_path / "var.pth", weights.state_dict("base", "var"))
    vq, var = tmp_path / "vq.pth", tmp_path / "var.pth"
    text = refuse(f"--mar={kl}", f"--kl={mar}", *FLAGS)
    assert f"{kl}: holds a KL tokenizer (AutoencoderKL), not a transformer (MAR); give it" in text
    assert f"{mar}: holds a transformer (MAR), not a KL tokenizer (AutoencoderKL); give it" in text
    text = refuse(f"--mar={var}")
    assert f"{var}: holds a transformer (VAR), not a transformer (MAR); give it as --var" in text
    text = refuse(f"--var={mar}")
    assert f"{mar}: holds a transformer (MAR), not a transformer (VAR); give it as --mar" in text
    text = refuse(f"--mar={mar}", f"--tokenizer={vq}", *FLAGS)
    assert f"{mar}: a transformer (MAR) does not read the latents of a tokenizer (VQVAE)" in text
    text = refuse(f"--mar={mar}", f"--var={var}")
    assert "--mar and --var are both models of latents" in text
    text = refuse(f"--mar={mar}", f"--kl={kl}", *FLAGS, "--latent_channels=2")
    assert f"{kl}: latent_channels=2, but its latents have 4; omit --latent_channels" in text
    text = refuse(f"--mar={mar}", f"--kl={kl}", *FLAGS, "--image_size=8x16")
    assert f"{mar}: image_size=8x16: the transformer has 16 tokens of 2x2 pixels" in text
    for heads in ("3", "3,3,3", "a,b"):
        text = refuse(f"--mar={mar}", f"--mar_heads={heads}")
        assert f"mar_heads={heads}: give the encoder's and decoder's" in text


def test_one_message_lists_the_problems_of_both_files(tmp_path, capsys):
    mar, kl = dict(official()), dict(official_kl())
    del mar["mask_token"], kl["decoder.mid.attn_1.k.bias"]
    mar["fake_latent"] = np.zeros((2, 48), np.float32)
    write_official_trainer(tmp_path / "mar.pth", mar)
    write_pth(tmp_path / "kl.pth", kl)
    text = refused(capsys, tmp_path, f"--mar={tmp_path}/mar.pth", f"--kl={tmp_path}/kl.pth", *FLAGS)
    assert "mar.pth: the tensors do not fit" in text and "missing: mask_token (1, 1, 48)" in text
    assert "misshapen: fake_latent is (2, 48), expected (1, 48)" in text
    assert "kl.pth: the tensors do not fit" in text and "decoder.mid.attn_1.k.bias (16,)" in text
    (tmp_path / "kl.pth").write_bytes(b"<html>")
    text = refused(capsys, tmp_path, f"--mar={tmp_path}/none", f"--kl={tmp_path}/kl.pth")
    assert "none: does not exist" in text and "kl.pth: this is a web page" in text
