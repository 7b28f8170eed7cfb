import dataclasses
import itertools
import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.helpers import runs
from tests.helpers.fake_data import Fake
from tests.helpers.paths import ROOT
from varjax.core import config_tree, files
from varjax.data import cache_latents as command
from varjax.data.cache_latents import tokenize
from varjax.data.latents import Tokens
from varjax.data.sources import parse
from varjax.data.sources.digits import Digits
from varjax.data.sources.noise import Noise
from varjax.data.workers import Reading
from varjax.tokenizers.vq.task import VQTask
from varjax.training import loop
from varjax.training.experiment import Experiment
from varjax.var import teacher_forcing
from varjax.var.task import VARTask

DATA = Digits(shift=1.0, rotate=10.0)
B = 103  # divides neither the images nor the shards
SETTINGS = dict(seed=3, batch_size=B, augmentations=2, shards=3)


def drawn(init):
    """Parameters of these shapes, without compiling anything."""
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
    said = tokenize(task, DATA, out=str(out), **SETTINGS)
    assert "is complete: tokens of 2 augmentations of 1442 images, and of 355 held out" in said
    return out


@pytest.fixture(scope="module")
def encode(task):
    frozen = task.frozen()
    tokens = jax.jit(task.tokens)
    return lambda image_BHWC: np.asarray(tokens(frozen, image_BHWC))


def content(out):
    return {p.name: p.read_bytes() for p in out.iterdir()}


def test_batches_are_those_of_the_images(cache, encode):
    """In the first two epochs; the third one shows the augmentations of the first in new order."""
    images, tokens = DATA.make(B, seed=3), Tokens(str(cache)).make(B, seed=3)
    for number in (0, 13, 14, 27):  # batch 14 crosses the end of the first epoch, 28 of the second
        a, b = images.train_batch(number), tokens.train_batch(number)
        assert b.keys() == {"tokens_BL", "label_B"} and b["tokens_BL"].dtype == np.int32
        np.testing.assert_array_equal(a["label_B"], b["label_B"])
        np.testing.assert_array_equal(encode(a["image_BHWC"]), b["tokens_BL"])
    epochs = np.concatenate([b["tokens_BL"] for b in itertools.islice(tokens.train(), 42)])
    first, second, third = (np.sort(epochs[i * 1442 : (i + 1) * 1442], axis=0) for i in range(3))
    np.testing.assert_array_equal(first, third)
    assert np.any(epochs[:1442] != epochs[2884:4326]) and np.any(first != second)
    for a, b in zip(images.held_out(), tokens.held_out(), strict=True):
        np.testing.assert_array_equal(a["valid_B"], b["valid_B"])
        valid_B = a["valid_B"]
        expected_BL = encode(a["image_BHWC"])[valid_B]
        np.testing.assert_array_equal(expected_BL, b["tokens_BL"][valid_B])


def test_shares_and_worker_processes_read_the_same(cache):
    whole = Tokens(str(cache)).make(12, 5).train_batch(300)
    parts = [Tokens(str(cache)).make(12, 5, range(i, i + 3)) for i in range(0, 12, 3)]
    rows = [part.train_batch(300) for part in parts]
    workers = Tokens(str(cache), Reading(workers=1)).make(12, 5).train_batch(300)
    for name, expected in whole.items():
        np.testing.assert_array_equal(np.concatenate([r[name] for r in rows]), expected)
        np.testing.assert_array_equal(workers[name], expected)


def test_files_do_not_depend_on_processes_workers_or_a_kill(cache, task, tmp_path):
    data = dataclasses.replace(DATA, reading=Reading(threads=1))
    for index in (1, 0):
        said = tokenize(task, data, out=str(tmp_path / "a"), process=(index, 2), **SETTINGS)
        assert ("2 of 4 files are missing" in said) == (index == 1)
    assert content(tmp_path / "a") == content(cache)


CHILD = """
import os, sys
from tests.helpers import runs
from varjax.data import token_files, tokens
from tests.data.test_latents import DATA, SETTINGS
from varjax.data.cache_latents import tokenize
from varjax.var.task import VARTask
write = token_files.files.write_tensors
def killed(path, *rest):
    if "train-00001" in path.name:
        path.with_name(f".{path.name}.1.tmp").write_bytes(b"half")
        os.kill(os.getpid(), 9)
    write(path, *rest)
token_files.files.write_tensors = killed
tokenize(VARTask(runs.VAR, runs.TOKENIZER, sys.argv[1]), DATA, out=sys.argv[2], **SETTINGS)
"""


def test_after_a_kill_the_same_command_goes_on(cache, task, tmp_path, monkeypatch):
    out = tmp_path / "out"
    arguments = [sys.executable, "-c", CHILD, task.tokenizer_weights, str(out)]
    assert subprocess.run(arguments, cwd=ROOT, timeout=100, capture_output=True).returncode == -9
    there = {p.name: p.stat().st_mtime_ns for p in out.iterdir()}
    assert len(there) == 3 and "train-00000-of-00003.safetensors" in there
    with pytest.raises(ValueError, match="lacks 2 of 3 train files of tokens"):
        Tokens(str(out)).make(4, 0)
    tokenize(task, DATA, out=str(out), **SETTINGS)
    assert content(out) == content(cache)
    kept = out / "train-00000-of-00003.safetensors"
    assert kept.stat().st_mtime_ns == there[kept.name]
    monkeypatch.setattr(command, "_encoder", lambda *_: pytest.fail("all is done"))
    assert "is complete" in tokenize(task, DATA, out=str(out), **SETTINGS)


