"""Tests FID during training: of the parameters and the EMA, with fixed seeds."""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.evaluation.test_train_classifier import write_untrained
from tests.helpers import runs, tiny
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.metrics import references
from varjax.metrics.features import FeatureExtractor, classifier_network, pixel_network
from varjax.metrics.fid import Moments, frechet_distance
from varjax.tokenizers.vq.task import VQTask
from varjax.training import loop
from varjax.training.fid_evaluation import FIDConfig, FIDEvaluator
from varjax.training.sharding import MeshShape, make_mesh

FID = FIDConfig(every=10, images=40, features="pixels")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("VARJAX_CACHE", str(tmp_path / "cache"))


def evaluator(config=FID, batch_size=16, task=None, data=None):
    task, data = task or tiny.Tiny(), data or Digits()
    mesh, run_dir = make_mesh(MeshShape()), pathlib.Path("run")
    evaluator = FIDEvaluator(config, task, data, {}, mesh, batch_size, run_dir, False)
    evaluator.read_reference()
    return evaluator


def state():
    return tiny.Tiny().init(jax.random.key(3))


def test_fid_is_the_distance_of_the_drawn_images():
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(40))
    extract, draw = FeatureExtractor(pixel_network()), tiny.Tiny().sampler()
    real = Moments.of(extract(Digits().source("held_out").images_NHWC)["pool_ND"])

    def distance(label_B):
        images = np.asarray(draw(state().params, {}, label_B, key_B))
        features = extract(np.rint(images * 255).astype(np.uint8))
        return frechet_distance(Moments.of(features["pool_ND"]), real)

    found = evaluator().metrics(state())
    # Labels cycle through the classes; other labels give another distance.
    assert found["eval/fid"] == pytest.approx(distance(np.arange(40) % 10), rel=1e-5)
    for wrong_B in (np.zeros(40, int), np.arange(40) // 4, np.arange(40) % 9):
        assert found["eval/fid"] != pytest.approx(distance(wrong_B), rel=1e-4)
    assert list(found) == evaluator().metric_names(state())


def test_fid_depends_on_the_seed_but_not_on_the_batch_size():
    first, other = (evaluator(batch_size=size).metrics(state()) for size in (16, 40))
    assert first["eval/fid"] == pytest.approx(other["eval/fid"], rel=1e-6)
    again = evaluator(dataclasses.replace(FID, seed=1)).metrics(state())
    assert again["eval/fid"] != pytest.approx(first["eval/fid"], rel=1e-6)


@dataclasses.dataclass(frozen=True)
class Inverted(Digits):
    """The digits, inverted, under the same names."""

    def source(self, split):
        source = super().source(split)
        return dataclasses.replace(source, images_NHWC=255 - source.images_NHWC)


def test_changed_held_out_images_are_measured_again(monkeypatch):
    before = evaluator().metrics(state())
    assert evaluator(data=Inverted()).metrics(state()) != before
    monkeypatch.setattr(references, "extract_features", None)  # nothing is computed again
    assert evaluator().metrics(state()) == before


def test_a_classifier_also_measures_label_accuracy(tmp_path):
    config = dataclasses.replace(FID, features=str(write_untrained(tmp_path / "weights")))
    found = evaluator(config).metrics(state())
    assert list(found) == evaluator(config).metric_names(state())
    key_B = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), np.arange(40))
    label_B = np.arange(40) % 10
    images = np.asarray(tiny.Tiny().sampler()(state().params, {}, label_B, key_B))
    extract = FeatureExtractor(classifier_network(config.features))
    logits_NV = extract(np.rint(images * 255).astype(np.uint8))["logits_NV"]
    right_N = logits_NV.argmax(axis=1) == label_B
    assert found["eval/label_accuracy"] == right_N.mean() and len(set(logits_NV.argmax(axis=1))) > 1
    assert found["eval/inception_score"] > 1


def test_an_evaluation_can_be_stopped():
    assert evaluator().metrics(state(), stop=lambda: True) is None


def test_a_run_logs_fid_and_keeps_the_best_by_it(tmp_path):
    e = tiny.experiment(
        tmp_path / "run", steps=20, eval_every=10, keep_best="eval_ema/fid", fid=FID, save_every=10
    )
    metrics = loop.train(e)
    assert {"eval/fid", "eval_ema/fid", "eval_ema/loss"} <= metrics.keys()
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    logged = {line["step"]: line["eval_ema/fid"] for line in lines if "eval_ema/fid" in line}
    assert list(logged) == [10, 20] and logged[10] != logged[20]
    best = min(logged, key=logged.__getitem__)
    assert (tmp_path / "run/best" / str(best)).is_dir()


def test_invalid_fid_settings_are_refused_before_the_run(tmp_path):
    with pytest.raises(InputError, match="a tokenizer draws no images"):
        evaluator(task=VQTask(runs.TOKENIZER))
    with pytest.raises(InputError, match="inception is missing"):
        evaluator(dataclasses.replace(FID, features="inception"))
    with pytest.raises(InputError, match="absent.npz does not exist"):
        evaluator(dataclasses.replace(FID, reference=str(tmp_path / "absent.npz")))
    mesh = make_mesh(MeshShape())
    with pytest.raises(InputError, match="this run's data are latents"):
        FIDEvaluator(FID, tiny.Tiny(), Digits(), {}, mesh, 16, tmp_path, on_latents=True)
    for wrong in ({"every": -1}, {"images": 1}, {"seed": -1}):
        with pytest.raises(InputError, match="fid"):
            tiny.experiment(tmp_path, fid=dataclasses.replace(FID, **wrong)).check()
    e = tiny.experiment(tmp_path / "run", eval_every=5, keep_best="eval/fid", fid=FID)
    with pytest.raises(InputError, match="keep_best is 'eval/fid', but an evaluation gives"):
        loop.train(e)  # not every evaluation measures FID


def test_fid_is_nan_if_samples_are_nan(capsys):
    """As uint8 they would be black images with a finite FID."""

    class Broken(tiny.Tiny):
        def sampler(self):
            draw = super().sampler()

            def broken(params, frozen, label_B, key_B):
                images_BHWC = draw(params, frozen, label_B, key_B)
                return jnp.where((label_B == 3)[:, None, None, None], jnp.nan, images_BHWC)

            return broken

    found = evaluator(task=Broken()).metrics(state())
    assert found.keys() == {"eval/fid", "eval_ema/fid"} and np.isnan([*found.values()]).all()
    assert "eval/fid is NaN: 4 of 40 samples are NaN" in capsys.readouterr().err
