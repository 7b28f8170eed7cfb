"""Tests the conversion of the KL tokenizer's official files in both directions."""

import functools
import json

import jax
import numpy as np
import pytest

import varjax
from tests.golden import weights
from tests.helpers import golden_kl as golden
from tests.helpers.checkpoint_files import write_nested
from tests.helpers.conversion import assert_official_files, refused
from varjax.checkpoints.weights import abstract_params
from varjax.convert import apply_map, convert
from varjax.convert.__main__ import main
from varjax.convert.from_torch import find_kind
from varjax.convert.name_maps.kl import KL_MAP
from varjax.convert.pth.write import write_pth
from varjax.models import read_tokenizer
from varjax.tokenizers.kl.model import KLConfig
from varjax.weight_files import convert_to_torch

KL16 = json.loads((weights.HERE / "official_mar_state_dicts.json").read_text())["kl16"]


@pytest.fixture
def kl(tmp_path):
    """Writes the golden case in the layout of kl16.ckpt; returns its path."""
    write_nested(tmp_path / "kl.ckpt", {"model": golden.official()})
    return tmp_path / "kl.ckpt"


def test_the_name_map_matches_the_released_model():
    expected = {name: tuple(shape) for name, shape in KL16.items()}
    assert apply_map.official_shapes(KLConfig()) == expected
    tensors = {name: np.broadcast_to(np.float32(0), shape) for name, shape in expected.items()}
    kind = find_kind(tensors, "kl")
    assert kind.infer(tensors, KL_MAP.options()) == KLConfig()
    other = KL_MAP.options(image_size=(512, 256), groups=16)
    assert kind.infer(tensors, other) == KLConfig((512, 256), groups=16)


@pytest.mark.slow
def test_official_files_round_trip_exactly(kl, tmp_path):
    flags = [f"--kl={kl}", "--image_size=64", f"--out={tmp_path / 'out'}"]
    assert main(flags) == 0
    config, params = read_tokenizer(tmp_path / "out")
    assert config == golden.config()
    jax.tree.map(np.testing.assert_array_equal, params, golden.params())
    np.testing.assert_allclose(params["latent_std"], 1 / 0.2325, rtol=1e-6)
    convert_to_torch(tmp_path / "out", tmp_path / "torch")
    assert_official_files(tmp_path / "torch", "tokenizer", golden.official())


def test_query_key_and_value_kernels_are_concatenated():
    kernel = golden.params()["encoder"]["mid_attn_1"]["qkv"]["kernel"]
    for i, name in enumerate("qkv"):
        official = golden.official()[f"encoder.mid.attn_1.{name}.weight"]
        part = kernel[0, 0, :, i * 512 : (i + 1) * 512]
        np.testing.assert_array_equal(part, official[:, :, 0, 0].T)


@pytest.mark.slow
def test_tokenizers_in_latent_diffusion_checkpoints_are_read(tmp_path, capsys):
    """The tokenizer comes with its loss networks, or as the first stage of a diffusion model."""
    rest = {"loss.logvar": np.zeros((), np.float32), "loss.discriminator.w": np.zeros(3)}
    write_nested(tmp_path / "ldm.ckpt", {"state_dict": golden.official() | rest})
    convert(tmp_path / "out", dict(image_size=64, latent_scale=0.5), kl="ldm.ckpt")
    assert "ldm.ckpt: not part of a KL tokenizer (AutoencoderKL), left out: loss\n" in said(capsys)
    assert read_tokenizer(tmp_path / "out")[1]["latent_std"] == 2
    whole = {f"first_stage_model.{n}": x for n, x in (golden.official() | rest).items()}
    whole |= {"model.diffusion_model.w": np.zeros(3), "first_stage_model.loss.x": np.zeros(1)}
    write_nested(tmp_path / "whole.ckpt", {"state_dict": whole})
    convert(tmp_path / "whole", dict(image_size=64), kl="whole.ckpt")
    params = read_tokenizer(tmp_path / "whole")[1]
    jax.tree.map(np.testing.assert_array_equal, params, golden.params())
    assert "model" in said(capsys)


def said(capsys):
    return capsys.readouterr().err


def test_wrong_kinds_and_settings_are_refused_with_the_reason(kl, tmp_path, capsys):
    refuse = functools.partial(refused, capsys, tmp_path)
    write_pth(tmp_path / "vq.pth", weights.state_dict("base", "vae"))
    write_pth(tmp_path / "var.pth", weights.state_dict("base", "var"))
    vq, var = tmp_path / "vq.pth", tmp_path / "var.pth"
    text = refuse(f"--tokenizer={kl}")
    assert f"{kl}: holds a KL tokenizer (AutoencoderKL), not a tokenizer (VQVAE)" in text
    assert "give it as --kl instead" in text
    text = refuse(f"--kl={vq}")
    assert f"{vq}: holds a tokenizer (VQVAE), not a KL tokenizer" in text
    assert "give it as --tokenizer instead" in text
    text = refuse(f"--kl={kl}", f"--tokenizer={vq}")
    assert "--tokenizer and --kl both give the tokenizer; omit one of them" in text
    text = refuse(f"--kl={kl}", "--image_size=64", f"--var={var}")
    assert "a transformer (VAR) does not read the latents of a KL tokenizer" in text
    assert "latent_scale=0.0: must be above 0" in refuse(f"--kl={kl}", "--latent_scale=0")
    assert "image_size=60: 5 levels halve" in refuse(f"--kl={kl}", "--image_size=60")
    for size in ("6x", "64x64x64", "big"):
        text = refuse(f"--kl={kl}", f"--image_size={size}")
        assert f"image_size={size}: give pixels like 256, or 256x384" in text


def test_every_problem_is_listed(tmp_path):
    tensors = dict(golden.official())
    del tensors["decoder.mid.attn_1.k.bias"]
    tensors["encoder.down.4.attn.0.q.weight"] = np.zeros((512, 1, 1, 1), np.float32)
    with pytest.raises(ValueError) as error:
        apply_map.lazy_leaves(golden.config(), tensors)
    assert "missing: decoder.mid.attn_1.k.bias (512,)" in str(error.value)
    assert "encoder.down.4.attn.0.q.weight is (512, 1, 1, 1), expected" in str(error.value)


@pytest.mark.slow
def test_converted_weights_encode_like_the_reference(kl, tmp_path):
    convert(tmp_path / "out", dict(image_size=(64, 64)), kl=kl)
    tokenizer = varjax.load_tokenizer(tmp_path / "out")
    assert tokenizer.config.image_shape == (64, 64, 3)
    latents = tokenizer.encode((golden.image() + 1) / 2)
    expected = golden.outputs()["mean"]
    np.testing.assert_allclose(
        latents["mean"], expected, rtol=1e-4, atol=1e-4 * abs(expected).max()
    )
    assert abstract_params(tokenizer.config).keys() == tokenizer.params.keys()
