"""Tests `varjax evaluate` on files and models: metrics, resuming, sweeps and refusals."""

import dataclasses
import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from tests.helpers import forked, runs
from tests.helpers.fake_data import FakeImages, reads_of
from tests.helpers.fake_sampler import FakeSampler
from tests.helpers.paths import ROOT
from varjax.cli import main
from varjax.cli import sample as sample_command
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.evaluation import __main__ as command
from varjax.evaluation import evaluate, references
from varjax.evaluation.references import is_dataset
from varjax.evaluation.sweep import point_path
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions
from varjax.metrics import image_sets, report
from varjax.metrics.features import FeatureExtractor, FeatureNetwork, pixel_network
from varjax.metrics.image_sets import open_image_set
from varjax.sampling.job import SamplingJob
from varjax.sampling.option_sweep import parse_sweep
from varjax.storage import files, image_io
from varjax.var.sample import VAROptions

PIXELS = ["--features=pixels", "--reference=digits", "--cache=cache"]


def run(*arguments: str) -> int:
    return command.main(list(arguments))


def digits_npz(path, split="held_out", order=slice(None)):
    source = Digits().source(split)
    images, labels = source.images_NHWC[order], source.labels_N[order]
    np.savez(path, arr_0=np.repeat(images, 3, axis=-1), labels=labels)


@pytest.mark.slow
def test_files_and_folders_may_be_named_like_datasets(tmp_path):
    digits_npz("digits.npz")
    names = ("digits.npz", "photos/", "digits_samples", "photos.npz")
    assert [is_dataset(name) for name in names] == [False] * 4
    for name in ("digits", "photos,images=9", "folder:digits", "idx:DIR", "tfds:mnist"):
        assert is_dataset(name)
    flags = ["--features=pixels", "--reference=digits.npz", "--cache=cache"]
    assert run("digits.npz", *flags, "--out=same.json") == 0
    assert files.read_json(tmp_path / "same.json")["reference"] == "digits.npz"


@pytest.mark.slow
def test_metrics_tell_real_digits_from_noise(tmp_path, capsys):
    digits_npz("real.npz")
    assert run("real.npz", *PIXELS, "--out=real.json") == 0
    real = json.loads((tmp_path / "real.json").read_text())
    assert real["images"] == 355 and real["reference_images"] == 1442
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 3), np.uint8)
    np.savez("noise.npz", arr_0=noise)
    assert run("noise.npz", *PIXELS, "--out=noise.json") == 0
    noise = json.loads((tmp_path / "noise.json").read_text())
    assert real["fid"] < 0.2 < 5 < noise["fid"] and real["kid"] < 0.01 < noise["kid"]
    assert real["precision"] > 0.8 and real["recall"] > 0.8
    assert noise["precision"] == noise["recall"] == 0
    printed = capsys.readouterr().out
    assert "355 samples of real.npz against 1,442 images of digits" in printed
    assert "Inception Score              –   left out: pixels have no logits" in printed
    assert "FID is larger with fewer samples" in printed


def test_the_same_command_reuses_the_report_and_others_are_refused(tmp_path, capsys, monkeypatch):
    digits_npz("real.npz")
    assert run("real.npz", *PIXELS) == 0
    monkeypatch.setattr(FeatureExtractor, "__call__", None)  # nothing is computed again
    assert run("real.npz", *PIXELS) == 0
    digits_npz("real.npz", "train")
    assert run("real.npz", *PIXELS) == 1
    assert "report.json was made with other settings" in capsys.readouterr().err


def test_an_unrelated_output_is_refused_before_the_reference_is_read(tmp_path, capsys, monkeypatch):
    digits_npz("real.npz")
    assert run("real.npz", *PIXELS) == 0
    monkeypatch.setattr(evaluate, "reference_of", None)
    digits_npz("real.npz", "train")
    assert run("real.npz", *PIXELS) == 1
    assert "report.json was made with other settings" in capsys.readouterr().err
    (tmp_path / "report.json").write_text("{}")
    assert run("real.npz", *PIXELS) == 1
    assert "exists and is not a report" in capsys.readouterr().err


def test_images_in_linked_folders_are_measured(tmp_path):
    for folder in ("images", "elsewhere"):
        (tmp_path / folder).mkdir()
        Image.new("L", (8, 8)).save(tmp_path / folder / "1.png")
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    assert open_image_set(tmp_path / "images").shape[0] == 2


