"""Tests the programs in docs/python.md and the examples in public docstrings by running them."""

import dataclasses
import inspect
import pathlib
import re
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varjax
import varjax.api
from tests.helpers import runs, tiny
from tests.helpers.paths import ROOT
from varjax.checkpoints.class_names import imagenet_classes
from varjax.cli import train
from varjax.config import config_flags
from varjax.convert import from_torch
from varjax.data.sources import Digits
from varjax.evaluation import in_python
from varjax.export import folder, sampler
from varjax.metrics.features import pixel_network
from varjax.sampling.pictures import save
from varjax.training.experiment import Experiment

PAGE = (ROOT / "docs" / "python.md").read_text()
PROGRAMS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
LINES = 15
DIGITS = Digits().source("held_out").images_NHWC
PUBLIC = [
    name
    for name in dir(varjax)
    if getattr(getattr(varjax, name), "__doc__", "")
    and (inspect.isclass(getattr(varjax, name)) or inspect.isfunction(getattr(varjax, name)))
    and not name.startswith("_")
]


class TinyNames:
    """Loads tiny models instead of the named ones, and records calls that would take long."""

    def __init__(self):
        self.load, self.trained, self.converted = varjax.load, [], []
        self.exported = []

    def __call__(self, location, **given):
        model = self.load(runs.mar() if "mar" in location else runs.untrained_var(), **given)
        if location == "var_d16":
            model.labels = imagenet_classes()
            model.sample = lambda labels, **options: model.labels.numbers(labels)
        return model

    def train(self, *given):
        self.trained.append(given[0])
        return {"eval/loss": 1.0}

    def export(self, *given, **settings):
        self.exported.append(EXPORT.bind(*given, **settings))

    def convert(self, *given, **files):
        self.converted.append(CONVERT.bind(*given, **files))


EXPORT = inspect.signature(folder.export_model)
CONVERT = inspect.signature(from_torch.convert)


@pytest.fixture
def tiny_names(monkeypatch):
    """Replaces functions that need official weights or finished runs."""
    names = TinyNames()
    tokenizer = varjax.load_tokenizer(runs.untrained_var())
    experiment = Experiment(tiny.Tiny(), Digits(), "runs/digits", batch_size=32, steps=2)
    monkeypatch.setattr(varjax.api, "load", names)
    monkeypatch.setattr(varjax.api, "load_tokenizer", lambda run: tokenizer)
    monkeypatch.setattr(config_flags, "load_config", lambda name: experiment)
    monkeypatch.setattr(train, "train_experiment", names.train)
    monkeypatch.setattr(from_torch, "convert", names.convert)
    monkeypatch.setattr(folder, "export_model", names.export)
    monkeypatch.setattr(sampler, "load_exported", names)
    return names


def test_programs_are_short():
    assert len(PROGRAMS) > 10
    for program in PROGRAMS:
        assert len([line for line in program.splitlines() if line.strip()]) <= LINES, program


def test_the_page_names_every_public_function():
    functions = {name for name in dir(varjax) if inspect.isfunction(getattr(varjax, name, None))}
    functions -= {"__getattr__", "__dir__", "read_image"}  # read_image: docs/sampling.md
    assert functions
    assert not {name for name in functions if f"varjax.{name}" not in PAGE}


def examples(name: str) -> list[str]:
    """Returns the programs in the docstring of a public name, which are its indented paragraphs."""
    paragraphs = inspect.cleandoc(getattr(varjax, name).__doc__).split("\n\n")
    indented = (x for x in paragraphs if all(re.match(" {4}", line) for line in x.splitlines()))
    return [textwrap.dedent(x) for x in indented]


EXAMPLES = {name: examples(name) for name in PUBLIC}  # read before tests replace any of them


def test_every_public_object_has_an_example():
    assert {"load", "fid", "VARConfig"} <= set(PUBLIC)
    assert not [name for name, programs in EXAMPLES.items() if not programs]


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLIC)
def test_docstring_examples_run(name, tmp_path, monkeypatch, tiny_names):
    monkeypatch.chdir(tmp_path)
    images_NHWC = DIGITS[:20]
    found = {"varjax": varjax, "jnp": jnp, "jax": jax, "dataclasses": dataclasses}
    found |= {"images_BHWC": DIGITS[:3], "images_NHWC": images_NHWC, "labels": [1, 2, 3]}
    if name != "load":
        found["model"] = tiny_names("runs/digits")
    found |= {
        "steps_SNHWC": DIGITS[:6].reshape(2, 3, 8, 8, 1),
        "images": DIGITS[:3],
        "keep": np.arange(16).reshape(4, 4) < 8,
    }
    if name in ("Features", "evaluate", "fid"):
        monkeypatch.setattr(in_python, "feature_network", lambda *given: pixel_network())
        in_python._extractor.cache_clear()
        save(images_NHWC, "photos")
        save(images_NHWC, "VIRTUAL_imagenet256_labeled.npz")
        found["real"] = varjax.Features(images_NHWC, features="pixels")
    if name == "read_image":
        save(DIGITS[:1], "photo.jpg.png")
        pathlib.Path("photo.jpg.png").rename("photo.jpg")
    for program in EXAMPLES[name]:
        exec(program, found)
    in_python._extractor.cache_clear()


@pytest.mark.slow
def test_programs_run_in_order(tmp_path, monkeypatch, tiny_names):
    monkeypatch.chdir(tmp_path)
    save(DIGITS[:30], "real.npz")
    save(DIGITS[30:60], "samples.npz")
    found: dict = {}
    # Users' programs and Optax rely on JAX's default promotion of dtypes and ranks.
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for program in PROGRAMS:
            exec(program, found)

    (given,) = tiny_names.trained
    assert (given.steps, given.run_dir) == (200, "runs/mine") and tiny_names.converted
    assert tiny_names.exported
    assert found["dogs"] == [207, 207, "0:0.5+1:0.5"] and 207 in found["retrievers"]
    model = found["model"]
    # Twenty images, because the program for this batch size is already compiled.
    plain = model.sample([3, 1] + [0] * 18, seed=0, guidance=1.0)[:2]
    np.testing.assert_allclose(found["images_SBHWC"][0], plain, atol=1e-5)
    np.testing.assert_allclose(found["brightness_B"], plain.mean((1, 2, 3)), atol=1e-5)
    np.testing.assert_allclose(found["images_BHWC"], plain, atol=1e-5)
    assert norm(found["decoder_grads"]["decoder"]) > 0 and norm(found["var_grads"]) > 0
    assert not any(np.any(x) for x in jax.tree.leaves(found["decoder_grads"]["encoder"]))
    # One step on a batch lowers its loss.
    var = {"var": found["var"]}
    after = -found["log_likelihood"](found["params"] | var, found["token_BL"], found["label_B"])
    assert after.mean() < found["loss"]
    assert np.isfinite(found["metrics"]["loss"]) and int(found["state"].step) == 2


def norm(tree):
    return sum(float(np.square(x).sum()) for x in jax.tree.leaves(tree))
