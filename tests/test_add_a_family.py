"""Tests a toy family that is added by the steps in docs/add_a_family.md."""

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from PIL import Image
from safetensors.numpy import save_file

import varjax
from tests.helpers import runs
from varjax import models
from varjax.checkpoints.weights import read_frozen_tokenizer
from varjax.cli import sample as command
from varjax.convert import __main__ as convert_command
from varjax.convert import name_maps
from varjax.convert.name_maps.name_map import Link, NameMap, option, tensor_shape
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.tokenizers.vq.model import VQConfig
from varjax.training import loop
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW
from varjax.training.train_step import accumulated_gradients, apply_gradients, create_state
from varjax.weight_files import convert_run


# 1. The model: a histogram of tokens, as logits, for each class and position.
@dataclasses.dataclass(frozen=True)
class HistogramConfig:
    classes: int
    length: int
    vocab: int

    def init(self, key):
        shape = self.classes + 1, self.length, self.vocab
        return {"histogram": {"kernel": 0.01 * jax.random.normal(key, shape)}}


# 2. The sampler and its options.
@dataclasses.dataclass(frozen=True)
class HistogramOptions:
    temperature: float = dataclasses.field(default=1.0, metadata={"help": "0 is greedy"})


class HistogramPipeline:
    def __init__(self, tokenizer, config, params, options, compute, devices):
        self.tokenizer, self.config, self.params, self._options = tokenizer, config, params, options
        self.classes, self.image_shape = config.classes, tokenizer.image_shape
        self.edit_shape, self.devices = (1, 1), (jax.devices()[0],)

    def options(self, **given):
        return dataclasses.replace(self._options, **given)

    def identity(self):
        return self.tokenizer.identity(self.params["tokenizer"])

    def sampling_bytes(self, batch_size, options):
        return 4 * batch_size * self.config.length * self.config.vocab

    def advise_on_nan(self, options):
        return "Try a lower temperature"

    def sample(self, labels, seed=0, *, index=None, **options):
        logits_BLV = self.params["histogram"]["histogram"]["kernel"][np.asarray(labels)]
        index_B = np.arange(len(labels)) if index is None else index
        key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), index_B)
        draw = jax.vmap(lambda key, logits: jax.random.gumbel(key, logits.shape))
        noise_BLV = self.options(**options).temperature * draw(key_B, logits_BLV)
        tokens = {"tokens_BL": jnp.argmax(logits_BLV + noise_BLV, axis=-1)}
        return self.tokenizer.decode(self.params["tokenizer"], tokens)


# 3. The task.
@dataclasses.dataclass(frozen=True)
class HistogramTask:
    model: HistogramConfig
    tokenizer: VQConfig
    tokenizer_weights: str
    optimizer: AdamW = AdamW(base_lr=4.0, weight_decay=0.0)
    sampling: HistogramOptions = HistogramOptions()
    accumulate: int = 1

    def check(self, image_shape, classes):
        if classes != self.model.classes:
            raise InputError(f"classes={classes}: the model has {self.model.classes}")

    def notes(self, plan):
        return []

    def init(self, key):
        return create_state(self.model.init(key), self.optimizer)

    def frozen(self):
        return read_frozen_tokenizer(self.tokenizer_weights, self.tokenizer)

    def tokenizer_identity(self, frozen):
        return self.tokenizer.identity(frozen)

    def _loss(self, params, frozen, batch):
        latents = (
            batch if "tokens_BL" in batch else self.tokenizer.encode(frozen, batch["image_BHWC"])
        )
        logits_BLV = params["histogram"]["kernel"][batch["label_B"]]
        loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, latents["tokens_BL"])
        return jnp.mean(loss_BL, axis=1)

    def train_step(self, state, frozen, batch, key, plan):
        def loss_fn(params, batch):
            loss = jnp.mean(self._loss(params, frozen, batch))
            return loss, {"loss": loss}

        grads, metrics = accumulated_gradients(loss_fn, state.params, batch)
        state, update_metrics = apply_gradients(state, grads, self.optimizer, plan)
        return state, metrics | update_metrics

    def train_flops(self, state, frozen, batch):
        return 0

    def eval_step(self, state, frozen, batch):
        loss_B = jnp.where(batch["valid_B"], self._loss(state.params, frozen, batch), 0)
        return {"loss": jnp.sum(loss_B), "images": jnp.sum(batch["valid_B"])}

    def eval_metrics(self, sums):
        return {"loss": sums["loss"] / sums["images"]}

    def preview(self, state, frozen, batch):
        return {}

    def sampler(self):
        return None


