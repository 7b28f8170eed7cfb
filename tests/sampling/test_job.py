"""Tests that sampling gives the same bytes after kills and on several devices or processes."""

import os
import signal
import socket
import sys
import types
import zipfile

import jax
import numpy as np
import pytest
from PIL import Image

import varjax
from tests.helpers import forked, runs
from tests.helpers.paths import ROOT
from varjax import trees
from varjax.cli.sample import draw_samples
from varjax.errors import InputError, StorageError
from varjax.runtime import distributed
from varjax.sampling.grid_output import GridOutput
from varjax.sampling.job import SamplingJob, run_job
from varjax.sampling.outputs import FolderOutput
from varjax.storage import files

pytestmark = pytest.mark.slow

# Runs sample.py and kills it just before it moves the n-th file with a certain ending into place.
KILLED = """
import os, signal, sys
ending, n, *arguments = sys.argv[1:]
left, replace = int(n), os.replace

def replace_or_die(source, target):
    global left
    left -= str(target).endswith(ending)
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    replace(source, target)

os.replace = replace_or_die
import sample
sys.exit(sample.main(arguments))
"""
PROCESS = """
import sys
import sample
sys.exit(sample.main(sys.argv[1:]))
"""


def flags(out, *others):
    """Returns flags for 200 images in 13 parts, the last one not full."""
    weights = f"--weights={runs.var()}"
    return [weights, "--labels=all", "--count=20", "--batch_size=16", f"--out={out}", *others]


def draw(out, *others):
    draw_samples(flags(out, *others))
    return out


def start(code, *arguments, devices=1):
    environment = {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": str(devices)}
    return forked.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], env=os.environ | environment
    )


def kill(out, ending, n, devices=1):
    killed = start(KILLED, ending, n, *flags(out), devices=devices)
    assert killed.wait(timeout=120) == -signal.SIGKILL


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns an .npz and a folder written without interruption."""
    folder = tmp_path_factory.mktemp("whole")
    return draw(folder / "a.npz"), draw(folder / "images")


def same_folders(a, b):
    names = sorted(path.name for path in a.iterdir())
    assert names == sorted(path.name for path in b.iterdir())
    return all((a / name).read_bytes() == (b / name).read_bytes() for name in names)


def test_an_npz_is_shuffled_and_images_keep_their_labels(whole):
    npz, folder = whole
    with np.load(npz) as file:
        images_NHWC, label_N = file["arr_0"], file["labels"]
    assert images_NHWC.shape == (200, 8, 8, 3) and images_NHWC.dtype == np.uint8
    assert np.array_equal(np.bincount(label_N), np.full(10, 20))
    assert np.sum(np.diff(label_N) == 0) < 60  # 190 if labels were in order
    for label in range(10):
        there = sorted(images_NHWC[label_N == label, ..., 0].reshape(20, -1).tolist())
        pngs = [np.asarray(Image.open(p)) for p in folder.glob(f"*_label{label:04d}.png")]
        assert there == sorted(np.stack(pngs).reshape(20, -1).tolist())


def test_an_npz_killed_twice_and_resumed_on_other_devices_has_the_same_bytes(whole, tmp_path):
    out, parts = tmp_path / "a.npz", tmp_path / ".a.npz.parts"
    kill(out, ".safetensors", 3)
    assert len(list(parts.glob("0*.safetensors"))) == 2 and not out.exists()
    kill(out, ".npz", 1, devices=4)
    assert len(list(parts.glob("0*.safetensors"))) == 13 and not out.exists()
    draw(out)
    assert out.read_bytes() == whole[0].read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_killed_folder_is_resumed_to_the_same_content(whole, tmp_path):
    out = tmp_path / "images"
    kill(out, ".png", 70)
    first = out / "000000_label0000.png"
    written, drawn = first.stat().st_mtime_ns, len(list(out.glob("0*.png")))
    assert drawn == 69 and list(out.glob(".*.tmp"))
    draw(out)
    assert same_folders(out, whole[1])
    assert first.stat().st_mtime_ns == written


def test_two_processes_write_the_same_npz(whole, tmp_path):
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    out = tmp_path / "a.npz"
    shared = [f"--coordinator={address}", "--processes=2"]
    both = [start(PROCESS, *flags(out, *shared, f"--process={i}")) for i in range(2)]
    try:
        assert [process.wait(timeout=120) for process in both] == [0, 0]
    finally:
        for process in both:
            process.kill()
    assert out.read_bytes() == whole[0].read_bytes()


def in_process(number, answers, monkeypatch):
    """Simulates process `number` of two; each of `answers` returns what one call gathers."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: number)
    monkeypatch.setattr(distributed, "gather_json", lambda mine: answers.pop(0)(mine))