def test_a_killed_evaluation_resumes_to_the_same_report(tmp_path, monkeypatch):
    monkeypatch.setattr(image_sets, "IMAGES_PER_PART", 100)
    digits_npz("real.npz")
    assert run("real.npz", *PIXELS, "--out=whole.json") == 0
    compute, calls = FeatureExtractor.__call__, []

    def failing(self, images_NHWC, *rest):
        calls.append(len(images_NHWC))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return compute(self, images_NHWC, *rest)

    monkeypatch.setattr(FeatureExtractor, "__call__", failing)
    assert run("real.npz", *PIXELS, "--out=killed.json") == 130
    assert run("real.npz", *PIXELS, "--out=killed.json") == 0
    assert calls == [100, 100, 100, 100, 55]
    whole, killed = (files.read_json(tmp_path / f"{name}.json") for name in ("whole", "killed"))
    assert whole == killed
    assert not list(tmp_path.glob(".*parts"))


def test_notices_warn_of_sorted_and_unbalanced_classes():
    rng = np.random.default_rng(0)
    label_N = np.repeat(np.arange(10), 30)
    logits_NV = 8 * np.eye(10)[label_N] + rng.normal(size=(300, 10))
    features = {"pool_ND": rng.normal(size=(300, 4)), "logits_NV": logits_NV}
    reference = evaluate.Reference(
        "", {"pool_ND": report.fid.Moments.of(features["pool_ND"])}, None, 9
    )
    measured = report.measure(features, reference, label_N)
    assert any("ordered by class" in notice for notice in measured.notices)
    assert set(measured.left_out) == {"sfid", "precision", "recall", "kid"}
    assert any("ordered" in n for n in report.measure(features, reference).notices)  # from logits
    order_N = rng.permutation(300)
    shuffled = {name: x[order_N] for name, x in features.items()}
    notices = report.measure(shuffled, reference, label_N[order_N]).notices
    assert len(notices) == 1 and "300 samples" in notices[0]
    few = {name: x[:299] for name, x in shuffled.items()}
    notices = report.measure(few, reference, label_N[order_N][:299]).notices
    assert any("classes have 29 to 30 samples" in notice for notice in notices)


@pytest.mark.slow
def test_evaluating_a_model_equals_evaluating_its_samples(tmp_path):
    flags = [f"--weights={runs.var()}", "--count=3", "--seed=5", "--top_k=3"]
    assert run(*flags, *PIXELS, "--batch_size=8", "--out=drawn.json") == 0
    sample_command.main([*flags, "--labels=all", "--batch_size=8", "--out=samples.npz"])
    assert run("samples.npz", *PIXELS, "--out=file.json") == 0
    drawn, file = (files.read_json(tmp_path / f"{name}.json") for name in ("drawn", "file"))
    assert drawn["images"] == 30
    assert drawn["metrics"] == file["metrics"]
    assert drawn["request"]["samples"]["top_k"] == 3 and drawn["published"] is None


@pytest.mark.slow
def test_a_sweep_measures_every_point_once(tmp_path, capsys):
    arguments = [
        f"--weights={runs.var()}", "--count=2", *PIXELS,
        "--sweep", "guidance=1,3", "top_k=1,9", "--out=sweep.json",
    ]  # fmt: skip
    assert run(*arguments) == 0
    printed = capsys.readouterr().out
    assert printed.count("lowest FID") == 1 and "sweep.png" in printed
    points = files.read_json(tmp_path / "sweep.json")["points"]
    assert [point["options"] for point in points] == [
        {"guidance": guidance, "top_k": top_k} for guidance in (1.0, 3.0) for top_k in (1, 9)
    ]
    assert points[0]["fid"] != points[1]["fid"]
    assert (tmp_path / "sweep.guidance=3,top_k=1.json").is_file()
    written = (tmp_path / "sweep.guidance=1,top_k=1.json").stat().st_mtime_ns
    assert run(*arguments) == 0
    assert (tmp_path / "sweep.guidance=1,top_k=1.json").stat().st_mtime_ns == written


