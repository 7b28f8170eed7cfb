import errno
import os
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers.paths import ROOT
from varjax.data import photos
from varjax.data.sources import TFDS, Digits, parse_dataset
from varjax.data.sources.folder import Folder
from varjax.errors import InputError, StorageError
from varjax.storage.image_files import BrokenImage

SHADE = {"ant": 10, "bee": 100, "cat": 200}


def put(*paths):
    """Writes small images whose gray value encodes the class in their path."""
    for path in map(pathlib.Path, paths):
        path.parent.mkdir(parents=True, exist_ok=True)
        shade = next((SHADE[part] for part in path.parts if part in SHADE), 50)
        Image.new("L", (9, 7), shade).save(path, "png")


def paths(folder, split="train"):
    return folder.source(split).listing.paths


@pytest.fixture
def official():
    put("x/train/bee/2.JPEG", "x/train/bee/10.png", "x/train/ant/deeper/still/1.webp")
    put("x/train/ant/b.jpg", "x/val/bee/1.jpg", "x/train/.hidden/1.jpg", "x/train/bee/.1.jpg")
    pathlib.Path("x/train/notes.txt").write_text("no image")
    pathlib.Path("x/train/bee/list.txt").write_text("no image")
    return Folder("x", size=4)


def test_train_and_val_folders_are_the_splits(official):
    assert official.class_names == ("ant", "bee") and official.classes == 2
    below = ["ant/b.jpg", "ant/deeper/still/1.webp", "bee/10.png", "bee/2.JPEG"]
    assert paths(official) == [f"train/{path}" for path in below]
    assert paths(official, "held_out") == ["val/bee/1.jpg"]
    source = official.source("train")
    for i, label in enumerate([0, 0, 1, 1]):
        image_HWC, shade = source[i]["image"], SHADE[official.class_names[label]]
        assert source[i]["label"] == label and np.all(image_HWC == shade)
        assert image_HWC.shape == (7, 9, 3)
    assert official.source("held_out")[0]["label"] == 1  # classes go by name, though val has no ant
    copy = pickle.loads(pickle.dumps(official.source("train")))
    np.testing.assert_array_equal(copy[3]["image"], source[3]["image"])


def test_batches_have_the_requested_shape(official):
    data = Folder("x", size=(4, 6), channels=1)
    batch = data.make(4, seed=0).train_batch(0)
    assert batch["image_BHWC"].shape == (4, 4, 6, 1) == (4, *data.image_shape)
    shades = {0: SHADE["ant"], 1: SHADE["bee"]}
    for image_HWC, label in zip(batch["image_BHWC"], batch["label_B"], strict=True):
        assert np.all(image_HWC == shades[label])


def test_without_splits_a_fraction_is_held_out_that_new_files_do_not_change():
    names = [f"x/{name}/{i}.png" for name in SHADE for i in range(40)]
    put(*names)
    before = Folder("x", held_out=0.3)
    held_out, train = set(paths(before, "held_out")), set(paths(before))
    assert before.class_names == tuple(SHADE)
    assert not held_out & train and held_out | train == {name[2:] for name in names}
    assert 0.15 < len(held_out) / len(names) < 0.45
    assert len(paths(Folder("x"), "held_out")) < len(held_out)
    put("x/ant/0a.png", "x/cat/new.png")
    after = Folder("x", held_out=0.3)
    assert held_out <= set(paths(after, "held_out")) and train <= set(paths(after))
    larger = Folder("x", held_out=0.5)
    assert held_out < set(paths(larger, "held_out"))


def test_flat_and_unconditional_folders_have_one_class(official):
    put(*(f"flat/{i}.png" for i in range(30)))
    flat = Folder("flat", held_out=0.3)
    assert flat.classes == 1 and len(paths(flat)) + len(paths(flat, "held_out")) == 30
    assert {flat.source("train")[i]["label"] for i in range(len(paths(flat)))} == {0}
    everything = Folder("x", unconditional=True)
    assert everything.class_names == flat.class_names
    assert len(paths(everything)) == 4 and paths(everything, "held_out") == ["val/bee/1.jpg"]
    put("y/train/1.png", "y/val/1.png")  # splits without class folders
    assert paths(Folder("y")) == ["train/1.png"] and paths(Folder("y"), "held_out")