NOTHING = {"value": None}
MODEL = types.SimpleNamespace(devices=[0], sample=None)
EMPTY = SamplingJob((), 0, 0, None, 1)


def test_an_error_of_one_process_is_raised_in_all(tmp_path, monkeypatch):
    refused = {"kind": "InputError", "error": "a grid is drawn by one process"}
    in_process(0, [lambda mine: [mine, None], lambda mine: [mine, refused]], monkeypatch)
    with pytest.raises(InputError, match="process 1: a grid is drawn by one process"):
        run_job(MODEL, EMPTY, GridOutput(tmp_path / "a.png", None))
    full = [{"kind": "StorageError", "error": "the disk is full"}, None]
    both = [NOTHING, NOTHING]
    in_process(1, [lambda _: both, lambda _: both, lambda _: both, lambda _: full], monkeypatch)
    with pytest.raises(StorageError, match="the disk is full"):
        run_job(MODEL, EMPTY, FolderOutput(tmp_path, np.zeros(0, int), {}))


def test_each_process_compares_its_request_with_that_of_the_first(tmp_path, monkeypatch):
    """Weights on another machine may differ."""

    def begin_there(_):
        files.write_json(tmp_path / "request.json", {"weights": "theirs"})
        return [NOTHING, None]

    in_process(1, [begin_there, lambda mine: [NOTHING, mine]], monkeypatch)
    with pytest.raises(InputError, match="process 1: .*\n *weights: 'theirs' there, 'mine'"):
        run_job(MODEL, EMPTY, FolderOutput(tmp_path, np.zeros(0, int), {"weights": "mine"}))


def test_a_finished_output_is_recognized_and_a_different_request_refused(whole, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it drew again")

    monkeypatch.setattr("varjax.var.pipeline.sample_images", never)
    for out in whole:
        draw(out)
        with pytest.raises(ValueError, match="(?s)seed: 0 there, 1 requested.*delete it"):
            draw(out, "--seed=1")
        with pytest.raises(
            ValueError, match="(?s)labels: 'all' there, '1,2' .*guidance: 1.5 there, 4.0"
        ):
            draw(out, "--labels=1,2", "--guidance=4")
        with pytest.raises(ValueError, match="compute.dtype: 'float32' there, 'bfloat16' req"):
            draw(out, "--dtype=bfloat16")


def test_different_weights_have_a_different_digest():
    params = varjax.load(runs.var()).params
    before = trees.digest(params)
    assert trees.digest(params) == before
    bias_V = np.array(params["var"]["head"]["bias"])
    bias_V[3] += 1e-6
    params["var"]["head"]["bias"] = bias_V
    assert trees.digest(params) != before


def test_files_that_the_command_did_not_write_are_left_alone(tmp_path):
    (tmp_path / "a.npz").write_text("mine")
    with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
        archive.writestr("arr_0.npy", b"")
    for name in ("a.npz", "b.npz"):
        with pytest.raises(ValueError, match="was not written by this command; delete it"):
            draw(tmp_path / name)
    assert (tmp_path / "a.npz").read_text() == "mine"
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo.png").touch()
    with pytest.raises(ValueError, match="holds files and no request.json"):
        draw(tmp_path / "folder")