@pytest.fixture
def sweep(monkeypatch):
    """Returns a function that sweeps options of a fake model, and the model."""
    model = FakeSampler()
    monkeypatch.setattr(command, "load", lambda *_, **__: model)
    digits_npz("real.npz", order=slice(9))

    def run_sweep(*arguments, reference="real.npz"):
        flags = ["--weights=fake", "--count=1", "--batch_size=10", "--features=pixels"]
        flags += [f"--reference={reference}", "--cache=cache", "--out=a.json"]
        return run(*flags, "--sweep", *arguments)

    return run_sweep, model


def test_a_sweep_inside_the_folder_of_the_reference_is_refused(sweep, capsys, tmp_path):
    run_sweep, model = sweep
    for number in range(40):
        image_io.write_png(tmp_path / f"{number}.png", np.zeros((8, 8, 1), np.uint8))
    reference = f"folder:{tmp_path}"
    assert run_sweep("guidance=2,3", "--crop=adm", reference=reference) == 1
    assert "out=a.json: is inside" in capsys.readouterr().err and model.calls == 0


def test_a_sweep_can_be_extended_with_more_values(sweep, tmp_path):
    run_sweep, model = sweep
    assert run_sweep("guidance=2,3") == 0 and model.calls == 2
    first = (tmp_path / "a.png").read_bytes()
    for _ in range(2):
        assert run_sweep("guidance=1,2,3,4") == 0 and model.calls == 4
    points = files.read_json("a.json")["points"]
    assert [point["options"]["guidance"] for point in points] == [1, 2, 3, 4]
    assert (tmp_path / "a.png").read_bytes() != first


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["top_k=1,2"], "points that would be lost: guidance=2; guidance=3. Sweep"),
        (["guidance=2,2.5"], "points that would be lost: guidance=3. Sweep"),
        (["guidance=2,3", "seed=0"], "points that would be lost: guidance=2; guidance=3. Sweep"),
        (["guidance=1,2,3", "--seed=5"], "samples.seed: 0 there, 5 requested"),
        (["guidance=1,2,3", "--top_k=7"], "samples.top_k: 900 there, 7 requested"),
    ],
)
def test_an_incompatible_sweep_is_refused(sweep, capsys, tmp_path, arguments, message):
    run_sweep, model = sweep
    assert run_sweep("guidance=2,3") == 0
    written = {path.name: path.read_bytes() for path in tmp_path.glob("a.*")}
    assert run_sweep(*arguments) == 1
    assert message in capsys.readouterr().err and model.calls == 2
    assert {path.name: path.read_bytes() for path in tmp_path.glob("a.*")} == written


def test_a_sweep_of_other_weights_or_references_is_refused(sweep, capsys, monkeypatch):
    run_sweep, model = sweep
    assert run_sweep("guidance=2,3") == 0
    digits_npz("other.npz", order=slice(9, 18))
    assert run_sweep("guidance=1,2,3", reference="other.npz") == 1
    assert "a.guidance=2.json was made with other settings" in capsys.readouterr().err
    monkeypatch.setattr(FakeSampler, "identity", lambda self: {"weights": "other"})
    assert run_sweep("guidance=1,2,3") == 1
    assert "samples.weights: 'fake' there, 'other' requested" in capsys.readouterr().err
    os.remove("a.guidance=3.json")  # a point without its report cannot be compared
    os.remove("a.guidance=2.json")
    assert run_sweep("guidance=1,2,3") == 1
    assert "the report of a point, a.guidance=2.json, is missing" in capsys.readouterr().err
    assert model.calls == 2


def test_a_sweep_does_not_replace_other_files(sweep, capsys, tmp_path):
    run_sweep, model = sweep
    (tmp_path / "a.png").write_bytes(b"mine")
    assert run_sweep("guidance=2,3") == 1
    assert "a.png exists, and the picture of this sweep would replace" in capsys.readouterr().err
    assert model.calls == 0 and (tmp_path / "a.png").read_bytes() == b"mine"
    for content in ("{}", '{"points": 3}', '{"points": [{"options": 1}]}'):
        (tmp_path / "a.json").write_text(content)
        assert run_sweep("guidance=2,3") == 1
        assert "a.json exists and is not a sweep" in capsys.readouterr().err


