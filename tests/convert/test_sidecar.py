"""Tests that models of any settings survive the round trip through files for the official code."""

import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

import varjax
from configs._small import small_tokenizer, small_var
from configs._small_mar import small_kl_tokenizer, small_mar
from tests.helpers import runs
from tests.helpers.conversion import refused
from varjax import trees
from varjax.checkpoints.weights import abstract_params, open_weights
from varjax.config import config_flags, config_tree
from varjax.convert import convert
from varjax.convert.__main__ import main
from varjax.convert.name_maps import name_map_of
from varjax.convert.weights_dir import write_converted
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.metrics.convnet import ConvNetConfig
from varjax.metrics.resnet import ResNetConfig
from varjax.models import read_model, read_tokenizer
from varjax.storage import files
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions
from varjax.weight_files import convert_to_torch

CONFIGS = pathlib.Path(__file__).parents[2] / "configs"
NAMES = ["bag", "shirt", *"abcdefgh"]
ABOUT = {"license": "CC BY 4.0", "crop": "center", "class_names": NAMES}


def load_task(name):
    return config_flags.load_config(str(CONFIGS / name)).task


def small_tasks():
    """Returns the tasks of configs/small*.py for digits; the configs need a folder of images."""
    tokenizer, kl = small_tokenizer(Digits(), "a"), small_kl_tokenizer(Digits(), "b")
    return {
        "small_tokenizer": tokenizer.task,
        "small": small_var(Digits(), tokenizer, "c").task,
        "small_kl_tokenizer": kl.task,
        "small_mar": small_mar(Digits(), kl, "d").task,
    }


RECIPES = [
    *("digits_tokenizer.py", "digits_tokenizer.py:single_scale", "digits.py", "digits_cca.py"),
    *(
        "digits_kl_tokenizer.py",
        "digits_mar.py",
        "photos_tokenizer.py",
        "photos_tokenizer.py:cosine",
    ),
    *("tokenizer.py:512", "kl_tokenizer.py", "var.py:d16", "var.py:d36", "var_cca.py:d16"),
    *("mar.py:b", "mar.py:b,tokenizer=kl_f8", *small_tasks()),
]


def shrunk(config):
    """Returns a smaller model; only sizes that tensor shapes determine are changed."""
    sizes = {"depth": 1, "encoder_depth": 1, "decoder_depth": 1, "blocks": 1, "vocab": 16}
    sizes |= {"code_channels": 4, "classes": 10}
    if isinstance(config, VQConfig | KLConfig):
        sizes |= {"width": config.groups, "channel_mult": (1, 2)}
    elif isinstance(config, VARConfig):
        sizes["width"] = 2 * config.heads
    else:
        sizes["width"] = 2 * math.lcm(config.encoder_heads, config.decoder_heads)
        sizes["head"] = dataclasses.replace(config.head, depth=1, width=8)
    fields = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{n: x for n, x in sizes.items() if n in fields})


