"""Tests the choice of the evaluation crop by a run's data, the tokenizer's kind, or a flag."""

import numpy as np
import pytest

from varjax import trees
from varjax.checkpoints.weights import abstract_params
from varjax.config import config_tree
from varjax.convert.weights_dir import write_converted
from varjax.data.sources import CachedLatents, Digits, Folder
from varjax.errors import InputError
from varjax.evaluation.image_crop import choose_crop, describe_crop
from varjax.models import recipe_crop
from varjax.storage import files
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.vq.model import VQConfig

KL = KLConfig(8, width=8, channel_mult=(1, 2), blocks=1, groups=4, latent_channels=3)
VQ = VQConfig((1, 2), width=8, channel_mult=(1, 2), blocks=1, groups=4, vocab=7, code_channels=4)


def converted(folder, tokenizer, **about):
    params = {
        path: np.zeros(leaf.shape, leaf.dtype)
        for path, leaf in trees.paths(abstract_params(tokenizer)).items()
    }
    write_converted(folder, {"tokenizer": (tokenizer, params)}, {}, about=about)
    return folder


def run(folder, data, tokenizer=VQ):
    config = {
        "task": {"_type": "VARTask", "tokenizer": config_tree.to_dict(tokenizer)},
        "data": {"_type": type(data).__name__} | config_tree.to_dict(data),
    }
    files.write_json(folder / "config.json", config)
    files.write_tensors(folder / "frozen.safetensors", {"x": np.zeros(1)}, {})
    return folder


def test_the_crop_of_converted_weights_follows_from_the_kind_of_tokenizer(tmp_path):
    assert recipe_crop(converted(tmp_path / "kl", KL)) == "center"
    assert recipe_crop(converted(tmp_path / "vq", VQ)) == "random"
    assert recipe_crop(converted(tmp_path / "own", KL, crop="random")) == "random"


@pytest.mark.parametrize("crop", ["random", "center"])
def test_the_crop_of_a_run_is_that_of_its_data(crop, tmp_path):
    data = Folder("images", crop=crop)
    assert recipe_crop(run(tmp_path / "images", data)) == crop
    # Cached latents record how their images were cropped.
    about = {"settings": {"kind": "Folder"} | config_tree.to_dict(data)}
    files.write_json(tmp_path / "cache/latents.json", about)
    latents = CachedLatents(str(tmp_path / "cache"))
    assert recipe_crop(run(tmp_path / "latents", latents)) == crop
    # The run keeps a copy in case the cache is moved or deleted.
    files.write_json(tmp_path / "latents/data.json", about)
    (tmp_path / "cache/latents.json").unlink()
    assert recipe_crop(tmp_path / "latents") == crop
    gone = run(tmp_path / "gone", CachedLatents(str(tmp_path / "gone")), KL)
    assert recipe_crop(gone) == "center"
    assert recipe_crop(run(tmp_path / "digits", Digits(), VQ)) == "random"


def test_crop_flags_take_precedence_and_unknown_ones_are_refused(tmp_path):
    kl = converted(tmp_path / "kl", KL)
    assert [choose_crop(flag, kl) for flag in ("auto", "var", "adm")] == [
        "center",
        "random",
        "center",
    ]
    assert choose_crop("auto", None) == "random" and choose_crop("adm", None) == "center"
    with pytest.raises(InputError, match="crop=center: must be auto, var, adm"):
        choose_crop("center", kl)
    assert "as in ADM" in str(describe_crop("folder:x", "center"))
    assert "as in VAR" in str(describe_crop("tfds:x", "random"))
    assert describe_crop("digits", "random") is None and describe_crop("a.npz", "center") is None
