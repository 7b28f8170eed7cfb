"""Tests outputs: their names, what each format can hold, and one command at a time."""

import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.helpers.fake_sampler import FakeSampler
from varjax.cli import sample
from varjax.errors import InputError
from varjax.evaluation import __main__ as evaluation
from varjax.evaluation.evaluate import begun_batch_size_of_report
from varjax.metrics.image_sets import open_image_set
from varjax.sampling.job import SamplingJob
from varjax.sampling.outputs import (
    FolderOutput,
    begun_batch_size,
    check_out,
    check_out_holds,
    file_suffix,
    open_output,
    parts_folder,
    work_folder,
)
from varjax.storage import files
from varjax.storage.folders import locked_work_folder

SAMPLE = ["--weights=fake", "--labels=3,7", "--count=2", "--batch_size=2"]
EVALUATE = ["--weights=fake", "--count=1", "--batch_size=2", "--reference=real.npz"]
EVALUATE += ["--features=pixels", "--cache=cache"]


@pytest.fixture
def model(monkeypatch):
    found = FakeSampler()
    for module in (sample, evaluation):
        monkeypatch.setattr(module, "load", lambda *_, **__: found)
        monkeypatch.setattr(module, "use_compilation_cache", lambda: None)
    return found


@pytest.mark.parametrize("name", ["d16_cfg1.5", "v1.0", "a.b.c", "images.parts", "x.5", "run@3.2"])
def test_a_dot_in_a_folder_name_is_not_a_suffix(name, model, tmp_path):
    check_out(name)
    assert isinstance(open_output(name, np.zeros(1, int), None, 0, {}), FolderOutput)
    assert work_folder(name).name == name
    for _ in range(2):  # the second run finds all images
        assert sample.main([*SAMPLE, f"--out={name}"]) == 0
    assert model.calls == 2
    assert begun_batch_size(name) == 2
    assert len(list((tmp_path / name).glob("*.png"))) == 4


def test_file_suffixes_are_case_insensitive(model, tmp_path):
    assert [file_suffix(n) for n in ("a.png", "A.PNG", "a.b.NPZ", "a.jpg")] == [
        ".png", ".png", ".npz", "",
    ]  # fmt: skip
    assert sample.main([*SAMPLE, "--out=A.PNG"]) == 0 and (tmp_path / "A.PNG").is_file()
    for name in ("a.jpg", "a.JPG", "a.npy", "a.json"):
        with pytest.raises(InputError, match=f"out={name}: cannot write"):
            check_out(name)


@pytest.mark.parametrize("name", ["", " ", ".png", ".npz", "folder/.png", "x" * 300 + ".npz"])
def test_invalid_output_names_are_refused(name):
    with pytest.raises(InputError, match="is empty|has no name before|has at most 255"):
        check_out(name)


def test_images_that_the_output_cannot_hold_are_refused_before_sampling(model, tmp_path, capsys):
    for channels, name, says in (
        (4, "a.npz", "have 4 channels; .npz files hold 1, 3; give FILE.png or a folder"),
        (2, "a.npz", "have 2 channels; .npz files hold 1, 3"),
        (2, "images", "have 2 channels; .png files hold 1, 3, 4"),
    ):
        model.image_shape = (8, 8, channels)
        assert sample.main([*SAMPLE, f"--out={name}"]) == 1
        assert says in capsys.readouterr().err
    np.savez("real.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    assert evaluation.main([*EVALUATE, "--out=a.json"]) == 1
    assert "images have 2 channels" in capsys.readouterr().err
    model.image_shape = (256, 256, 3)
    assert sample.main([*SAMPLE, "--count=2000", "--out=a.png"]) == 1
    assert (
        "a picture of 4,000 images of 256x256 is too large; draw at most 2,720"
        in capsys.readouterr().err
    )
    assert model.calls == 0
    check_out_holds("a.png", 2704, (256, 256, 3))
    with pytest.raises(InputError, match="draw at most 2,704"):  # Pillow opens 52x52 images
        check_out_holds("a.png", 2705, (256, 256, 3))
    with pytest.raises(InputError, match="draw at most 42,350"):  # enlarged from 8x8 to 65x65
        check_out_holds("a.png", 10**5, (8, 8, 1), columns=10)
    check_out_holds("a.npz", 10**7, (256, 256, 3))
    model.image_shape = (8, 8, 4)
    assert sample.main([*SAMPLE, "--out=rgba"]) == 0
    with Image.open(next((tmp_path / "rgba").glob("*.png"))) as picture:
        assert picture.mode == "RGBA"


def test_too_many_images_are_refused(model, capsys):
    with pytest.raises(InputError, match="count=50000001 of 2 classes are 100,000,002 images"):
        SamplingJob((0, 1), 50_000_001, 0, None, 8)
    assert sample.main([*SAMPLE, "--count=2000000000", "--out=a.npz"]) == 1
    assert "at most 100,000,000" in capsys.readouterr().err
    for flag in ("count", "batch_size", "seed"):
        assert sample.main([*SAMPLE, f"--{flag}={2**40}", "--out=a.npz"]) == 1
        assert f"{flag}={2**40}: must be" in capsys.readouterr().err


def test_a_second_command_for_the_same_output_is_refused(model, tmp_path, capsys):
    for name, folder in (("a.npz", ".a.npz.parts"), ("images", "images")):
        with locked_work_folder(tmp_path / folder):
            assert sample.main([*SAMPLE, f"--out={name}"]) == 1
            assert f"is using {folder}" in capsys.readouterr().err
            assert sample.main([*SAMPLE, "--out=other.npz"]) == 0
        assert sample.main([*SAMPLE, f"--out={name}"]) == 0
        assert sample.main([*SAMPLE, f"--out={name}"]) == 0  # finished earlier
    left = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob(".*")}
    assert not left  # neither lock files nor parts


