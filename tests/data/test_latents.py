import dataclasses
import itertools
import sys

import chex
import einops
import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers import forked, runs
from tests.helpers.fake_data import FakeImages
from tests.helpers.paths import ROOT
from varjax.cli import cache_latents as command
from varjax.cli.cache_latents import cache_latents
from varjax.config import config_tree
from varjax.data.latent_shards import LatentShard
from varjax.data.latents import CachedLatents
from varjax.data.sources import folder, parse_dataset
from varjax.data.sources.digits import Digits
from varjax.data.sources.folder import Folder
from varjax.data.sources.noise import Noise
from varjax.data.workers import ReadOptions
from varjax.errors import InputError
from varjax.storage import files
from varjax.tokenizers.vq.task import VQTask
from varjax.training import loop
from varjax.training.experiment import Experiment
from varjax.var import teacher_forcing
from varjax.var.task import VARTask

DATA = Digits(shift=1.0, rotate=10.0)
B = 102  # divides neither the images nor the shards
SETTINGS = dict(seed=3, batch_size=B, augmentations=2, shards=3)


def drawn(init):
    """Draws random parameters of the shapes that `init` makes, without compiling it."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(init, jax.random.key(0))
    return jax.tree.map(lambda x: 0.3 * rng.standard_normal(x.shape, np.float32), shapes)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    weights = tmp_path_factory.mktemp("tokenizer")
    params = drawn(runs.TOKENIZER.init)
    config = {"sources": {}, "tokenizer": config_tree.to_dict(runs.TOKENIZER)}
    files.write_json(weights / "config.json", config)
    files.write_tensors(weights / "tokenizer.safetensors", params, {})
    return VARTask(runs.VAR, runs.TOKENIZER, str(weights))


@pytest.fixture(scope="module")
def cache(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("tokens") / "out"
    said = cache_latents(task, DATA, out=str(out), **SETTINGS)
    assert "complete: latents of 2 augmentations of 1442 images, and of 355 held-out images" in said
    return out


@pytest.fixture(scope="module")
def encode(task):
    frozen = task.frozen()
    encode = jax.jit(task.tokenizer.encode)
    return lambda image_BHWC: np.asarray(encode(frozen, image_BHWC)["tokens_BL"])


def content(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


@pytest.mark.slow
def test_batches_of_latents_match_batches_of_images(cache, encode):
    """The first two epochs match; the third shows the first's augmentations in a new order."""
    images, tokens = DATA.make(B, seed=3), CachedLatents(str(cache)).make(B, seed=3)
    for number in (0, 13, 14, 27):  # batch 14 crosses the end of the first epoch
        a, b = images.train_batch(number), tokens.train_batch(number)
        assert b.keys() == {"tokens_BL", "label_B"} and b["tokens_BL"].dtype == np.int32
        np.testing.assert_array_equal(a["label_B"], b["label_B"])
        np.testing.assert_array_equal(encode(a["image_BHWC"]), b["tokens_BL"])
    epochs = np.concatenate([b["tokens_BL"] for b in itertools.islice(tokens.train(), 43)])
    first, second, third = (np.sort(epochs[i * 1442 : (i + 1) * 1442], axis=0) for i in range(3))
    np.testing.assert_array_equal(first, third)
    assert np.any(epochs[:1442] != epochs[2884:4326]) and np.any(first != second)
    for a, b in zip(images.held_out(), tokens.held_out(), strict=True):
        np.testing.assert_array_equal(a["valid_B"], b["valid_B"])
        valid_B = a["valid_B"]
        expected_BL = encode(a["image_BHWC"])[valid_B]
        np.testing.assert_array_equal(expected_BL, b["tokens_BL"][valid_B])


@pytest.mark.slow
def test_processes_and_workers_read_the_same_batches(cache):
    whole = CachedLatents(str(cache)).make(12, 5).train_batch(300)
    parts = [CachedLatents(str(cache)).make(12, 5, range(i, i + 3)) for i in range(0, 12, 3)]
    rows = [part.train_batch(300) for part in parts]
    workers = CachedLatents(str(cache), ReadOptions(workers=1)).make(12, 5).train_batch(300)
    chex.assert_trees_all_equal(jax.tree.map(lambda *x: np.concatenate(x), *rows), whole)
    chex.assert_trees_all_equal(workers, whole)


