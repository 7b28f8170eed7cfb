"""Tests `varjax.load_tokenizer` and the contract of tokenizers."""

import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import varjax
from tests.helpers import forked, runs
from tests.helpers.paths import ROOT
from varjax.checkpoints.weights import read_frozen_tokenizer
from varjax.config import config_tree
from varjax.errors import InputError
from varjax.models import LoadedTokenizer
from varjax.storage import files
from varjax.tokenizers.contract import Tokenizer
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.vq.model import bound_quantizer, decode_features, quantize_images
from varjax.weight_files import convert_to_torch

CONFIG: Tokenizer = runs.TOKENIZER
KL = KLConfig(8, 1, width=8, channel_mult=(1, 2), blocks=1, groups=4, latent_channels=3)
IMAGES_BHWC = np.random.default_rng(0).integers(0, 256, (2, *CONFIG.image_shape), np.uint8)
IMPORTED = """
import sys
import varjax
varjax.load_tokenizer
print(*sorted(name for name in sys.modules if name.startswith("varjax.")))
"""


def drawn(config=CONFIG):
    """Draws parameters with NumPy, because compiling `init` is slow."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(config.init, jax.random.key(0))
    return jax.tree.map(lambda x: np.float32(rng.normal(0, 0.2, x.shape)), shapes)


@pytest.fixture(scope="module")
def loaded():
    return LoadedTokenizer(CONFIG, drawn())


@pytest.mark.slow
def test_a_tokenizer_loads_from_every_kind_of_directory(tmp_path):
    params, data = drawn(), config_tree.to_dict(CONFIG)
    for name, file, config in (
        ("converted", "tokenizer", {"sources": {}, "tokenizer": data}),
        ("built_on", "frozen", {"task": {"_type": "VARTask", "tokenizer": data}}),
    ):
        files.write_json(tmp_path / name / "config.json", config)
        files.write_tensors(tmp_path / name / f"{file}.safetensors", params, {})
        found = varjax.load_tokenizer(tmp_path / name)
        assert found.config == CONFIG
        jax.tree.map(np.testing.assert_array_equal, found.params, params)
        with pytest.raises(InputError, match="ema=True: the tokenizer of .* has one set"):
            varjax.load_tokenizer(tmp_path / name, ema=True)
    with pytest.raises(InputError, match=r"built_on@9: the run has checkpoints of steps \[\]"):
        varjax.load_tokenizer(f"{tmp_path}/built_on@9")
    assert varjax.load_tokenizer(runs.tokenizer()).config == CONFIG
    files.write_json(tmp_path / "other/config.json", {"task": {"_type": "TinyTask"}})
    with pytest.raises(ValueError, match="other is a run of TinyTask, which has no tokenizer"):
        varjax.load_tokenizer(tmp_path / "other")


@pytest.mark.slow
def test_latents_match_the_module_and_latent_spec(loaded):
    latents = loaded.encode(IMAGES_BHWC)
    (spec,) = CONFIG.latent_spec.values()
    assert {name: x.shape for name, x in latents.items()} == {"tokens": (2, *spec.shape)}
    assert spec.shape == (21,)
    tokenizer, x_BHWC = runs.TOKENIZER, IMAGES_BHWC.astype(np.float32) / 127.5 - 1
    tokens_BL = jax.jit(lambda x: quantize_images(tokenizer, loaded.params, x).tokens_BL)(x_BHWC)
    np.testing.assert_array_equal(latents["tokens"], tokens_BL)
    assert len(np.unique(tokens_BL)) > 2
    f_hat_BhwZ = bound_quantizer(tokenizer, loaded.params).accumulated_scales(tokens_BL)[-1]
    decoded_BHWC = jax.jit(lambda f: decode_features(tokenizer, loaded.params, f))(f_hat_BhwZ)
    expected_BHWC = (np.asarray(decoded_BHWC) + 1) / 2
    np.testing.assert_allclose(loaded.decode(latents), expected_BHWC, atol=1e-6)
    stored = {"tokens": np.asarray(tokens_BL, CONFIG.latent_spec["tokens_BL"].dtype)}
    np.testing.assert_allclose(loaded.decode(stored), expected_BHWC, atol=1e-6)


def test_floats_from_zero_to_one_encode_like_uint8(loaded):
    of_floats = loaded.encode(IMAGES_BHWC.astype(np.float32) / 255)
    np.testing.assert_array_equal(of_floats["tokens"], loaded.encode(IMAGES_BHWC)["tokens"])


def test_large_vocabularies_are_stored_as_uint32():
    for vocab, dtype in ((2**16, np.uint16), (2**16 + 1, np.uint32)):
        assert varjax.VQConfig(vocab=vocab).latent_spec["tokens_BL"].dtype == dtype


def test_a_changed_weight_changes_the_identity():
    params, config = drawn(), runs.TOKENIZER
    before = config.identity(params)
    assert before == config.identity(drawn()) and before["vocab"] == config.vocab
    params["quantizer"]["codebook"][0, 0] += 1
    assert config.identity(params) != before


def test_invalid_images_and_latents_are_refused(loaded):
    for images, message in (
        (IMAGES_BHWC[0], r"shape \(8, 8, 1\); needed is \(B, \*\(8, 8, 1\)\)"),
        (IMAGES_BHWC.astype(np.int32), "images are int32; give uint8 or floats"),
        (IMAGES_BHWC.astype(np.float32), "images range from 0 to 2.*; give uint8, or floats"),
        (IMAGES_BHWC / np.float32(127.5) - 1, "images range from -1 to 0.9.*; give"),
    ):
        with pytest.raises(ValueError, match=message):
            loaded.encode(images)
    for latents in ({"tokens_BL": np.zeros((2, 21))}, {"tokens": np.zeros((2, 20))}):
        with pytest.raises(ValueError, match=r"needed are {'tokens': \(21,\)}"):
            loaded.decode(latents)


@pytest.mark.slow
def test_decoding_needs_only_the_first_array(loaded):
    tokens_BL = loaded.encode(IMAGES_BHWC)["tokens"]
    np.testing.assert_array_equal(loaded.decode(tokens_BL), loaded.decode({"tokens": tokens_BL}))
    kl = LoadedTokenizer(KL, drawn(KL))
    latents = kl.encode(IMAGES_BHWC)
    assert {name: x.shape for name, x in latents.items()} == {
        "mean": (2, 4, 4, 3),
        "std": (2, 4, 4, 3),
    }
    expected_BHWC = kl.decode(latents)
    for part in (latents["mean"], {"mean": latents["mean"]}):
        np.testing.assert_allclose(kl.decode(part), expected_BHWC, atol=1e-6)
    for part in ({"std": latents["std"]}, latents | {"extra": tokens_BL}, tokens_BL):
        with pytest.raises(ValueError, match="needed are {'mean'"):
            kl.decode(part)


@pytest.mark.parametrize("config", [CONFIG, KL])
def test_the_kind_of_tokenizer_follows_from_its_settings(config, tmp_path):
    settings = {"sources": {}, "tokenizer": config_tree.to_dict(config)}
    files.write_json(tmp_path / "config.json", settings)
    files.write_tensors(tmp_path / "tokenizer.safetensors", drawn(config), {})
    assert varjax.load_tokenizer(tmp_path).config == config


def test_load_tokenizer_does_not_import_training():
    command = [sys.executable, "-c", IMPORTED]
    found = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout
    names = found.split()
    assert "varjax.tokenizers.vq.model" in names
    assert not [n for n in names if n.startswith(("varjax.training", "varjax.tokenizers.vq.task"))]


@pytest.mark.slow
def test_a_damaged_checkpoint_error_says_what_to_do(tmp_path):
    shutil.copytree(runs.tokenizer(), tmp_path / "run")
    large = [path for path in (tmp_path / "run/checkpoints").rglob("d/*") if path.is_file()]
    assert large
    for path in large:
        path.write_bytes(path.read_bytes()[:9])
    # In a separate process, so that stderr contains only the error.
    read = forked.run(
        [sys.executable, "-c", f"import varjax; varjax.load_tokenizer({str(tmp_path / 'run')!r})"],
        capture_output=True, text=True, cwd=ROOT,
    )  # fmt: skip
    assert read.returncode
    said = r"InputError: no checkpoint .* can be read:\s+checkpoint 2 cannot be read: .+\n.*"
    assert re.search(said + "Without .*/checkpoints, the run starts again", read.stderr)
    assert read.stderr.count("Traceback") == 1 and "loop is closed" not in read.stderr, read.stderr
    assert "never retrieved" not in read.stderr


@pytest.mark.slow
def test_using_an_unfinished_tokenizer_run_is_noted(tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(runs.tokenizer(), run)
    read_frozen_tokenizer(str(run), runs.TOKENIZER)
    assert not capsys.readouterr().err
    config = files.read_json(run / "config.json")
    # The note also appears if the length was given in epochs.
    in_epochs = {"steps": 0, "epochs": 1.0, "plan": config["plan"] | {"steps": 40}}
    for longer in ({"steps": 40, "plan": None}, in_epochs):
        files.write_json(run / "config.json", config | longer)
        read_frozen_tokenizer(str(run), runs.TOKENIZER)
        assert "is at step 2 of 40" in capsys.readouterr().err


@pytest.mark.parametrize("ema", [True, False])
def test_ema_is_refused_for_a_single_set_of_weights(ema, tmp_path):
    for read in (
        varjax.load,
        varjax.load_tokenizer,
        lambda weights, ema: convert_to_torch(weights, tmp_path / "out", ema),
    ):
        with pytest.raises(ValueError, match=f"ema={ema}: .* has one set of weights.*; omit it"):
            read(runs.untrained_var(), ema=ema)
    assert not (tmp_path / "out").exists()