def test_a_second_evaluation_for_the_same_report_is_refused(model, tmp_path, capsys):
    np.savez("real.npz", arr_0=np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8))
    for arguments in (EVALUATE, ["real.npz", *EVALUATE[3:]]):  # samples of a model and of a file
        out = tmp_path / f"{len(arguments)}.json"
        with locked_work_folder(parts_folder(out)):
            assert evaluation.main([*arguments, f"--out={out}"]) == 1
        assert f"is using {parts_folder(out)}" in capsys.readouterr().err
        assert evaluation.main([*arguments, f"--out={out}"]) == 0
        assert not parts_folder(out).exists()


def test_evaluation_refuses_a_guide_when_guidance_is_off(model, capsys):
    np.savez("real.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    for flags in (["--guidance=1"], ["--sweep", "guidance=1"]):
        assert evaluation.main([*EVALUATE, "--guide=weak", *flags, "--out=a.json"]) == 1
        assert "guide=weak: guidance is 1" in capsys.readouterr().err
    assert model.calls == 0


def test_an_option_is_either_set_or_swept(model, capsys):
    both = ["--guidance=3", "--top_k=5", "--sweep", "top_p=0.5", "guidance=1,2"]
    for run, arguments in ((sample, [*SAMPLE, "--out=a.png"]), (evaluation, EVALUATE)):
        assert run.main([*arguments, *both]) == 1
        assert "guidance=3 and a sweep of guidance: give one" in capsys.readouterr().err
    assert model.calls == 0
    assert sample.main([*SAMPLE, "--out=a.png", *both[1:]]) == 0


def test_the_batch_size_of_a_report_is_read_from_its_parts_folder(tmp_path):
    out = tmp_path / "a.cfg=1.5.json"
    files.write_json(parts_folder(out) / "request.json", {"batch_size": 7})
    assert begun_batch_size_of_report(out) == 7


def test_mixed_labels_are_stored_as_text():
    label_N = np.array(["2:0.5+7:0.5", "3:1"])
    folder = open_output("images", label_N, None, 0, {})
    folder.begin(write=True)
    folder.add(range(2), np.zeros((2, 8, 8, 1), np.uint8))
    names = sorted(path.name for path in pathlib.Path("images").glob("*.png"))
    assert names == ["000000_label2x0.5+7x0.5.png", "000001_label3x1.png"]
    many = open_output("many", np.array(["+".join(["999:0.25"] * 50)] * 2), None, 0, {})
    many.begin(write=True)
    many.add(range(2), np.zeros((2, 8, 8, 1), np.uint8))  # a file name has at most 255 bytes
    many.begin(write=True)
    assert many.has(range(2)) and len(list(pathlib.Path("many").glob("*.png"))) == 2
    npz = open_output("x.npz", label_N, None, 0, {})
    npz.begin(write=True)
    npz.add(range(2), np.zeros((2, 8, 8, 1), np.uint8))
    npz.finish()
    with np.load("x.npz") as file:
        assert sorted(file["mixes"]) == ["2:0.5+7:0.5", "3:1"] and "labels" not in file
    images = open_image_set("x.npz")  # as `varjax evaluate` does
    assert images.shape == (2, 8, 8, 3) and images.label_N is None