@pytest.mark.slow
def test_files_do_not_depend_on_the_number_of_processes(cache, task, tmp_path):
    data = dataclasses.replace(DATA, reading=ReadOptions(threads=1))
    for index in (1, 0):
        said = cache_latents(task, data, out=str(tmp_path / "a"), process=(index, 2), **SETTINGS)
        assert ("2 of 4 files are missing" in said) == (index == 1)
    assert content(tmp_path / "a") == content(cache)


CHILD = """
import os, sys
from tests.helpers import runs
from varjax.data import latent_shards
from tests.data.test_latents import DATA, SETTINGS
from varjax.cli.cache_latents import cache_latents
from varjax.var.task import VARTask
write = latent_shards.files.write_tensors
def killed(path, *rest):
    if "train-00001" in path.name:
        with latent_shards.files.atomic_path(path) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), 9)
    write(path, *rest)
latent_shards.files.write_tensors = killed
cache_latents(VARTask(runs.VAR, runs.TOKENIZER, sys.argv[1]), DATA, out=sys.argv[2], **SETTINGS)
"""


@pytest.mark.slow
def test_a_killed_command_resumes(cache, task, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", CHILD, task.tokenizer_weights, str(out)]
    assert forked.run(arguments, cwd=ROOT, timeout=100, capture_output=True).returncode == -9
    there = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert len(there) == 3 and "train-00000-of-00003.safetensors" in there
    with pytest.raises(ValueError, match="lacks 2 of 3 train files of latents"):
        CachedLatents(str(out)).make(4, 0)
    cache_latents(task, DATA, out=str(out), **SETTINGS)
    assert content(out) == content(cache)
    kept = out / "train-00000-of-00003.safetensors"
    assert kept.stat().st_mtime_ns == there[kept.name]
    monkeypatch.setattr(command, "_encoder", lambda *_: pytest.fail("all is done"))
    assert "is complete" in cache_latents(task, DATA, out=str(out), **SETTINGS)


@pytest.mark.slow
def test_losses_on_tokens_match_losses_on_images(cache, task):
    params, frozen = drawn(lambda key: task.init(key).params), task.frozen()
    losses = jax.jit(task.token_losses)
    images, tokens = DATA.make(64, seed=3), CachedLatents(str(cache)).make(64, seed=3)
    expected, actual = (losses(params, frozen, data.train_batch(2)) for data in (images, tokens))
    for name, x, y in zip(expected._fields, actual, expected, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6, err_msg=name)
    first = [data.held_out_batch(0) for data in (images, tokens)]
    both = [teacher_forcing.reconstructions(task.tokenizer, frozen, batch) for batch in first]
    np.testing.assert_allclose(both[1][0], both[0][1], atol=1e-5)
    assert both[0].shape == (2, 8, 8, 8, 1) and both[1].shape == (1, 8, 8, 8, 1)


@pytest.mark.slow
def test_a_transformer_trains_on_cached_tokens(cache, task, tmp_path):
    data = parse_dataset(f"latents:{cache}", 8)
    experiment = Experiment(task, data, str(tmp_path), batch_size=64, steps=1)
    assert 0 < loop.train(experiment)["eval/loss"] < 2 * np.log(16)
    described = files.read_json(tmp_path / "data.json")
    assert described["class_names"] == [str(i) for i in range(10)]
    assert described["tokenizer_identity"]["vocab"] == 16 and described["seed"] == 3


def test_tokens_of_another_tokenizer_are_refused(cache, task, tmp_path):
    about = files.read_json(cache / "latents.json")
    about["tokenizer_identity"] |= {"weights": "0" * 64, "num_phi": 1}
    other = tmp_path / "other"
    files.write_json(other / "latents.json", about)
    for path in cache.glob("*.safetensors"):
        (other / path.name).symlink_to(path)
    data = CachedLatents(str(other))
    with pytest.raises(
        ValueError, match="(?s)a different tokenizer:.*num_phi: 1 in the data.*weights: '0000"
    ):
        loop.train(Experiment(task, data, str(tmp_path / "run"), batch_size=8, steps=1))
    tokenizer = VQTask(runs.TOKENIZER)
    with pytest.raises(ValueError, match="VQTask trains on images, but the data are latents"):
        loop.train(Experiment(tokenizer, data, str(tmp_path / "tokenizer"), batch_size=8, steps=1))


def test_broken_images_are_skipped_in_cached_tokens_too(task, tmp_path, capsys):
    data = FakeImages(150, (7,), image_shape=(8, 8, 1), reading=ReadOptions())
    cache_latents(task, data, seed=0, batch_size=50, out=str(tmp_path), augmentations=2)
    assert capsys.readouterr().err.count("skipped: image_7.jpg") == 2  # once per split
    images, tokens = data.make(50, 0), CachedLatents(str(tmp_path)).make(50, 0)
    for number in range(6):
        expected_B = images.train_batch(number)["label_B"]
        np.testing.assert_array_equal(tokens.train_batch(number)["label_B"], expected_B)
    assert [b["valid_B"].sum() for b in tokens.held_out()] == [49, 50, 50]
    assert f"{tmp_path} train[7]" in capsys.readouterr().err


@dataclasses.dataclass(frozen=True)
class FakeKL:
    """A tokenizer with two arrays of floats, one of which is stored in 16 bits."""

    image_shape: tuple[int, int, int] = (4, 6, 1)

    @property
    def latent_spec(self):
        return {
            "mean_BhwZ": jax.ShapeDtypeStruct((2, 3, 4), np.float16),
            "std_BhwZ": jax.ShapeDtypeStruct((2, 3, 4), np.float32),
        }

    def encode(self, params, images_BHWC):
        x_BhwZ = einops.rearrange(images_BHWC, "B (h p) (w q) C -> B h w (p q C)", p=2, q=2)
        mean_BhwZ = x_BhwZ.astype(np.float32) * params["scale"]
        return {"mean_BhwZ": mean_BhwZ, "std_BhwZ": mean_BhwZ + np.float32(0.1)}


@dataclasses.dataclass(frozen=True)
class FakeKLTask:
    tokenizer = FakeKL()

    def frozen(self):
        return {"scale": np.float32(1 / 256)}  # which 16 bits hold exactly

    def tokenizer_identity(self, frozen):
        return {"kind": "KL", "scale": float(frozen["scale"])}


def test_latents_may_be_float_arrays(tmp_path, capsys):
    """Float latents are cached by several processes, read, shuffled and resumed like tokens."""
    data = FakeImages(150, (7,), image_shape=(4, 6, 1), reading=ReadOptions())
    task, settings = FakeKLTask(), dict(seed=3, batch_size=40, augmentations=2, shards=4)
    for index in (1, 0):
        cache_latents(task, data, out=str(tmp_path / "a"), process=(index, 2), **settings)
    cache_latents(task, data, out=str(tmp_path / "b"), **settings)
    assert content(tmp_path / "a") == content(tmp_path / "b")
    assert files.read_json(tmp_path / "a/latents.json")["latent_spec"] == {
        "mean_BhwZ": {"shape": [2, 3, 4], "dtype": "float16"},
        "std_BhwZ": {"shape": [2, 3, 4], "dtype": "float32"},
    }
    stored = files.read_tensors(tmp_path / "a/train-00000-of-00004.safetensors")[0]
    assert stored["mean_NUhwZ"].dtype == np.float16 and stored["std_NUhwZ"].shape[1:] == (
        2,
        2,
        3,
        4,
    )

    images = data.make(20, seed=3)
    latents = CachedLatents(str(tmp_path / "a"), ReadOptions(workers=1)).make(20, seed=3)
    encode = jax.jit(task.tokenizer.encode)
    batches = zip(images.train(5), latents.train(5), range(5, 15), strict=False)
    for image_batch, batch, _ in batches:  # to the end of the second epoch
        expected = encode(task.frozen(), image_batch["image_BHWC"])
        chex.assert_trees_all_equal(batch, expected | {"label_B": image_batch["label_B"]})
        assert batch["mean_BhwZ"].dtype == batch["std_BhwZ"].dtype == np.float32
    for image_batch, batch in zip(images.held_out(), latents.held_out(), strict=True):
        valid_B = image_batch["valid_B"]
        expected = encode(task.frozen(), image_batch["image_BHWC"][valid_B])
        np.testing.assert_array_equal(batch["valid_B"], valid_B)
        for name in expected:
            np.testing.assert_array_equal(batch[name][valid_B], expected[name])
            assert not batch[name][~valid_B].any()
    assert latents.tokenizer_identity == {"kind": "KL", "scale": 1 / 256}
    assert "image_7.jpg" in capsys.readouterr().err


def write_noise(folder, count):
    for i in range(count):
        noise_HW = np.random.default_rng(i).integers(0, 256, (9, 16), np.uint8)
        path = folder / f"{'train' if i % 10 else 'val'}/{i:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise_HW).save(path)


def test_two_augmentations_of_center_crops_are_both_flips_of_every_image(
    tmp_path, monkeypatch, capsys
):
    """Training on images shows the same flips in the same epochs, even in place of broken ones."""
    write_noise(tmp_path / "x", 150)
    (tmp_path / "x/train/077.png").write_bytes(b"")
    (tmp_path / "config.py").write_text(CENTER_CROPS)
    flags = ["--config=config.py", "--config.data.crop=center", "--config.data.flip=true"]
    make = [*flags, "--out=out", "--augmentations=2"]
    assert command.main(make) == 0
    monkeypatch.setattr(folder, "pixels_digest", lambda: "another Pillow")
    assert command.main(make) == 1 and "pixels: " in capsys.readouterr().err

    data = Folder("x", size=(4, 6), channels=1, crop="center", flip=True)
    source, stored = data.source("train"), CachedLatents("out").source("train")
    firsts = []
    for i in range(len(source)):
        if "077" in source.listing.paths[i]:
            continue
        crop_HWC = data.preprocess(source[i]["image"])
        crop_2HWC = np.stack([crop_HWC, crop_HWC[:, ::-1]])
        expected = FakeKL().encode(FakeKLTask().frozen(), crop_2HWC)["mean_BhwZ"]
        found = stored[i]["latents"]["mean_BhwZ"].astype(np.float32)
        firsts.append(np.array_equal(found[0], expected[1]))
        np.testing.assert_array_equal(found, expected[::-1] if firsts[-1] else expected)
    assert 0.4 < np.mean(firsts) < 0.6  # an epoch does not mirror all images at once

    images, latents = data.make(45, seed=3), CachedLatents("out").make(45, seed=3)
    for number in range(12):  # four epochs of 135 images
        a, b = images.train_batch(number), latents.train_batch(number)
        expected = FakeKL().encode(FakeKLTask().frozen(), a["image_BHWC"])
        chex.assert_trees_all_equal(b, expected | {"label_B": a["label_B"]})


CENTER_CROPS = """
from tests.data.test_latents import FakeKLTask
from varjax.data.sources.folder import Folder
from varjax.training.experiment import Experiment

def get_config():
    data = Folder("x", size=(4, 6), channels=1)
    return Experiment(FakeKLTask(), data, "run", batch_size=32, steps=1, seed=3)
"""


@dataclasses.dataclass(frozen=True)
class Scaled(FakeKLTask):
    """A task whose latents need rounding in 16 bits, or do not fit."""

    scale: float

    def frozen(self):
        return {"scale": np.float32(self.scale)}


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_floats_are_stored_in_the_given_dtype_and_rounding_is_reported(dtype, tmp_path):
    data = FakeImages(20, image_shape=(4, 6, 1), reading=ReadOptions())
    task, out = Scaled(np.pi / 256), tmp_path / "out"
    said = cache_latents(task, data, seed=3, batch_size=8, out=str(out), dtype=dtype)
    about = files.read_json(out / "latents.json")
    assert {array["dtype"] for array in about["latent_spec"].values()} == {dtype}
    assert CachedLatents(str(out)).latent_spec["mean_BhwZ"].dtype == dtype
    worst = {}
    for images, latents in zip(
        data.make(5, 3).held_out(), CachedLatents(str(out)).make(5, 3).held_out(), strict=True
    ):
        expected = task.tokenizer.encode(task.frozen(), images["image_BHWC"])
        for name, x in expected.items():
            found = latents[name]
            assert found.dtype == np.float32
            np.testing.assert_allclose(found, x, rtol=2**-11 if dtype == "float16" else 0)
            worst[name] = max(worst.get(name, 0), np.abs(found - x).max())
    if dtype == "float32":
        assert "largest error" not in said and max(worst.values()) == 0
        return
    for name, error in worst.items():  # the reported error includes training images
        line = next(line for line in said.splitlines() if line.startswith(name))
        found = float(line.partition("error is ")[2].partition(",")[0])
        assert 0 < 0.99 * error <= found < 1e-2
    with pytest.raises(ValueError, match=r"latent_spec.*\.dtype: 'float16' there, 'float32' req"):
        cache_latents(task, data, seed=3, batch_size=8, out=str(out), dtype="float32")


def test_alternating_flips_need_an_even_number_of_augmentations(tmp_path):
    """With one augmentation, some images would always be mirrored."""
    write_noise(tmp_path / "x", 20)
    data = Folder("x", size=(4, 6), channels=1, crop="center", flip=True)
    given = dict(task=FakeKLTask(), data=data, seed=0, batch_size=8)
    for count in (0, 1, 3):
        with pytest.raises(ValueError, match=f"augmentations={count}: must be a multiple of 2"):
            cache_latents(**given, out="refused", augmentations=count)
    assert "latents of 2 augmentations" in cache_latents(**given, out="both")
    for name, changes in (("random", {"crop": "random"}), ("plain", {"flip": False})):
        given["data"] = dataclasses.replace(data, **changes)
        assert "latents of 1 augmentations" in cache_latents(**given, out=name)


ABOUT = {
    "tokenizer_identity": {"weights": "x"},
    "latent_spec": {"tokens_BL": {"shape": [4], "dtype": "uint16"}},
    "data": {},
    "classes": 3,
    "image_shape": [8, 8, 1],
    "seed": 0,
    "images": {"train": 4, "held_out": 0},
    "augmentations": {"train": 2, "held_out": 1},
    "shards": {"train": 2, "held_out": 0},
}


@pytest.mark.parametrize(
    "change",
    [
        *({name: None} for name in ABOUT if name != "seed"),
        *({name: [1]} for name in ABOUT if name != "seed"),
        {"classes": 0},
        {"classes": "3"},
        {"image_shape": [8, -8, 1]},
        {"image_shape": [8, 8]},
        {"latent_spec": {"tokens_BL": {"shape": [2**60, 2**60], "dtype": "uint16"}}},
        {"latent_spec": {"tokens_BL": {"shape": [4], "dtype": "O"}}},
        {"latent_spec": {"tokens_BL": {"shape": [4], "dtype": "os.system"}}},
        {"latent_spec": {"tokens_BL": [4]}},
        {"images": {"train": 2**50}},
        {"shards": {"train": 2**40, "held_out": 0}},
        {"shards": {"train": -1, "held_out": 0}},
        {"shards": {}},
        {"augmentations": {"train": 0, "held_out": 1}},
        {"augmentations": {"train": 1.5, "held_out": 1}},
    ],
)
def test_invalid_descriptions_are_refused(tmp_path, change):
    files.write_json(tmp_path / "latents.json", ABOUT)
    assert CachedLatents(str(tmp_path)).about == ABOUT
    files.write_json(tmp_path / "latents.json", ABOUT | change)
    with pytest.raises(InputError, match="latents.json does not describe latents"):
        _ = CachedLatents(str(tmp_path)).about


def test_values_too_large_for_float16_are_refused(tmp_path):
    data = FakeImages(20, image_shape=(4, 6, 1), reading=ReadOptions())
    with pytest.raises(ValueError, match="mean_BhwZ: .* cannot be stored as float16, .* 65504"):
        cache_latents(Scaled(1e4), data, seed=0, batch_size=8, out=str(tmp_path / "out"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentations": 0}, "augmentations=0: must be 1 or more"),
        ({"augmentations": 5_000_000_000}, "augmentations=5000000000: must be at most 64"),
        ({"shards": 2**40}, "shards=.*: must be at most"),
        ({"seed": -1}, "seed=-1: must be 0 or more"),
        ({"shards": -1}, "shards=-1: must be"),
        ({"batch_size": 0}, "batch_size=0: must be a multiple"),
        ({"data": CachedLatents("there")}, "already latents, in there"),
        ({"data": Noise(16, 1)}, r"images of \(16, 16, 1\), but the tokenizer needs \(8, 8, 1\)"),
        ({"task": VQTask(runs.TOKENIZER)}, "VQTask trains on images"),
        ({"seed": 4}, "(?s)made with other settings.*seed: 3 there, 4 requested"),
        ({"data": Digits()}, r"settings\..* there, .* requested"),
        ({"out": str(ROOT)}, "holds files and no latents.json"),
    ],
)
def test_invalid_settings_are_refused(cache, task, changes, message):
    with pytest.raises(ValueError, match=message):
        cache_latents(**dict(task=task, data=DATA, out=str(cache)) | SETTINGS | changes)


def test_the_command_writes_latents_and_refuses_other_settings(task, tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG.format(task.tokenizer_weights))
    flags = ["--config=config.py", "--out=out", "--augmentations=1"]
    assert command.main([*flags, "--config.data.size=60", "--config.seed=7"]) == 0
    said = capsys.readouterr()
    assert "latents of 1 augmentations of 60 images" in said.out and "image/s" in said.err
    assert files.read_json("out/latents.json")["seed"] == 7
    assert len(CachedLatents("out").source("train")) == 60 and CachedLatents("out").classes == 10
    assert command.main(flags) == 1
    assert "seed: 7 there, 0 requested" in capsys.readouterr().err
    assert command.main([*flags, "--seed=3"]) == 1
    assert "settings are --config.FIELD=VALUE" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nowhere holds no latents"):
        parse_dataset("latents:nowhere", 8).make(4, 0)


@pytest.mark.parametrize("shared", [["--processes=2", "--process=1"], ["--distributed"]])
def test_processes_of_the_command_do_not_connect_to_each_other(task, tmp_path, monkeypatch, shared):
    """Each process works alone. On a cluster, environment variables give its number."""
    for name, value in SLURM.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)
    (tmp_path / "config.py").write_text(CONFIG.format(task.tokenizer_weights))
    calls = []
    monkeypatch.setattr(command, "cache_latents", lambda *_, **settings: calls.append(settings))
    assert command.main(["--config=config.py", "--out=out", *shared]) == 0
    (settings,) = calls
    # Training's batch size of 50 and the number of processes do not affect encoding.
    assert settings["batch_size"] == 32 * len(jax.local_devices())
    assert (settings["out"], settings["process"]) == ("out", (1, 2))
    assert not jax.distributed.is_initialized()