def drawn(config):
    """Draws random parameters that differ from the values fixed in the official code."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return np.exp(rng.normal(0, 0.1, leaf.shape)).astype(np.float32)

    return trees.map_with_path(draw, abstract_params(config))


def written(out, sampling=None, about=ABOUT, **configs):
    """Writes a converted directory of these models with random weights; returns its path."""
    models = {part: (config, trees.paths(drawn(config))) for part, config in configs.items()}
    write_converted(out, models, {}, sampling, about)
    return out


def brought_back(folder, out, *parts, **options):
    """Converts the files that `convert_to_torch` wrote."""
    kinds = {part: name_map_of(config).flag for part, config in parts}
    convert(out, options, **{flag: folder / f"{part}.pth" for part, flag in kinds.items()})
    return open_weights(out)


def assert_same(first, second):
    """Compares parameters bit for bit, configs, sampling options and metadata of the weights."""
    a, b = dict(first.config), dict(second.config)
    for config in (a, b):
        del config["sources"]
        config.pop("convert_options", None)
    assert a == b
    for file in sorted(first.path.glob("*.safetensors")):
        (x, _), (y, _) = (
            files.read_tensors(path / file.name) for path in (file.parent, second.path)
        )
        assert trees.digest(x) == trees.digest(y), file.name


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_model_of_each_config_round_trips(recipe, tmp_path):
    task = small_tasks()[recipe] if recipe in small_tasks() else load_task(recipe)
    model, sampling = shrunk(task.model), getattr(task, "sampling", None)
    part = name_map_of(model).part
    about = ABOUT if sampling else {"license": "CC BY 4.0"}
    there = written(tmp_path / "there", sampling, about, **{part: model})
    convert_to_torch(there, tmp_path / "torch")
    back = brought_back(tmp_path / "torch", tmp_path / "back", (part, model))
    assert_same(open_weights(there), back)


def test_both_models_round_trip_and_unofficial_settings_are_noted(tmp_path, capsys):
    tokenizer = dataclasses.replace(runs.KL, latent_shift=0.5)
    mar = dataclasses.replace(runs.MAR, order="raster", embed_init=0.5)
    there = written(tmp_path / "there", runs.MAR_SAMPLING, tokenizer=tokenizer, mar=mar)
    convert_to_torch(there, tmp_path / "torch")
    text = capsys.readouterr().err
    assert "note: tokenizer: change the official code before it loads these files: groups 4" in text
    assert "groups 4 instead of 32, latent_shift 0.5 instead of 0.0, width 8 instead of" in text
    assert "note: mar: change the official code before it loads these files: order raster" in text
    parts = ("tokenizer", tokenizer), ("mar", mar)
    back = brought_back(tmp_path / "torch", tmp_path / "back", *parts)
    assert_same(open_weights(there), back)
    text = capsys.readouterr().err
    assert text.count("note: ") == 2 and "mar.varjax.json" in text and "CC BY 4.0" in text
    path = tmp_path / "torch/tokenizer.varjax.json"
    good = path.read_text()
    for value in (0, -1, 1e39, 1e-46, "4"):
        files.write_json(path, json.loads(good) | {"constants": {"latent_std": value}})
        with pytest.raises(InputError, match="constants.latent_std is .*; expected a float32"):
            convert(tmp_path / "refused", kl=tmp_path / "torch/tokenizer.pth")
    path.write_text(good)
    # Flags that agree with the JSON are allowed.
    std = float(drawn(tokenizer)["latent_std"])
    options = dict(groups=4, mar_heads=(2, 2), latent_channels=3, latent_scale=1 / std)
    assert_same(back, brought_back(tmp_path / "torch", tmp_path / "again", *parts, **options))
    # 8x8 equals 8 in the JSON, and a flag is compared even if it gives the official scale.
    flags = [f"--kl={tmp_path / 'torch/tokenizer.pth'}", "--image_size=8x8"]
    assert main([*flags, f"--out={tmp_path / 'square'}"]) == 0
    with pytest.raises(InputError, match="latent_scale=0.0: .*above 0"):
        convert(tmp_path / "x", {"latent_scale": 0.0}, kl=tmp_path / "torch/tokenizer.pth")
    with pytest.raises(InputError, match="has different settings than --latent_scale"):
        convert(tmp_path / "x", {"latent_scale": 0.2325}, kl=tmp_path / "torch/tokenizer.pth")


def test_differences_from_the_official_vqvae_are_listed():
    def found(**changes):
        config = dataclasses.replace(VQConfig(), **changes)
        return name_map_of(config).official_differences(config)

    assert found() == [] and found(width=64, vocab=16, num_phi=0, scales=(1, 2)) == []
    assert found(groups=16) == ["groups 16 instead of 32"]
    assert found(channel_mult=(1, 2)) == ["channel_mult (1, 2) instead of (1, 1, 2, 2, 4)"]
    assert found(phi_ratio=0.25) == ["phi_ratio 0.25 instead of 0.5 (its argument quant_resi)"]
    assert found(scales=(1, (2, 4))) == ["maps that are not square (2x4)"]


def test_differences_from_mar_code_are_listed_for_its_tokenizer_only():
    def found(**changes):
        return name_map_of(KLConfig()).official_differences(KLConfig(**changes))

    assert found() == [] and found(channel_mult=(1, 2), latent_channels=4) == []
    sizes = {"width": 64, "blocks": 1, "image_channels": 1, "feature_channels": 4}
    sizes |= {"latent_channels": 8}
    names = ("width 64", "blocks 1", "image_channels 1", "features 4 instead of 8")
    for text, name in zip(found(**sizes), names, strict=True):
        assert text.startswith(name)
    assert found(**sizes, encoder_attention=()) == []  # latent diffusion's code has these settings


def test_classifiers_round_trip_or_are_refused_without_official_code(tmp_path):
    config = ResNetConfig(layers=(1, 1, 1, 1), classes=3, resize=250)
    there = written(tmp_path / "there", about={"license": "BSD-3"}, classifier=config)
    convert_to_torch(there, tmp_path / "torch")
    back = brought_back(tmp_path / "torch", tmp_path / "back", ("classifier", config))
    assert_same(open_weights(there), back)
    config = ConvNetConfig((8, 8), classes=3, widths=(4,))
    settings = {"_type": "ConvNetConfig", **config_tree.to_dict(config)}
    files.write_json(tmp_path / "own/config.json", {"classifier": settings, "sources": {}})
    files.write_tensors(tmp_path / "own/classifier.safetensors", drawn(config), {})
    with pytest.raises(InputError, match="classifier is a ConvNetConfig, which only varjax has"):
        convert_to_torch(tmp_path / "own", tmp_path / "refused")


def test_the_diffusers_layout_round_trips(tmp_path):
    there = written(tmp_path / "there", about={"license": "MIT"}, tokenizer=runs.KL)
    convert_to_torch(there, tmp_path / "diffusers", layout="diffusers")
    file = tmp_path / "diffusers/diffusion_pytorch_model.safetensors"
    convert(tmp_path / "back", kl=file)
    assert_same(open_weights(there), open_weights(tmp_path / "back"))


def test_a_sidecar_of_another_file_or_model_is_refused(tmp_path, capsys):
    folder, path = tmp_path / "torch", tmp_path / "torch/tokenizer.varjax.json"
    convert_to_torch(written(tmp_path / "there", about={}, tokenizer=runs.TOKENIZER), folder)
    good = json.loads(path.read_text())
    flag = f"--tokenizer={folder / 'tokenizer.pth'}"

    def reason(*flags, **changes):
        path.write_text(json.dumps(good | changes))
        return refused(capsys, tmp_path, flag, *flags)

    other = {"tokenizer.pth": "0" * 64}
    text = reason(sha256=other)
    assert f"{path}: belongs to another tokenizer.pth: the file's SHA-256 differs" in text
    assert 'delete "sha256" from the JSON' in text
    assert "describes a KL tokenizer" in reason(kind="kl") and "describes 'x'" in reason(kind="x")
    assert "config is None; expected a dict" in reason(config=None)
    assert "describes a model of " in reason(config=good["config"] | {"vocab": 17})
    assert "groups=3" in reason(config=good["config"] | {"groups": 3})
    assert "nonsense" in reason(config=good["config"] | {"nonsense": 3})
    assert "constants are ['latent_std']; expected []" in reason(constants={"latent_std": 1.0})
    # Flags are compared even if they equal the defaults.
    for flags in (["--groups=2"], ["--groups=32"], ["--scales=1,2,3"]):
        name = flags[0].partition("=")[0]
        text = reason(*flags)
        assert f"has different settings than {name}; omit {name}, or delete the JSON" in text
    config = good["config"] | {"phi_ratio": 0.25}
    assert "different settings than --phi_ratio" in reason("--phi_ratio=0.5", config=config)
    path.write_text("[]")
    assert "not a JSON object" in refused(capsys, tmp_path, flag)
    # Fine-tuned weights have another SHA-256; without "sha256", the JSON fits any file.
    path.write_text(json.dumps({name: x for name, x in good.items() if name != "sha256"}))
    assert main([flag, f"--out={tmp_path / 'back'}"]) == 0
    assert read_tokenizer(tmp_path / "back")[0] == runs.TOKENIZER


@pytest.mark.slow
def test_a_round_tripped_model_samples_the_same_images(tmp_path):
    """Groups, guidance and temperatures differ from those of the official code."""
    options = VAROptions(guidance=3.0, top_k=7, temperature=(1.5, 1.0, 0.5))
    there = written(tmp_path / "there", options, tokenizer=runs.TOKENIZER, var=runs.VAR)
    convert_to_torch(there, tmp_path / "torch")
    parts = ("tokenizer", runs.TOKENIZER), ("var", runs.VAR)
    brought_back(tmp_path / "torch", tmp_path / "back", *parts)
    first, second = (varjax.load(tmp_path / name) for name in ("there", "back"))
    labels = ["shirt", 7]
    np.testing.assert_array_equal(first.sample(labels, seed=3), second.sample(labels, seed=3))
    assert read_model(tmp_path / "back")[3] == options
