import dataclasses
import pathlib

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny
from varjax.data.latents import CachedLatents
from varjax.data.sources import folder
from varjax.data.sources.folder import Folder
from varjax.errors import InputError
from varjax.runtime import reproducibility
from varjax.storage import files
from varjax.training import run_dir as checks
from varjax.training.run_dir import check_config, check_or_write_data, write_config


@dataclasses.dataclass(frozen=True)
class Task:
    """Has changeable fields like those of a transformer's task."""

    tokenizer_weights: str = "here"
    compute: tiny.AdamW = tiny.AdamW()  # any nested settings
    width: int = 4
    plan: tiny.Plan = tiny.Plan()


def experiment(run_dir, **changes):
    return dataclasses.replace(tiny.experiment(run_dir), task=Task(**changes))


def test_settings_that_do_not_affect_the_steps_may_change(tmp_path):
    write_config(experiment(tmp_path))
    compute = tiny.AdamW(clip=1.0)
    changed = experiment(tmp_path, tokenizer_weights="there", compute=compute)
    check_config(changed)
    write_config(changed)
    assert files.read_json(tmp_path / "config.json")["task"]["tokenizer_weights"] == "there"
    with pytest.raises(ValueError, match="task.width: 4 in the run, 5 in the config") as error:
        check_config(experiment(tmp_path, width=5, tokenizer_weights="elsewhere"))
    assert "elsewhere" not in str(error.value)


def test_a_field_newer_than_the_run_must_keep_its_default(tmp_path):
    write_config(experiment(tmp_path))
    path = tmp_path / "config.json"
    config = files.read_json(path)
    del config["task"]["width"], config["seed"]
    files.write_json(path, config)
    with pytest.raises(ValueError, match="task.width: absent in the run, 5 in the config"):
        check_config(experiment(tmp_path, width=5))
    check_config(experiment(tmp_path))
    write_config(experiment(tmp_path))
    assert files.read_json(path)["task"]["width"] == 4


def test_images_of_a_run_may_move_but_not_change(tmp_path):
    def run_on(root, held_out="val"):
        data = Folder(root, held_out=held_out)
        e = dataclasses.replace(experiment(tmp_path / "run"), data=data)
        write_config(e)
        check_or_write_data(e)

    def put(path):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)

    for path in ("x/train/dog/1.png", "x/train/cat/1.png", "x/val/cat/1.png"):
        put(path)
    run_on("x")
    about = files.read_json(tmp_path / "run/data.json")
    assert about["class_names"] == ["cat", "dog"] and about["train"]["images"] == 2
    pathlib.Path("x").rename("moved")
    put("moved/val/dog/1.png")
    run_on("moved")  # the steps stay the same, even with more held-out images
    assert files.read_json(tmp_path / "run/data.json")["held_out"]["images"] == 2
    put("moved/train/dog/2.png")
    with pytest.raises(ValueError, match=r"other images:\n  train.images: 2 in the run, 3 in"):
        run_on("moved")
    pathlib.Path("moved/train/dog").rename("moved/train/wolf")
    pathlib.Path("moved/val/dog").rename("moved/val/wolf")
    with pytest.raises(ValueError, match="class_names.*dog.*wolf"):
        run_on("moved")


def test_a_run_refuses_latents_made_with_other_settings(tmp_path):
    about = {
        "tokenizer_identity": {"weights": "ab"},
        "latent_spec": {"tokens_BL": {"shape": [5], "dtype": "uint16"}},
        "data": {"class_names": ["cat"], "train": {"images": 2}, "held_out": {"images": 1}},
        "settings": {"kind": "Folder", "crop": "random", "flip": True},
        "classes": 1,
        "image_shape": [8, 8, 3],
        "seed": 0,
        "images": {"train": 2, "held_out": 1},
        "augmentations": {"train": 2, "held_out": 1},
        "shards": {"train": 1, "held_out": 1},
    }

    def run_on(name, **changes):
        files.write_json(tmp_path / name / "latents.json", about | changes)
        data = CachedLatents(str(tmp_path / name))
        check_or_write_data(dataclasses.replace(experiment(tmp_path / "run"), data=data))

    run_on("a")
    run_on("moved")
    other = {"settings": about["settings"] | {"crop": "center"}}
    with pytest.raises(InputError, match="settings.crop: 'random' in the run, 'center' in"):
        run_on("b", **other)
    stored = {"tokens_BL": {"shape": [5], "dtype": "int32"}}
    with pytest.raises(InputError, match="dtype: 'uint16' in the run, 'int32' in"):
        run_on("c", latent_spec=stored)
    path = tmp_path / "run/data.json"
    old = {k: v for k, v in files.read_json(path).items() if k not in ("settings", "latent_spec")}
    files.write_json(path, old)  # written by an older version, without these entries
    run_on("b", **other)
    assert files.read_json(path)["settings"]["crop"] == "center"


def test_a_numpy_that_draws_different_numbers_is_refused(tmp_path, monkeypatch):
    e = tiny.experiment(tmp_path)
    check_or_write_data(e)
    monkeypatch.setattr(np, "__version__", "9.0")  # another version that draws the same numbers
    check_or_write_data(e)
    monkeypatch.setattr(checks, "random_numbers_digest", lambda: "0123")
    with pytest.raises(InputError, match="which draws different random numbers than 9.0"):
        check_or_write_data(e)


def test_a_pillow_that_makes_different_pixels_is_refused(tmp_path, monkeypatch):
    for path in ("x/train/cat/1.png", "x/val/cat/1.png"):
        pathlib.Path(path).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8)).save(path)
    e = dataclasses.replace(experiment(tmp_path / "run"), data=Folder("x"))
    check_or_write_data(e)
    path = tmp_path / "run/data.json"
    whole = files.read_json(path)
    assert whole["pixels"] == reproducibility.pixels_digest()
    monkeypatch.setattr(folder, "pixels_digest", lambda: "0123")
    version = reproducibility.versions()["pillow"]
    with pytest.raises(
        InputError, match=f"Pillow {version}, which decodes or resizes images to different"
    ):
        check_or_write_data(e)
    old = {k: v for k, v in whole.items() if k not in ("pixels", "starts", "jax", "numpy")}
    files.write_json(path, old)  # written by an older version of varjax
    check_or_write_data(e)
    assert files.read_json(path)["pixels"] == "0123"


def test_different_jax_draws_are_reported_and_versions_recorded(tmp_path, monkeypatch, capsys):
    e = tiny.experiment(tmp_path)
    check_or_write_data(e)
    check_or_write_data(e)
    assert "JAX" not in capsys.readouterr().err
    with jax.threefry_partitionable(False):
        check_or_write_data(e)
        said = capsys.readouterr().err
        assert (
            "JAX draws different random numbers" in said
            and "partitionable True before, False" in said
        )
        check_or_write_data(e)
        assert "JAX" not in capsys.readouterr().err
    monkeypatch.setattr(checks, "MAX_STARTS", 3)
    monkeypatch.setattr(checks, "versions", lambda: {"python": "3.99"})
    first, *_ = files.read_json(tmp_path / "data.json")["starts"]
    assert first.keys() == {"time", "python", "jax", "jaxlib", "numpy", "pillow"}
    for _ in range(5):
        check_or_write_data(e)
    starts = files.read_json(tmp_path / "data.json")["starts"]
    assert starts[0] == first and [s["python"] for s in starts[1:]] == ["3.99"] * 4