def test_losses_are_those_of_the_images(cache, task):
    params, frozen = drawn(lambda key: task.init(key).params), task.frozen()
    losses = jax.jit(task.token_losses)
    images, tokens = DATA.make(64, seed=3), Tokens(str(cache)).make(64, seed=3)
    expected, found = (losses(params, frozen, data.train_batch(2)) for data in (images, tokens))
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5, atol=1e-6)
    first = [data.held_out_batch(0) for data in (images, tokens)]
    both = [teacher_forcing.reconstructions(task.tokenizer, frozen, batch) for batch in first]
    np.testing.assert_allclose(both[1][0], both[0][1], atol=1e-5)
    assert both[0].shape == (2, 8, 8, 8, 1) and both[1].shape == (1, 8, 8, 8, 1)


def test_a_transformer_trains_on_tokens(cache, task, tmp_path):
    data = parse(f"tokens:{cache}", 8)
    experiment = Experiment(task, data, str(tmp_path), batch_size=64, steps=1)
    assert 0 < loop.train(experiment)["eval/loss"] < 2 * np.log(16)
    described = files.read_json(tmp_path / "data.json")
    assert described["class_names"] == [str(i) for i in range(10)]
    assert described["tokenizer_identity"]["vocab"] == 16 and described["seed"] == 3


def test_tokens_of_another_tokenizer_are_refused(cache, task, tmp_path):
    about = files.read_json(cache / "tokens.json")
    about["tokenizer_identity"] |= {"weights": "0" * 64, "phis": 1}
    other = tmp_path / "other"
    files.write_json(other / "tokens.json", about)
    for path in cache.glob("*.safetensors"):
        (other / path.name).symlink_to(path)
    data = Tokens(str(other))
    with pytest.raises(ValueError, match="(?s)another tokenizer's.*phis: 1 theirs.*weights: 0000"):
        loop.train(Experiment(task, data, str(tmp_path / "run"), batch_size=8, steps=1))
    tokenizer = VQTask(runs.TOKENIZER)
    with pytest.raises(ValueError, match="VQTask trains on images, but the data are tokens"):
        loop.train(Experiment(tokenizer, data, str(tmp_path / "tokenizer"), batch_size=8, steps=1))


def test_broken_images_are_broken_tokens(task, tmp_path, capsys):
    data = Fake(150, (7,), image_shape=(8, 8, 1), reading=Reading())
    tokenize(task, data, seed=0, batch_size=50, out=str(tmp_path), augmentations=2)
    assert capsys.readouterr().err.count("skipped: image_7.jpg") == 2  # of both splits, here equal
    images, tokens = data.make(50, 0), Tokens(str(tmp_path)).make(50, 0)
    for number in range(6):
        expected_B = images.train_batch(number)["label_B"]
        np.testing.assert_array_equal(tokens.train_batch(number)["label_B"], expected_B)
    assert [b["valid_B"].sum() for b in tokens.held_out()] == [49, 50, 50]
    assert f"{tmp_path} train[7]" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augmentations": 0}, "augmentations is 0"),
        ({"shards": -1}, "shards -1"),
        ({"process": (2, 2)}, "process 2 is none of 2"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"data": Tokens("there")}, "tokens already, in there"),
        ({"data": Noise(16, 1)}, r"images are \(16, 16, 1\), but the tokenizer takes \(8, 8, 1\)"),
        ({"task": VQTask(runs.TOKENIZER)}, "VQTask trains on images"),
        ({"seed": 4}, "(?s)holds other tokens.*seed: 3 there, 4 asked for"),
        ({"data": Digits()}, "settings: .* there, .* asked for"),
        ({"out": str(ROOT)}, "holds files and no tokens.json"),
    ],
)
def test_what_makes_no_sense_is_refused(cache, task, changes, message):
    with pytest.raises(ValueError, match=message):
        tokenize(**dict(task=task, data=DATA, out=str(cache)) | SETTINGS | changes)


def test_the_command(task, tmp_path, capsys):
    (tmp_path / "config.py").write_text(CONFIG.format(task.tokenizer_weights))
    flags = ["--config=config.py", "--out=out", "--augmentations=1"]
    assert command.main([*flags, "--config.data.size=60", "--config.seed=7"]) == 0
    said = capsys.readouterr()
    assert "tokens of 1 augmentations of 60 images" in said.out and "image/s" in said.err
    assert files.read_json("out/tokens.json")["seed"] == 7
    assert len(Tokens("out").source("train")) == 60 and Tokens("out").classes == 10
    assert command.main(flags) == 1
    assert "seed: 7 there, 0 asked for" in capsys.readouterr().err
    assert command.main([*flags, "--seed=3"]) == 1
    assert "settings are --config.FIELD=VALUE" in capsys.readouterr().err
    with pytest.raises(ValueError, match="nowhere holds no tokens"):
        parse("tokens:nowhere", 8).make(4, 0)


CONFIG = """
from tests.helpers import fake_data, runs
from varjax.training.experiment import Experiment
from varjax.var.task import VARTask

def get_config():
    task = VARTask(runs.VAR, runs.TOKENIZER, {!r})
    return Experiment(task, fake_data.Fake(image_shape=(8, 8, 1)), "run", batch_size=50, steps=1)
"""