def test_another_folder_or_a_fraction_of_train_can_be_held_out(official):
    put("x/test/ant/1.png")
    assert paths(Folder("x", held_out="test"), "held_out") == ["test/ant/1.png"]
    put(*(f"x/train/{name}/{i}.png" for name in ("ant", "bee") for i in range(20)))
    shared = Folder("x", held_out=0.3)
    assert all(path.startswith("train/") for path in paths(shared, "held_out"))


def test_a_tilde_stands_for_the_home_folder(official, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert paths(Folder("~/x", size=4)) == paths(official)


def test_a_run_folder_among_the_images_is_refused(official, tmp_path):
    """At the next start, it would be taken for a class."""
    official.check_outside("run_dir", "x/runs")
    official.check_outside("run_dir", "x/train/.cache/run")  # hidden, so no class
    one_folder = Folder("x/train", held_out=0.5)
    for data, inside in (
        (official, "x/train/runs"),
        (official, tmp_path / "x/val/bee/runs"),
        (one_folder, "x/train/runs"),
        (one_folder, "x/train"),
    ):
        with pytest.raises(InputError, match=f"run_dir={inside}: is inside"):
            data.check_outside("run_dir", inside)
    one_folder.check_outside("run_dir", "x/training")


def test_links_are_followed_but_cycles_are_refused(official):
    put("elsewhere/cat/1.png")
    pathlib.Path("x/train/cat").symlink_to(pathlib.Path("elsewhere/cat").resolve())
    pathlib.Path("x/train/bee/3.png").symlink_to(pathlib.Path("elsewhere/cat/1.png").resolve())
    linked = Folder("x")
    assert paths(linked)[-3:] == ["train/bee/2.JPEG", "train/bee/3.png", "train/cat/1.png"]
    pathlib.Path("x/train/cat/back").symlink_to(pathlib.Path("elsewhere").resolve())
    with pytest.raises(ValueError, match="cat/back/cat is a link to a folder that contains it"):
        paths(Folder("x"))


def test_links_that_multiply_the_paths_of_an_image_are_refused(official):
    for i in range(20):
        put(f"levels/{i}/0.png")
        for name in "ab":
            pathlib.Path(f"levels/{i}/{name}").symlink_to(f"../{i + 1}")
    put("levels/20/0.png")
    pathlib.Path("x/train/bee/levels").symlink_to(pathlib.Path("levels/0").resolve())
    with pytest.raises(InputError, match="reached by more than 64 ways through links"):
        paths(Folder("x"))


def test_broken_and_missing_images_are_reported_by_path(official):
    source = official.source("train")
    pathlib.Path("x/train/ant/b.jpg").write_bytes(b"")
    pathlib.Path("x/train/bee/2.JPEG").unlink()
    for index, name in ((0, "x/train/ant/b.jpg"), (3, "x/train/bee/2.JPEG")):
        with pytest.raises(BrokenImage) as caught:
            source[index]
        assert caught.value.name == name
    assert source[2]["label"] == 1


def test_invalid_folders_are_refused(official):
    def refused(message, root="x", **options):
        with pytest.raises(ValueError, match=message):
            Folder(root, **options).describe()

    refused("root is empty", "")
    refused("cannot list the images in 'nowhere': No such", "nowhere")
    refused("held_out is 'test', but x has no folders train and test", held_out="test")
    refused("held_out=1.0: must be a folder, or a fraction between 0 and 1", held_out=1.0)
    pathlib.Path("x/train/dog").mkdir()
    refused("no training images of 1 classes: dog")
    put("x/val/cat/1.png")
    refused("val has classes that train lacks: cat")
    pathlib.Path("empty").mkdir()
    refused("empty has no images; known are .jpg", "empty")
    put("mixed/1.png", "mixed/ant/1.png")
    refused("mixed.* holds images .*1.png.* and folders .*ant.*unconditional", "mixed")
    put("unsorted/train/ant/1.png", "unsorted/val/1.png")
    refused("val holds images, but no class folders", "unsorted")
    put("vehicles/bus/1.png", "vehicles/train/1.png")
    refused("has a folder train, but no folder val: bus, train", "vehicles")
    put("few/1.png", "few/2.png")
    refused("no images to hold out: held_out=0.05 chose none", "few")
    with pytest.raises(ValueError) as caught:
        Folder("few").source("train")
    share = re.search(r"held_out=(0\.\d+) or more", str(caught.value))
    assert share is not None
    assert len(Folder("few", held_out=float(share[1])).source("held_out")) == 1


def test_a_description_depends_on_the_images_but_not_on_the_root(official):
    before = official.describe()
    assert before["class_names"] == ["ant", "bee"] and before["train"]["images"] == 4
    pathlib.Path("x").rename("moved")
    assert Folder("moved").describe() == before
    put("moved/train/bee/11.png")
    after = Folder("moved").describe()
    assert after["train"] != before["train"] and after["held_out"] == before["held_out"]
    pathlib.Path("moved/train/bee/11.png").rename("moved/train/bee/12.png")
    assert Folder("moved").describe()["train"] != after["train"]


def test_parse_dataset_takes_a_kind_and_a_location():
    assert parse_dataset("folder:/data/x", 64) == Folder("/data/x", size=64)
    assert parse_dataset("tfds:imagenet2012:5.1.0", (64, 32)) == TFDS(
        "imagenet2012:5.1.0", size=(64, 32)
    )
    assert parse_dataset("digits", 8) == Digits()
    for text in ("", "folder", "folder:", "tfds:", "cifar10", "digits:8"):
        with pytest.raises(ValueError, match="give folder:PATH"):
            parse_dataset(text, 8)
    with pytest.raises(ValueError, match="digits are 8 by 8 pixels, not 256"):
        parse_dataset("digits", 256)


def test_write_photos_makes_two_classes_of_crops(tmp_path):
    photos.write_photos("photos", size=16, train=6, val=3)
    data = Folder("photos", size=16)
    assert data.class_names == ("china", "flower")
    assert len(data.source("train")) == 12 and len(data.source("held_out")) == 6
    shapes = [data.source("train")[i]["image"].shape for i in range(12)]
    assert min(min(shape[:2]) for shape in shapes) >= 16 and len(set(shapes)) > 3
    for bad, message in (
        ({}, "exists"),
        ({"out": "y", "size": 65}, "size=65: must be from 8 to 64"),
    ):
        with pytest.raises(ValueError, match=message):
            photos.write_photos(**{"out": "photos"} | bad)


ONLY_A_FOLDER = """
import sys
from varjax.data.sources import Folder, parse_dataset
batch = Folder("x", size=4).make(2, seed=0).train_batch(0)
print(*(name in sys.modules for name in ("tensorflow_datasets", "tensorflow", "sklearn", "jax")))
"""


def test_a_folder_is_read_without_the_libraries_of_other_datasets(official):
    run = [sys.executable, "-c", ONLY_A_FOLDER]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(run, env=environment, check=True, capture_output=True, text=True)
    assert done.stdout == "False False False False\n"


def test_errors_of_the_machine_are_not_taken_for_broken_images(tmp_path, monkeypatch):
    """No image is replaced by another one."""
    for i in range(300):
        path = tmp_path / f"{'train' if i else 'val'}/{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("L", (4, 4), i % 256).save(path)
    data, whole, failing = Folder(str(tmp_path), 4), os.open, [True]

    def fail_once(path, *arguments, **options):
        if str(path).endswith("007.png") and failing:
            failing.pop()
            raise OSError(errno.EIO, "made to fail")
        return whole(path, *arguments, **options)

    expected = data.make(299).train_batch(0)["image_BHWC"]
    monkeypatch.setattr(os, "open", fail_once)
    np.testing.assert_array_equal(data.make(299).train_batch(0)["image_BHWC"], expected)
    assert not failing
    failing[:] = [True] * 9
    with pytest.raises(StorageError, match="007.png cannot be read now: Input/output error"):
        data.make(299).train_batch(0)
    monkeypatch.undo()
    listed, left = os.scandir, [errno.EMFILE] * 2

    def scandir(path):
        if left:
            raise OSError(left.pop(), "made to fail", path)
        return listed(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(StorageError, match="cannot be read now: Too many open files"):
        Folder(str(tmp_path), 4).source("train")
    left[:] = [errno.EMFILE]
    assert len(Folder(str(tmp_path), 4).source("train")) == 299