def test_a_network_with_all_features_gives_every_metric(tmp_path, monkeypatch):
    def apply(params, image_BHWC):
        x_BC = image_BHWC.reshape(len(image_BHWC), -1).astype("float32") / 255
        return {"pool_BD": x_BC[:, :9], "spatial_BD": x_BC[:, 9:16], "logits_BV": x_BC[:, 16:20]}

    network = FeatureNetwork({"features": "parts"}, {}, apply, classes=4)
    monkeypatch.setattr(command, "feature_network", lambda features, inception: network)
    rng = np.random.default_rng(0)
    for name in ("samples", "reference"):
        images_NHWC = rng.integers(0, 256, (30, 8, 8, 3), np.uint8)
        np.savez(f"{name}.npz", arr_0=images_NHWC, labels=np.arange(30) % 4)
    assert run("samples.npz", "--reference=reference.npz", "--cache=cache") == 0
    found = files.read_json(tmp_path / "report.json")
    assert {key for key, *_ in report.ROWS} <= found.keys() and not found["left_out"]
    assert found["fid"] > 0 and found["sfid"] > 0 and 1 <= found["inception_score"] < 4


def test_sweep_values_are_parsed_by_the_types_of_the_options():
    points = parse_sweep(["guidance=1,2.5", "top_k=5"], VAROptions())
    assert points == [{"guidance": 1.0, "top_k": 5}, {"guidance": 2.5, "top_k": 5}]
    for text, message in (
        ("guidance", "give OPTION=VALUE"),
        ("cfg=0,1.5", "sweep cfg=0,1.5: write guidance=1.0,2.5, for guidance is VAR's cfg"),
        ("heads=1,2", "options of this model are guidance"),
        ("top_k=a", "sweep top_k=a: give a int"),
        ("guidance=1,2,1.0", "sweep guidance=1,2,1.0: a value is given twice"),
    ):
        with pytest.raises(ValueError, match=message):
            parse_sweep([text], VAROptions())
    with pytest.raises(ValueError, match="guidance is swept twice"):
        parse_sweep(["guidance=1", "guidance=2"], VAROptions())


def test_a_long_list_in_a_sweep_gets_a_short_and_unique_file_name(tmp_path):
    paths = []
    for last in (1.0, 2.0):
        path = point_path(tmp_path / "sweep.json", {"guidance": (1.0,) * 256 + (last,)})
        path.write_text("{}")
        paths.append(path.name)
    assert paths[0] != paths[1] and paths[0].startswith("sweep.guidance=1:1:1:")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give SAMPLES .* or --weights"),
        (["a.npz", "--weights=b"], "give SAMPLES .* or --weights"),
        (["a.npz", "--out=report.txt"], "ends in .json"),
        (["a.npz", "--guidance=2"], "--guidance: needs --weights"),
        (["a.npz", "--draft_scales=0"], "--draft_scales: needs --weights"),
        (["a.npz", "--sweep", "guidance=1"], "--sweep: needs --weights"),
        (["a.npz", "--ema=true", "--dtype=float32"], "--ema, --dtype: needs --weights"),
        (["a.npz", "--count=9", "--seed=1"], "--count, --seed: needs --weights"),
        (["a.npz", "--batch_size=2"], "--batch_size: needs --weights"),
        (["absent.npz"], "absent.npz does not exist"),
        (["one.npz"], "one.npz has 1 images; two or more"),
        (["large.npz"], "digits are 8 by 8 pixels"),
        (["two.npz", "--reference=absent"], "absent does not exist"),
        (
            ["two.npz", "--reference=two.npz", "--split=held_out", "--crop=adm"],
            "split=held_out, crop=adm: needs a reference that is a dataset",
        ),
        (["two.npz", "--out=other.json"], "other.json exists and is not a report"),
    ],
)
def test_invalid_command_lines_are_refused(tmp_path, capsys, arguments, message):
    for name, shape in (("one", (1, 8, 8, 3)), ("two", (2, 8, 8, 3)), ("large", (2, 9, 9, 3))):
        np.savez(f"{name}.npz", arr_0=np.zeros(shape, np.uint8))
    (tmp_path / "other.json").write_text("{}")
    assert run(*PIXELS, *arguments) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error


@dataclasses.dataclass(frozen=True)
class WithoutHeldOut(FakeImages):
    """A dataset without the split that the column "real" needs."""

    def source(self, split):
        if split == "held_out":
            raise InputError("has no split held_out")
        return super().source(split)


