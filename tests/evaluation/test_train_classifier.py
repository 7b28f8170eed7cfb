"""Tests `varjax train-classifier`, and evaluation with the classifiers that it writes."""

import dataclasses
import os

import jax
import numpy as np
import pytest

from tests.evaluation.test_evaluate import digits_npz, run
from tests.helpers.fake_data import FakeImages
from varjax import trees
from varjax.checkpoints.weights import abstract_params
from varjax.convert.weights_dir import write_weights
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.evaluation import train_classifier as command
from varjax.evaluation.train_classifier import ClassifierTraining, write_classifier
from varjax.metrics.classifier import load_classifier
from varjax.metrics.classifier_weights import read_classifier
from varjax.metrics.convnet import ConvNetConfig
from varjax.metrics.features import FeatureExtractor, classifier_network, feature_sizes
from varjax.storage import files

UNTRAINED = ConvNetConfig((8, 8), classes=10, widths=(4,), features=6)


def random_params():
    random = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: random.normal(size=x.shape).astype(x.dtype), abstract_params(UNTRAINED)
    )


def write_untrained(path, **changes):
    """Writes a classifier with random parameters, in the format of the command."""
    settings = {"_type": "ConvNetConfig", **dataclasses.asdict(UNTRAINED), **changes}
    write_weights(path, {"classifier": settings}, {"classifier": trees.paths(random_params())}, {})
    return path


@pytest.mark.slow
def test_training_learns_digits_and_is_reproducible(tmp_path):
    arguments = ["--data=digits", "--steps=60", "--batch_size=64"]
    assert command.main([*arguments, "--out=a"]) == command.main([*arguments, "--out=b"]) == 0
    about = files.read_json(tmp_path / "a/config.json")
    assert about["held_out_accuracy"] > 0.9 and about["training"]["train"] == {"images": 1442}
    (config, a), (_, b) = read_classifier("a"), read_classifier("b")
    assert config == ConvNetConfig.for_images((8, 8), 10)
    jax.tree.map(np.testing.assert_array_equal, a, b)

    held_out, classifier = Digits().source("held_out"), load_classifier("a")
    assert (classifier.classes, classifier.image_size) == (10, (8, 8))
    features = FeatureExtractor(classifier_network("a"))(held_out.images_NHWC)
    assert features["pool_ND"].shape == (355, config.features)
    right_N = features["logits_NV"].argmax(axis=1) == held_out.labels_N
    assert right_N.mean() == about["held_out_accuracy"]
    probability_N = classifier.probabilities(held_out.images_NHWC, held_out.labels_N)
    expected_N = jax.nn.softmax(features["logits_NV"])[np.arange(355), held_out.labels_N]
    np.testing.assert_allclose(probability_N, expected_N, rtol=1e-5)


def test_dropout_depends_on_the_key_and_is_off_without_one():
    params = random_params()
    image_BHWC = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 3), np.uint8)
    plain, again, one, other = (
        UNTRAINED.outputs(params, image_BHWC, key)["logits_BV"]
        for key in (None, None, jax.random.key(1), jax.random.key(2))
    )
    np.testing.assert_array_equal(plain, again)
    assert np.any(plain != one) and np.any(one != other)


@pytest.mark.parametrize(
    "size, widths",
    [
        ((8, 8), (32,)),
        ((28, 28), (32, 64)),
        ((64, 48), (32, 64, 128)),
        ((256, 256), (32, 64, 128, 128, 128)),
    ],
)
def test_depth_and_widths_follow_from_the_image_size(size, widths):
    assert ConvNetConfig.for_images(size, 5).widths == widths


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--data=folder:images", "--size=32"], "the data have one class"),
        (["--data=random", "--size=300"], "the images have 300x300 pixels; allowed are sides from"),
        (["--data=folder:images"], "size is missing: data=folder:images needs it"),
        (["--data=latents:somewhere"], "holds latents, but images are needed"),
        (["--data=digits", "--steps=0"], "steps=0: must be 1 or more"),
        (["--data=digits", "--seed=-1"], "seed=-1: must be 0 or more"),
        (["--data=digits", "--out=."], "which would be lost; choose another folder"),
        (["--data=digits", "--out=/proc/x/y"], "cannot write to /proc/x"),
    ],
)
def test_invalid_flags_are_refused_at_once(flags, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "train_classifier", None)
    (tmp_path / "images").mkdir()
    (tmp_path / "images/a.png").touch()
    assert command.main(["--out=new", *flags]) == 1
    assert message in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["images"]


