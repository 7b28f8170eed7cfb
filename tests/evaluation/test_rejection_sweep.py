"""Tests `varjax evaluate --accept` and sweeps of the acceptance, which sample only once."""

import jax
import numpy as np
import pytest

from tests.helpers.fake_sampler import FakeSampler
from varjax.cli import sample
from varjax.evaluation import __main__ as command
from varjax.evaluation import evaluate
from varjax.metrics.classifier import LoadedClassifier
from varjax.metrics.features import FeatureExtractor
from varjax.metrics.report import SampleMetrics
from varjax.sampling import rejection
from varjax.storage import files

FLAGS = ["--weights=fake", "--count=2", "--batch_size=8", "--classifier=fake"]
PIXELS = ["--reference=real.npz", "--features=pixels", "--cache=cache"]
SWEEP = ["--sweep", "accept=1,0.5,0.2", "--out=sweep.json"]


def predict(images_NHWC):
    """Computes probabilities from an image's gray value, with ties."""
    return np.repeat(images_NHWC[:, :1, 0, 0] * 7 % 11 / 10, 10, axis=1)


def measure(features, reference, label_N, classes=None, logit_classes=None):
    """Computes a quick metric that depends on the images and their order."""
    pool_ND = features["pool_ND"]
    return SampleMetrics({"fid": float(pool_ND[:, 0] @ np.arange(len(pool_ND)))}, {}, [])


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(evaluate, "measure", measure)
    found, classifier = FakeSampler(), LoadedClassifier(10, {"network": "fake"}, predict)
    for module in (sample, command):
        monkeypatch.setattr(module, "load", lambda *_, **__: found)
        monkeypatch.setattr(module, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(rejection, "load_classifier", lambda location: classifier)
    real_NHWC = np.random.default_rng(0).integers(0, 256, (9, 8, 8, 3), np.uint8)
    np.savez("real.npz", arr_0=real_NHWC)
    return found


def run(*arguments):
    return command.main([*FLAGS, *PIXELS, *arguments])


def report(name):
    return files.read_json(name) | {"versions": None}


def test_a_sweep_of_acceptances_samples_once_and_equals_single_runs(model, tmp_path, capsys):
    assert run(*SWEEP) == 0
    assert model.calls == 13  # 100 candidates in parts of 8
    assert "accept" in capsys.readouterr().out and (tmp_path / "sweep.png").is_file()
    points = files.read_json("sweep.json")["points"]
    assert [point["options"] for point in points] == [{"accept": x} for x in (1.0, 0.5, 0.2)]
    for accept in (1, 0.5, 0.2):
        assert run(f"--accept={accept}", f"--out={accept}.json") == 0
        assert report(f"sweep.accept={accept}.json") == report(f"{accept}.json")
    assert "kept 20 of 100 images" in capsys.readouterr().out
    kept = [files.read_json(f"{accept}.json")["rejection"] for accept in (1, 0.5, 0.2)]
    assert [x["candidates"] for x in kept] == [20, 40, 100] and {x["kept"] for x in kept} == {20}
    means = [x["mean_probability"] for x in kept]
    assert means == sorted(means) and means[0] == kept[0]["mean_probability_of_candidates"]
    assert not list(tmp_path.glob(".*parts"))


def test_adding_a_lower_acceptance_keeps_the_batch_size(model):
    model.devices = tuple(jax.devices()[:1])
    for accepts in ("1,0.9", "1,0.9,0.5"):  # 30 and 40 candidates
        sweep = ["--batch_size=auto", "--sweep", f"accept={accepts}", "--out=sweep.json"]
        assert run(*sweep) == 0
        last = files.read_json(f"sweep.accept={accepts[-3:]}.json")
        assert last["request"]["samples"]["batch_size"] == 30


def test_accept_measures_the_images_that_the_sample_command_writes(model):
    assert run("--accept=0.2", "--out=drawn.json") == 0
    assert sample.main([*FLAGS, "--labels=all", "--accept=0.2", "--out=samples.npz"]) == 0
    assert command.main(["samples.npz", *PIXELS, "--out=file.json"]) == 0
    drawn, file = files.read_json("drawn.json"), files.read_json("file.json")
    assert drawn["metrics"] == file["metrics"] and drawn["images"] == 20
    assert drawn["request"]["samples"]["accept"] == 0.2


@pytest.mark.parametrize("fails_at", [4, "report"])
def test_an_interrupted_sweep_resumes_to_the_same_reports(fails_at, model, monkeypatch):
    monkeypatch.setattr(command, "write_sweep", lambda points, out: out)
    assert run(*SWEEP[:2], "--out=whole.json") == 0
    with monkeypatch.context() as patch:
        calls, compute, write = [], FeatureExtractor.__call__, evaluate._write_report

        def failing(self, images_NHWC, *rest):
            calls.append(len(images_NHWC))
            if len(calls) == fails_at:
                raise KeyboardInterrupt
            return compute(self, images_NHWC, *rest)

        def failing_report(out, *rest):
            if fails_at == "report" and "0.5" in out.name:
                raise KeyboardInterrupt
            return write(out, *rest)

        patch.setattr(FeatureExtractor, "__call__", failing)
        patch.setattr(evaluate, "_write_report", failing_report)
        assert run(*SWEEP) == 130
    drawn = model.calls
    assert run(*SWEEP) == 0
    assert model.calls - drawn == (0 if fails_at == "report" else 10)
    for accept in (1, 0.5, 0.2):
        assert report(f"sweep.accept={accept}.json") == report(f"whole.accept={accept}.json")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sweep", "accept=1,0"], "accept=0.0: must be above 0"),
        (["--sweep", "accept=a"], "sweep accept=a: give a float"),
        (["--sweep", "accept="], "sweep accept=: give a float"),
        (["--sweep", "accept=0.5,0.5"], "sweep accept=0.5,0.5: a value is given twice"),
        (["--sweep", "accept=1,1.0"], "sweep accept=1,1.0: a value is given twice"),
        (["--sweep", "accept=1", "accept=0.5"], "sweep accept=0.5: accept is swept twice"),
        (["--accept=1", "--sweep", "accept=0.5"], "accept=1.0 and a sweep of accept: give one"),
        ([], "accept=None, classifier=fake: give both"),
    ],
)
def test_invalid_flags_are_refused_before_sampling(arguments, message, model, capsys):
    assert run(*arguments) == 1
    assert message in capsys.readouterr().err and model.calls == 0


def test_accept_is_refused_for_samples_of_a_file(capsys):
    assert command.main(["a.npz", *PIXELS, "--accept=0.5", "--classifier=digits"]) == 1
    assert "--accept, --classifier: needs --weights" in capsys.readouterr().err
