"""Tests commands on a bucket, served locally with Google Cloud Storage's protocol."""

import json
import pathlib

import chex
import pytest

from tests.golden import weights
from tests.helpers import bucket_server, runs, tiny
from tests.helpers import golden_cases as golden
from tests.helpers.bucket_server import BUCKET
from tests.helpers.fake_data import FakeImages
from varjax.analysis.plot import draw_curves
from varjax.analysis.run_log import read_run_log
from varjax.analysis.runs import find_runs, run_status
from varjax.cli.cache_latents import cache_latents
from varjax.cli.prepare import prepare
from varjax.cli.sample import main as sample_main
from varjax.convert import convert
from varjax.convert.apply_map import official_buffers
from varjax.convert.pth.write import write_pth
from varjax.data import photos
from varjax.data.latents import CachedLatents
from varjax.data.sources.folder import Folder
from varjax.data.sources.tfds import TFDS
from varjax.errors import InputError
from varjax.evaluation.__main__ import main as evaluate_main
from varjax.models import read_model
from varjax.storage import buckets, files
from varjax.storage.buckets import as_path
from varjax.training import loop
from varjax.var.task import VARTask

ROOT = f"gs://{BUCKET}"
# aiohttp warns about the uploads of gcsfs.
pytestmark = pytest.mark.filterwarnings("ignore:Sending a large body:ResourceWarning")


@pytest.fixture(scope="module", autouse=True)
def server():
    with bucket_server.running() as environment, pytest.MonkeyPatch.context() as monkeypatch:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        yield


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Runs a test in a folder that must stay empty, because all output belongs in the bucket."""
    monkeypatch.setenv("VARJAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    yield tmp_path
    assert not list((tmp_path / "work").iterdir())


@pytest.mark.slow
def test_a_killed_run_resumes(whole, work, capsys):
    run, settings = f"{ROOT}/runs/a", dict(keep_best="eval/loss", preview_every=20, keep=3)
    loop.train(tiny.experiment(run, **settings))
    tiny.assert_same_run(run, whole[0])
    # The last checkpoint becomes incomplete, as after a kill, and the one before it damaged.
    checkpoints = as_path(run) / "checkpoints"
    (checkpoints / "30" / "commit_success.txt").unlink()
    for name in buckets.object_versions(checkpoints / "20"):
        if name.startswith("params"):
            (checkpoints / "20" / name).unlink()
    loop.train(tiny.experiment(run, **settings))
    tiny.assert_same_run(run, whole[0])
    assert (as_path(run) / "unreadable" / "20").is_dir()
    assert "a bucket has no locks" in capsys.readouterr().err

    assert find_runs(ROOT) == [as_path(run)]
    status = run_status(as_path(run))
    assert (status.step, status.state) == (30, "finished")
    names = list(buckets.object_versions(as_path(run)))
    assert any(name.startswith("tensorboard/") for name in names)
    assert sum(name.startswith("previews/") for name in names) == 1
    draw_curves([read_run_log(run)], f"{ROOT}/curves.png")
    assert (as_path(ROOT) / "curves.png").read_bytes()[1:4] == b"PNG"


@pytest.mark.slow
def test_weights_are_converted_and_read(work):
    local, there = {}, {}
    for part, name in {"tokenizer": "vae", "var": "var"}.items():
        local[part] = work / f"{name}.pth"
        tensors = weights.state_dict("base", name)
        if part == "var":
            tensors |= official_buffers(golden.configs("base")[1])
        write_pth(local[part], tensors)
        there[part] = f"{ROOT}/official/{name}.pth"
        buckets.upload(local[part], as_path(there[part]))
    for _ in range(2):  # the second conversion replaces the first
        convert(f"{ROOT}/weights", **there)
    convert(work / "weights", **local)
    chex.assert_trees_all_equal(read_model(f"{ROOT}/weights")[2], read_model(work / "weights")[2])


@pytest.mark.slow
def test_samples_are_drawn_and_evaluated(work, capsys):
    flags = [f"--weights={runs.var()}", "--labels=0,1,2,3", "--count=2", "--batch_size=4"]
    for out in "grid.png", "folder", "samples.npz":
        for _ in range(2):  # the second call finds everything done
            assert sample_main([*flags, f"--out={ROOT}/samples/{out}"]) == 0
    names = list(buckets.object_versions(as_path(f"{ROOT}/samples")))
    assert len([n for n in names if n.startswith("folder/") and n.endswith(".png")]) == 8
    assert {"grid.png", "samples.npz"} < set(names) and not any(".parts" in n for n in names)
    samples, out = f"{ROOT}/samples/samples.npz", f"{ROOT}/report.json"
    compared = [f"--reference={ROOT}/samples/folder", "--features=pixels", f"--out={out}"]
    assert evaluate_main([samples, *compared]) == 0
    report = files.read_json(out)
    assert abs(report["fid"]) < 1e-6 and report["images"] == 8
    assert sample_main([*flags, "--out=gs://missing-bucket/a.png"]) == 1
    assert "could not be written" in capsys.readouterr().err


@pytest.mark.slow
def test_images_are_packed_and_read(work):
    photos.write_photos(str(work / "photos"), size=16, train=3, val=1)
    for file in (work / "photos").rglob("*.*"):
        buckets.upload(file, as_path(f"{ROOT}/photos") / file.relative_to(work / "photos"))
    there, here = (Folder(str(p), size=16) for p in (f"{ROOT}/photos", work / "photos"))
    assert there.describe() == here.describe()
    batch = here.make(4, seed=1).train_batch(0)
    chex.assert_trees_all_equal(there.make(4, seed=1).train_batch(0), batch)

    for _ in range(2):  # the second call finds everything done
        assert "is complete" in prepare(f"{ROOT}/photos", f"{ROOT}/packed", workers=1, shards=2)
    packed = TFDS(f"{ROOT}/packed", size=16)
    chex.assert_trees_all_equal(packed.make(4, seed=1).train_batch(0), batch)
    with pytest.raises(InputError, match="holds no prepared dataset"):
        TFDS(f"{ROOT}/photos", size=16).describe()


@pytest.mark.slow
def test_latents_are_cached(work):
    task, data = (
        VARTask(runs.VAR, runs.TOKENIZER, str(runs.tokenizer())),
        FakeImages(size=40, image_shape=(8, 8, 1)),
    )
    batches = []
    for out in f"{ROOT}/latents", work / "latents":
        for _ in range(2):
            said = cache_latents(task, data, seed=1, batch_size=20, out=str(out), shards=2)
            assert f"{out} is complete" in said
        batches.append(CachedLatents(str(out)).make(8, seed=2).train_batch(3))
    chex.assert_trees_all_equal(*batches)
    about = json.loads((as_path(f"{ROOT}/latents") / "latents.json").read_text())
    assert about == json.loads(pathlib.Path(work / "latents/latents.json").read_text())
