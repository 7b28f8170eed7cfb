import contextlib
import io
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from varjax.cli import prepare as prepare_module
from varjax.cli.prepare import main, prepare
from varjax.data import array_record, photos
from varjax.data.sources.folder import Folder
from varjax.data.sources.tfds import TFDS
from varjax.errors import InputError
from varjax.storage.image_files import BrokenImage

PACKAGE = pathlib.Path(array_record.__file__).parents[3]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Writes two classes with 12 train and 4 val images, and a broken one in each split."""
    path = tmp_path_factory.mktemp("photos") / "x"
    photos.write_photos(str(path), size=16, train=5, val=2)
    Image.effect_noise((20, 30), 90).convert("CMYK").save(path / "train/china/cmyk.tif")
    Image.effect_noise((20, 30), 90).save(path / "train/flower/gray.png")
    (path / "train/china/empty.jpg").write_bytes(b"")
    (path / "val/flower/text.png").write_text("no image")
    return path


@pytest.fixture(scope="module")
def packed(folder):
    out = folder.parent / "packed"
    prepare(str(folder), str(out), workers=1, shards=3)
    return out


@pytest.fixture
def in_this_process(monkeypatch):
    """Runs the jobs in this process, and interrupts them after `stop_after` steps."""
    told = {"steps": 0, "stop_after": 10**9}

    class NoProcesses:
        def __init__(self, subject, count):
            self.subject = subject

        def close(self):
            pass

        def stream(self, function, jobs):
            told["steps"] = 0
            for job in jobs:
                with contextlib.closing(function(self.subject, job)) as steps:
                    for step in steps:
                        if told["steps"] == told["stop_after"]:
                            raise KeyboardInterrupt
                        told["steps"] += 1
                        yield step

    monkeypatch.setattr(prepare_module, "WorkerProcesses", NoProcesses)
    return told


def content(out):
    return {p.name: p.read_bytes() for p in pathlib.Path(out).iterdir() if p.name != "request.json"}


def test_a_packed_folder_holds_the_same_images_in_the_same_order(folder, packed):
    data, files = TFDS(str(packed), size=16), Folder(str(folder), size=16)
    assert data.class_names == files.class_names == ("china", "flower")
    for split in ("train", "held_out"):
        records, kept = data.source(split).records, []
        for path in files.source(split).listing.paths:
            if "empty" not in path and "text" not in path:
                kept.append(path)
        assert [record["file_name"].decode() for record in records] == kept
        for record, path in zip(records, kept, strict=True):
            assert record["image"] == (folder / path).read_bytes()
            assert data.class_names[record["label"]] == path.split("/")[1]
    assert len(list(packed.glob("images-train.array_record-*-of-00003"))) == 3
    assert len(list(packed.glob("images-validation.array_record-*-of-00002"))) == 2
    report = json.loads((packed / "report.json").read_text())
    assert report["train"]["images"] == 12 and report["validation"]["images"] == 4
    ((name, reason),) = report["train"]["broken"]
    assert name == "train/china/empty.jpg" and reason == "it is empty"


@pytest.mark.parametrize("crop", ["random", "center"])
def test_packed_batches_equal_those_of_the_folder(tmp_path, in_this_process, crop):
    photos.write_photos("x", size=16, train=4, val=2)
    prepare("x", "packed")
    settings = {"size": (12, 8), "crop": crop, "flip": True}
    ours, theirs = Folder("x", **settings), TFDS("packed", **settings)
    a, b = ours.make(8, seed=1).train_batch(2), theirs.make(8, seed=1).train_batch(2)
    assert all(np.array_equal(a[name], b[name]) for name in a)
    a, b = next(ours.make(8, 1).held_out()), next(theirs.make(8, 1).held_out())
    assert all(np.array_equal(a[name], b[name]) for name in a)


def test_a_flat_folder_is_split_by_a_fraction(in_this_process):
    photos.write_photos("x", size=16, train=9, val=1)
    pathlib.Path("x/train/china").rename("flat")
    prepare("flat", "packed", held_out=0.3)
    data, files = TFDS("packed"), Folder("flat", held_out=0.3)
    assert data.classes == 1
    for split in ("train", "held_out"):
        names = [record["file_name"].decode() for record in data.source(split).records]
        assert names == files.source(split).listing.paths and names


def test_a_complete_dataset_is_not_prepared_again(folder, packed, capsys, monkeypatch):
    monkeypatch.setattr(prepare_module, "WorkerProcesses", None)
    before = {path: path.stat().st_mtime_ns for path in packed.glob("[!.]*")}
    arguments = [f"--folder={folder}", f"--out={packed}"]
    assert main([*arguments, "--shards=3", "--workers=7"]) == 0
    assert "packed is complete: 12 train + 4 validation images in 2 classes; 2 broken" in (
        capsys.readouterr().out
    )
    assert before == {path: path.stat().st_mtime_ns for path in packed.glob("[!.]*")}
    assert main([*arguments, "--shards=3", "--unconditional"]) == 1
    assert "unconditional: False there, True requested" in capsys.readouterr().err
    assert main([*arguments, "--shards=2"]) == 1
    assert "shards: 3 there, 2 requested" in capsys.readouterr().err
    assert main([*arguments, "--shards=3", "--size=20"]) == 1
    assert "size: 0 there, 20 requested" in capsys.readouterr().err


def test_an_interrupted_command_resumes_to_the_same_output(folder, packed, capsys, in_this_process):
    arguments = [f"--folder={folder}", "--out=out", "--shards=3"]
    for stop_after in (2, 5, 5, 6):  # the shards have 4, 4, 5, 2 and 3 images
        in_this_process["stop_after"] = stop_after
        assert main(arguments) == 130 and "run the same command again" in capsys.readouterr().err
        assert not list(pathlib.Path("out").glob(".*.tmp"))
    assert not pathlib.Path("out/dataset_info.json").exists()
    with pytest.raises(ValueError, match="no prepared dataset"):
        TFDS("out").describe()
    kept = {p: p.stat().st_mtime_ns for p in pathlib.Path("out").glob("images-*")}
    in_this_process["stop_after"] = 10**9
    assert main(arguments) == 0
    assert kept and all(path.stat().st_mtime_ns == kept[path] for path in kept)
    assert content("out") == content(packed)
    assert in_this_process["steps"] == 3 + 2  # only the last two shards


def test_an_output_with_other_content_is_refused(folder, packed, in_this_process):
    photos.write_photos("x", size=16, train=2, val=1)
    pathlib.Path("used").mkdir()
    pathlib.Path("used/file").write_text("mine")
    with pytest.raises(ValueError, match="made with other settings(.|\n)*folder: .*photos"):
        prepare("x", str(packed))
    with pytest.raises(ValueError, match="used holds files and no request.json"):
        prepare("x", "used")
    in_this_process["stop_after"] = 1
    with pytest.raises(KeyboardInterrupt):
        prepare("x", "out")
    pathlib.Path("x/train/china/new.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match="have since changed(.|\n)*train.images: 4 there, 5"):
        prepare("x", "out")
    for bad in ({"workers": -1}, {"shards": -2}, {"size": -3}, {"quality": 0}):
        with pytest.raises(ValueError, match="(workers|shards|size|quality)=-?[0-3]: must be"):
            prepare("x", "out2", **bad)
    assert not pathlib.Path("out2").exists()


def test_an_output_inside_the_image_folder_is_refused(folder):
    inside = folder / "train" / "packed"
    with pytest.raises(InputError, match=f"out={inside}: is inside {folder}/train"):
        prepare(str(folder), str(inside))
    assert not inside.exists()


@pytest.mark.parametrize("name", [b"caf\xe9", b"a\nb", b"cat ", b"\xe2\x80\xa8"])
def test_class_names_that_tfds_would_change_are_refused(folder, name, tmp_path):
    for split, image in (("train", "gray.png"), ("val", "0.png")):
        for class_folder in (b"dog", name):
            path = os.fsencode(tmp_path / "x" / split) + b"/" + class_folder
            os.makedirs(path)
            shutil.copy(folder / "train/flower/gray.png", path + b"/" + image.encode())
    with pytest.raises(InputError, match="cannot be the name of a class.*rename the folder"):
        prepare(str(tmp_path / "x"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_folder_without_a_readable_image_is_refused(in_this_process):
    for path in ("x/train/a/1.jpg", "x/val/a/1.jpg"):
        pathlib.Path(path).parent.mkdir(parents=True)
        pathlib.Path(path).write_bytes(b"")
    with pytest.raises(ValueError, match="no train image can be read; the first is train/a/1.jpg"):
        prepare("x", "out")
    for path in ("x/train/a/1.jpg", "x/val/a/1.jpg"):  # repaired, under the same names
        Image.new("RGB", (8, 8)).save(path)
    assert "1 train + 1 validation images" in prepare("x", "out")


def test_size_shrinks_images_and_never_enlarges_them():
    Image.effect_noise((60, 40), 90).convert("RGB").save("large.png")
    Image.effect_noise((50, 20), 90).convert("RGB").save("small.png")
    for name, size in (("large.png", (36, 24)), ("small.png", (50, 20))):
        data = array_record.ImageEncoding(size=24).encode_file(name)
        with Image.open(io.BytesIO(data)) as picture:
            assert picture.size == size
        assert (data == pathlib.Path(name).read_bytes()) == (name == "small.png")
    assert (
        array_record.ImageEncoding().encode_file("large.png")
        == pathlib.Path("large.png").read_bytes()
    )
    pathlib.Path("cut.png").write_bytes(pathlib.Path("large.png").read_bytes()[:500])
    with pytest.raises(BrokenImage, match="cut.png"):
        array_record.ImageEncoding().encode_file("cut.png")


READ = """
import sys
from varjax.data.sources.tfds import TFDS
batch = TFDS("out", size=8).make(4, seed=0).train_batch(0)
print(batch["image_BHWC"].shape, "jax" in sys.modules)
"""


@pytest.mark.slow
def test_a_stopped_command_leaves_no_process_and_resumes_without_tensorflow(tmp_path):
    photos.write_photos("x", size=8, train=400, val=2)
    (tmp_path / "fake/tensorflow").mkdir(parents=True)
    (tmp_path / "fake/tensorflow/__init__.py").write_text("raise RuntimeError('imported')")
    environment = os.environ | {"PYTHONPATH": f"{PACKAGE}:{tmp_path}/fake"}
    command = [sys.executable, "-m", "varjax", "prepare", "--folder=x", "--out=out"]
    command += ["--workers=1", "--shards=300"]
    for kill, number, code in (os.killpg, signal.SIGINT, 130), (os.kill, signal.SIGKILL, -9):
        before = len(list(pathlib.Path("out/unfinished").glob("*.json")))
        quiet = {"stderr": subprocess.DEVNULL, "start_new_session": True}
        process = subprocess.Popen(command, env=environment, **quiet)
        # New files show that its worker is running.
        while len(list(pathlib.Path("out/unfinished").glob("*.json"))) < before + 3:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.01)
        workers = _children(process.pid)
        kill(process.pid, number)
        assert process.wait() == code
        deadline = time.monotonic() + 20
        while any(_runs(worker) for worker in workers):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        assert workers and not pathlib.Path("out/dataset_info.json").exists()
    subprocess.run(command, env=environment, check=True, capture_output=True)
    read = [sys.executable, "-c", READ]
    read = subprocess.run(read, env=environment, check=True, capture_output=True, text=True)
    assert read.stdout == "(4, 8, 8, 3) False\n"
    assert len(TFDS("out").source("train")) == 800


def _children(pid):
    below = pathlib.Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in below.read_text().split()]


def _runs(pid):
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