@pytest.mark.parametrize("drawn", [False, True])
def test_a_missing_split_is_reported_before_features_are_computed(tmp_path, monkeypatch, drawn):
    data = WithoutHeldOut(image_shape=(8, 8, 3))
    monkeypatch.setattr(references, "dataset_of_command", lambda *_: data)
    network = dataclasses.replace(pixel_network(), classes=10)
    settings = references.EvaluationSettings(
        FeatureExtractor(network), "folder:x", "train", tmp_path / "cache"
    )
    with pytest.raises(InputError, match="has no split held_out"):
        if drawn:
            model = FakeSampler()
            jobs = {tmp_path / "a.json": SamplingJob((0, 1), 2, 0, model.options(), 2)}
            evaluate.evaluate_model(settings, model, "m", jobs)
        else:
            digits_npz("real.npz", order=slice(9))
            images = open_image_set("real.npz")
            evaluate.evaluate_images(settings, images, "real", tmp_path / "a.json")
    assert not reads_of(data)


def write_photographs(folder):
    """Writes images of two classes, larger than the samples."""
    for i in range(40):
        path = folder / f"train/{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(i).integers(0, 256, (12, 20, 3), np.uint8)
        Image.fromarray(noise).resize((40, 24)).save(path)


def test_references_are_cropped_by_the_flag_or_the_models_recipe(tmp_path, capsys, monkeypatch):
    write_photographs(tmp_path / "photographs")
    digits_npz("real.npz", order=slice(40))
    against = ["real.npz", "--features=pixels", "--cache=cache", "--reference=folder:photographs"]
    found = {}
    for crop in ("auto", "var", "adm"):
        assert run(*against, f"--crop={crop}", f"--out={crop}.json") == 0
        found[crop] = files.read_json(tmp_path / f"{crop}.json")
        assert f"(--crop={'adm' if crop == 'adm' else 'var'})" in capsys.readouterr().out
    assert found["var"]["fid"] == found["auto"]["fid"] != found["adm"]["fid"]
    assert found["adm"]["reference_crop"].startswith("cropped as in ADM")
    assert run("real.npz", *PIXELS, "--out=digits.json") == 0
    assert "(--crop" not in capsys.readouterr().out  # there is nothing to crop
    # Without the flag, the model's recipe decides.
    asked = []
    monkeypatch.setattr(command, "choose_crop", lambda *given: asked.append(given) or "center")
    monkeypatch.setattr(
        command, "load", lambda *given, **named: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    run("--weights=runs/x", *against[1:])
    assert asked == [("auto", "runs/x")]


class FakeModel:
    """A stand-in for a released MAR, with what the command needs before sampling."""

    classes, image_shape = 1000, (256, 256, 3)
    config = {"tokenizer": None, "mar": MARConfig.preset("mar_b")}

    def options(self, **given):
        return dataclasses.replace(MAROptions(steps=64), **given)


def test_a_released_mar_is_evaluated_in_256_steps(monkeypatch):
    asked = []
    monkeypatch.setattr(command, "load", lambda *given, **named: FakeModel())
    monkeypatch.setattr(
        command, "evaluate_model", lambda *given: asked.extend(given[3].values()) or [{}]
    )
    monkeypatch.setattr(command, "print_report", lambda report: None)
    flags = ["--weights=mar_b", "--batch_size=8", "--features=pixels", "--reference=adm.npz"]
    for more, steps in (([], 256), (["--steps=32"], 32)):
        assert run(*flags, *more) == 0
        assert asked[-1].options == MAROptions(steps=steps)


def test_evaluate_is_a_command():
    assert main.COMMANDS["evaluate"][0] == "varjax.evaluation.__main__"


@pytest.mark.slow
def test_two_processes_write_the_same_report_as_one(tmp_path):
    flags = [f"--weights={runs.var()}", "--count=3", "--batch_size=4", *PIXELS]
    assert run(*flags, "--out=one.json") == 0
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"--coordinator=localhost:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "varjax.evaluation", *flags, "--out=two.json", address]
    processes = [
        forked.Popen(
            [*command, "--processes=2", f"--process={number}"],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    said = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "30 samples" in said[0] and "samples" not in said[1]  # only the first prints
    one, two = (json.loads((tmp_path / name).read_text()) for name in ("one.json", "two.json"))
    assert one == two
