import numpy as np
import pytest
from PIL import Image

import varjax
from tests.helpers import runs
from tests.helpers.tiles import tiles
from varjax.cli import sample
from varjax.cli.info import read_facts
from varjax.sampling.outputs import check_out
from varjax.storage import image_io
from varjax.storage.captioned_grid import Captions

pytestmark = pytest.mark.slow


def draw(*flags):
    sample.draw_samples([f"--weights={runs.var()}", *flags])


def pixels(path):
    with Image.open(path) as picture:
        return np.asarray(picture)


def test_a_grid_has_a_row_per_label(tmp_path, capsys):
    draw("--labels=3,1", "--count=3", f"--out={tmp_path / 'grid.png'}")
    title = f"{'/'.join(runs.var().parts[-2:])} · guidance 2.5 · seed 0"
    captions = Captions(title, rows=("3", "1"))
    grid = tiles(pixels(tmp_path / "grid.png"), (8, 8), captions, 6, 3)
    images_BHWC = varjax.load(runs.var()).sample([3, 3, 3, 1, 1, 1])
    expected = image_io.to_uint8(np.asarray(images_BHWC)).astype(int)
    assert np.abs(np.stack(grid) - expected[..., 0]).max() <= 1
    printed = capsys.readouterr().out
    assert "6 images" in printed and "classes: 3, 1" in printed


def test_a_sweep_has_a_row_per_value(tmp_path):
    draw("--labels=3,1", "--count=1", "--sweep", "guidance=1,4", f"--out={tmp_path / 'grid.png'}")
    title = f"{'/'.join(runs.var().parts[-2:])} · seed 0"
    captions = Captions(title, rows=("guidance 1", "guidance 4"), columns=("3", "1"))
    grid = tiles(pixels(tmp_path / "grid.png"), (8, 8), captions, 4, 2)
    model = varjax.load(runs.var())
    rows = [model.sample([3, 1], guidance=guidance) for guidance in (1, 4)]
    expected = image_io.to_uint8(np.concatenate(rows)).astype(int)
    assert np.abs(np.stack(grid) - expected[..., 0]).max() <= 1
    facts = read_facts(str(tmp_path / "grid.png"))
    assert facts["rows"] == ["guidance 1", "guidance 4"] and "guidance" not in facts


def test_images_do_not_depend_on_the_output_or_batch_size(tmp_path):
    draw("--labels=3,1", "--count=2", f"--out={tmp_path / 'a.npz'}")
    draw("--labels=3,1", "--count=2", "--batch_size=3", f"--out={tmp_path / 'folder'}")
    with np.load(tmp_path / "a.npz") as file:
        images, labels = file["arr_0"], file["labels"]
    assert images.shape == (4, 8, 8, 3) and images.dtype == np.uint8
    names = [f"{i:06d}_label{label:04d}.png" for i, label in enumerate((3, 3, 1, 1))]
    assert sorted(f.name for f in (tmp_path / "folder").iterdir()) == [*names, "request.json"]
    order = np.random.default_rng(0).permutation(4)
    assert labels.tolist() == np.array([3, 3, 1, 1])[order].tolist()
    read = np.stack([pixels(tmp_path / "folder" / names[i]) for i in order]).astype(int)
    assert np.abs(read - images[..., 0]).max() <= 1  # rounding may differ with the batch


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--labels=10"], "0 … 9"),
        (["--labels=x"], "no class of this name; its classes are 0 … 9"),
        (["--count=0"], "count=0"),
        (["--top_p=3"], "top_p"),
        (["--batch_size=0"], "batch_size=0"),
        (["--seed=-1"], "seed=-1"),
        (["--dtype=float16"], "float16.*auto, float32, bfloat16"),
        (["--weights=nowhere"], "nowhere"),
        ([f"--weights={runs.root()}"], "config.json"),
        (["--out=a.jpg"], ".jpg"),
        (["--sweep", "guidance=1,0"], "guidance=0"),
        (["--sweep", "guide=1,2"], "guide=1,2: give OPTION"),
        (["--sweep", "guidance=1,2", "--out=a.npz"], "a.npz: --sweep draws a row"),
        (["--sweep", "guidance=1,2", "--every_step"], "leave out --every_step"),
        (
            ["--sweep", "top_k=" + ",".join(map(str, range(101)))],
            "101 combinations; a grid has at most 100",
        ),
        (["--out=/proc/varjax/grid.png"], "cannot write"),
    ],
)
def test_invalid_flags_are_refused_before_compiling(flags, message, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it started sampling")

    monkeypatch.setattr("varjax.var.pipeline.sample_images", never)
    with pytest.raises(ValueError, match=message):
        draw(*flags)


def test_a_folder_named_like_a_picture_is_refused(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(ValueError, match="is a folder"):
        check_out(str(tmp_path / "x.png"))


def test_a_tokenizer_run_cannot_be_sampled():
    with pytest.raises(ValueError, match="VQTask"):
        sample.draw_samples([f"--weights={runs.tokenizer()}"])