# 4. Its line in the table of families.
HISTOGRAM: Any = models.Family(
    "histogram", "HistogramTask", HistogramConfig, HistogramOptions, HistogramPipeline
)


# 5. Its name map, with an option for what the tensors do not reveal.
@dataclasses.dataclass(frozen=True)
class HistogramConvertOptions:
    null_classes: int = option(1, "rows of the histogram that belong to no class", int)


def infer_histogram(tensors, options):
    rows, length, vocab = tensor_shape(tensors, "histogram.weight", 3)
    return HistogramConfig(rows - options.null_classes, length, vocab)


HISTOGRAM_MAP = NameMap(
    part="histogram",
    flag="histogram",
    description="a histogram",
    known_by="histogram.weight",
    config=HistogramConfig,
    options=HistogramConvertOptions,
    infer=infer_histogram,
    table=lambda config: [Link("histogram.weight", ("histogram/kernel",))],
    sampling=lambda config: HistogramOptions(),
    reads=VQConfig,
)


@pytest.fixture(autouse=True)
def added(monkeypatch):
    monkeypatch.setattr(models, "FAMILIES", (*models.FAMILIES, HISTOGRAM))
    monkeypatch.setattr(name_maps, "NAME_MAPS", (*name_maps.NAME_MAPS, HISTOGRAM_MAP))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "histogram"
    model = HistogramConfig(10, runs.TOKENIZER.pyramid.length, runs.TOKENIZER.vocab)
    task = HistogramTask(model, runs.TOKENIZER, str(runs.tokenizer()))
    metrics = loop.train(Experiment(task, Digits(), str(run_dir), 64, steps=40, eval_every=40))
    return SimpleNamespace(dir=run_dir, loss=metrics["eval/loss"])


@pytest.mark.slow
def test_the_family_trains_loads_samples_and_converts(run, tmp_path):
    assert run.loss < 0.9 * np.log(runs.TOKENIZER.vocab)
    model = varjax.load(run.dir)
    images_BHWC = np.asarray(model.sample([3, 1, 4], seed=5))
    assert images_BHWC.shape == (3, 8, 8, 1) and images_BHWC.std() > 0
    greedy = [np.asarray(model.sample([3], seed=seed, temperature=0.0)) for seed in (0, 1)]
    np.testing.assert_array_equal(*greedy)
    convert_run(run.dir, tmp_path / "converted")
    again = varjax.load(tmp_path / "converted").sample([3, 1, 4], seed=5)
    np.testing.assert_array_equal(again, images_BHWC)


@pytest.mark.slow
def test_the_sample_command_takes_its_options_and_writes_every_output(run, tmp_path, capsys):
    asked = [f"--weights={run.dir}", "--labels=0,1", "--count=3", "--temperature=0.5"]
    assert command.main([*asked, f"--out={tmp_path / 'grid.png'}"]) == 0
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > grid.height
    assert command.main([*asked, f"--out={tmp_path / 'folder'}"]) == 0
    assert len(list((tmp_path / "folder").glob("*.png"))) == 6
    assert command.main([*asked, "--top_k=3", f"--out={tmp_path / 'x.png'}"]) != 0
    assert "top_k" in capsys.readouterr().err


def test_the_convert_command_takes_its_flags(tmp_path, capsys):
    kernel = np.random.default_rng(0).normal(size=(11, 30, 16)).astype(np.float32)
    save_file({"histogram.weight": kernel}, tmp_path / "official.safetensors")
    out = tmp_path / "out"
    flags = [f"--histogram={tmp_path / 'official.safetensors'}", f"--out={out}"]
    assert convert_command.main(flags) == 0
    _, config, params, options = models.read_model(out)
    assert (config, options) == (HistogramConfig(10, 30, 16), HistogramOptions())
    np.testing.assert_array_equal(params["histogram"]["kernel"], kernel)
    assert json.loads((out / "config.json").read_text())["convert_options"] == {}
    # The option reaches `infer`: with two null classes, the model expects one row too few.
    assert convert_command.main([*flags, "--null_classes=2"]) == 1
    assert "misshapen: histogram.weight is (11, 30, 16), expected (10, 30, 16)" in (
        capsys.readouterr().err
    )
    with pytest.raises(SystemExit):
        convert_command.main(["--help"])
    assert "--null_classes" in (text := capsys.readouterr().out) and "a histogram" in text