SLURM = {"JOB_ID": "7", "STEP_NODELIST": "n1", "NTASKS": "2", "PROCID": "1", "LOCALID": "1"}


CONFIG = """
from tests.helpers import fake_data, runs
from varjax.training.experiment import Experiment
from varjax.var.task import VARTask

def get_config():
    task = VARTask(runs.VAR, runs.TOKENIZER, {!r})
    data = fake_data.FakeImages(image_shape=(8, 8, 1))
    return Experiment(task, data, "run", batch_size=50, steps=1)
"""


def test_nan_latents_are_refused_with_the_number_of_the_image(tmp_path):
    """NaN is allowed for broken images."""
    about = {
        "images": {"train": 4}, "augmentations": {"train": 2}, "shards": {"train": 2},
        "latent_spec": {"mean_BhwZ": {"shape": [3], "dtype": "float32"}},
    }  # fmt: skip
    shard = LatentShard(tmp_path, "train", 1, about)  # images 2 and 3
    mean_BZ = np.ones((4, 3), np.float32)
    valid_B = np.array([False, False, True, True])
    mean_BZ[0], mean_BZ[3, 1] = np.nan, np.inf
    rows = {"mean_BhwZ": mean_BZ, "label_B": np.arange(4), "valid_B": valid_B}
    with pytest.raises(
        InputError, match=r"train image 3 \(from 0, label 3, augmentation 1\) contains NaN"
    ):
        shard.write(rows)
    assert not list(tmp_path.iterdir())
    mean_BZ[3] = 1
    shard.write(rows)
    assert shard.path.is_file()


def test_a_tokenizer_with_nan_weights_caches_nothing(tmp_path):
    data = FakeImages(20, image_shape=(4, 6, 1), reading=ReadOptions())
    with pytest.raises(ValueError, match="weights contain NaN or infinity .scale.; use an"):
        cache_latents(Scaled(np.nan), data, seed=0, batch_size=8, out=str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