def test_a_killed_training_leaves_nothing_and_a_finished_one_is_not_repeated(tmp_path, monkeypatch):
    def killed(data, training):
        raise KeyboardInterrupt

    def quick(data, training):
        return UNTRAINED, random_params(), 0.5

    out, training = tmp_path / "out", ClassifierTraining(steps=7)
    monkeypatch.setattr(command, "train_classifier", killed)
    with pytest.raises(KeyboardInterrupt):
        write_classifier(Digits(), training, "digits", out)
    assert not os.listdir(tmp_path)
    monkeypatch.setattr(command, "train_classifier", quick)
    message = write_classifier(Digits(), training, "digits", out)
    assert "0.5000 of the held-out images" in message
    monkeypatch.setattr(command, "train_classifier", killed)
    assert write_classifier(Digits(), training, "digits", out) == message
    with pytest.raises(InputError, match="steps: 7 there, 8 requested"):
        write_classifier(Digits(), ClassifierTraining(steps=8), "digits", out)


def test_a_trained_classifier_is_not_replaced_by_a_converted_one(tmp_path):
    out = write_untrained(tmp_path / "weights")
    held = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(InputError, match="contains classifier.safetensors, .* would be lost"):
        write_weights(out, {"classifier": {}}, {"classifier": {}}, {"resnet.pth": "0"})
    assert {path.name: path.read_bytes() for path in out.iterdir()} == held


def test_a_finished_classifier_of_another_image_size_is_refused(tmp_path, monkeypatch):
    config = ConvNetConfig((16, 16), classes=7, widths=(4,), features=6)
    monkeypatch.setattr(command, "train_classifier", lambda *_: (config, {"x": np.zeros(1)}, 0.5))

    def write(size):
        data = FakeImages(20, image_shape=(size, size, 3))
        write_classifier(data, ClassifierTraining(), "folder:images", tmp_path / "out")

    write(16)
    write(16)
    with pytest.raises(InputError, match=r"image_size: \[16, 16\] there, \[32, 32\] requested"):
        write(32)


@pytest.mark.slow
def test_real_images_have_equal_metrics_as_samples_and_as_real_images(tmp_path, capsys):
    """The samples are the held-out digits, which are also the real images of the report."""
    digits_npz("real.npz")
    features = f"--features={write_untrained(tmp_path / 'weights')}"
    assert run("real.npz", features, "--reference=digits", "--cache=cache") == 0
    report = files.read_json(tmp_path / "report.json")
    real = report["real"]
    assert (real["split"], real["images"]) == ("held_out", 355)
    names = {"fid", "inception_score", "label_accuracy", "precision", "recall", "kid"}
    assert report["metrics"].keys() >= names
    for name in names:
        np.testing.assert_allclose(
            real["metrics"][name], report["metrics"][name], 1e-5, err_msg=name
        )
    assert report["left_out"] == {"sfid": "these features are not spatial"}
    printed = capsys.readouterr().out
    assert "real: 355 held_out images of digits" in printed and "label accuracy" in printed


def test_label_accuracy_of_training_images_is_not_reported(tmp_path):
    digits_npz("real.npz", order=slice(50))
    features = f"--features={write_untrained(tmp_path / 'weights')}"
    flags = ["--reference=digits", "--split=held_out", "--cache=cache"]
    assert run("real.npz", features, *flags) == 0
    real = files.read_json(tmp_path / "report.json")["real"]
    assert (real["split"], real["images"]) == ("train", 50)
    assert "label_accuracy" not in real["metrics"]


def test_images_of_another_size_and_damaged_settings_are_refused(tmp_path):
    network = classifier_network(write_untrained(tmp_path / "weights"))
    with pytest.raises(InputError, match="takes images of 8x8 pixels, not 28x28; train one"):
        feature_sizes(network, (28, 28, 1))
    write_untrained(tmp_path / "other", _type="Mystery")
    with pytest.raises(InputError, match="is 'Mystery'; known are ConvNetConfig, ResNetConfig"):
        read_classifier(tmp_path / "other")
    write_untrained(tmp_path / "wide", widths=(10**9,))
    with pytest.raises(InputError, match="widths.* is 1000000000; numbers up to"):
        read_classifier(tmp_path / "wide")
