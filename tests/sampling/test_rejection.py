"""Tests rejection sampling, including interruption, resumption and several processes."""

import math
import threading

import jax
import numpy as np
import pytest
from PIL import Image

from tests.helpers.fake_sampler import FakeSampler
from varjax.cli import sample
from varjax.errors import InputError
from varjax.metrics.classifier import LoadedClassifier, load_classifier
from varjax.runtime import distributed
from varjax.sampling import rejection
from varjax.sampling.job import SamplingJob, divided
from varjax.sampling.outputs import NpzOutput, open_output, parts_folder
from varjax.sampling.rejection import (
    best_candidates,
    candidates_folder,
    run_rejection_job,
    sample_best,
)
from varjax.storage import files

LABELS, COUNT, ACCEPT = (3, 7, 1), 4, 0.3  # 14 candidates of each label


class FakeClassifier:
    """Computes the probability from an image's gray value, which is the image's number."""

    classes, identity = 10, {"network": "fake"}

    def __init__(self, fails_at=math.inf):
        self.calls, self.fails_at = 0, fails_at

    def probabilities(self, images_NHWC, label_N):
        self.calls += 1
        if self.calls == self.fails_at:
            raise KeyboardInterrupt
        return images_NHWC[:, 0, 0, 0].astype(int) * 7 % 11 / 10  # with ties


def job(batch_size=5, accept=ACCEPT, count=COUNT):
    options = FakeSampler().options()
    return SamplingJob(LABELS, count, 0, options, batch_size, accept, FakeClassifier.identity)


def draw(out, classifier=None, model=None, **changes):
    drawn, model = job(**changes), model or FakeSampler()
    output = open_output(str(out), drawn.label_N, COUNT, 0, drawn.request(model))
    folder = candidates_folder(out)
    return run_rejection_job(model, drawn, classifier or FakeClassifier(), output, folder)


def expected_numbers(accept=ACCEPT):
    """Returns the numbers of the kept images, by sorting all candidates of each label."""
    kept, N = [], len(LABELS) * COUNT
    for position in range(len(LABELS)):
        ranks = range(math.ceil(round(COUNT / accept, 9)))
        numbers = [rank // COUNT * N + position * COUNT + rank % COUNT for rank in ranks]
        best = sorted(numbers, key=lambda number: (-(number * 7 % 11), number))[:COUNT]
        kept += sorted(best)
    return kept


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Returns the content of an .npz written without interruption."""
    path = tmp_path_factory.mktemp("whole") / "a.npz"
    draw(path)
    return path.read_bytes()


def test_the_best_candidates_are_kept_and_ties_keep_the_first():
    probability_Pm = np.array([[0.1, 0.9, 0.5, 0.9], [0.2, 0.2, 0.2, 0.1]])
    assert best_candidates(probability_Pm, 2).tolist() == [[1, 3], [0, 1]]
    assert best_candidates(probability_Pm, 3).tolist() == [[1, 2, 3], [0, 1, 2]]


def test_candidate_numbers_extend_those_of_a_job_without_rejection():
    plain = SamplingJob(LABELS, COUNT, 0, None, 5)
    np.testing.assert_array_equal(plain.number_M, np.arange(12))
    np.testing.assert_array_equal(plain.label_M, plain.label_N)
    numbers_Pm = job().number_M.reshape(3, 14)
    assert numbers_Pm[1].tolist() == [4, 5, 6, 7, 16, 17, 18, 19, 28, 29, 30, 31, 40, 41]
    assert len(set(numbers_Pm.ravel())) == 42
    # A smaller acceptance draws the same candidates and more.
    np.testing.assert_array_equal(job(accept=0.5).number_M.reshape(3, 8), numbers_Pm[:, :8])
    counts = {accept: job(accept=accept, count=3).candidates for accept in (1, 0.1, 0.3, 0.7)}
    assert counts == {1: 3, 0.1: 30, 0.3: 10, 0.7: 5}


@pytest.mark.parametrize("accept", [0.1, ACCEPT, 1])
def test_kept_images_match_a_plain_sort(accept):
    images_NHWC, summary = sample_best(FakeSampler(), FakeClassifier(), LABELS, COUNT, accept)
    expected = expected_numbers(accept)
    assert images_NHWC[:, 0, 0, 0].tolist() == expected
    assert (summary.kept, summary.candidates) == (12, 3 * math.ceil(round(COUNT / accept, 9)))
    probabilities = [number * 7 % 11 / 10 for number in expected]
    assert summary.mean_probability == pytest.approx(np.mean(probabilities))
    assert summary.mean_probability_of_candidates <= summary.mean_probability


@pytest.mark.parametrize("batch_size, devices", [(2, 1), (5, 3), (64, 1)])
def test_batch_size_and_devices_do_not_change_the_images(batch_size, devices, tmp_path):
    model = FakeSampler(devices=tuple(range(devices)))
    message = draw(tmp_path / "images", model=model, batch_size=batch_size)
    assert "images/: 12 images; kept 12 of 42 images" in message
    names = sorted(path.name for path in (tmp_path / "images").glob("*.png"))
    assert names[4] == "000004_label0007.png"
    found = [int(np.asarray(Image.open(tmp_path / "images" / name))[0, 0]) for name in names]
    assert found == expected_numbers()
    draw(tmp_path / "a.npz", model=model, batch_size=batch_size)
    with np.load(tmp_path / "a.npz") as file:
        order = np.argsort(np.random.default_rng(0).permutation(12))
        assert file["arr_0"][order, 0, 0, 0].tolist() == expected_numbers()
        assert file["labels"][order].tolist() == np.repeat(LABELS, COUNT).tolist()
    assert "12 images; kept" in draw(tmp_path / "a.png", model=model, batch_size=batch_size)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.png", "images"]


@pytest.mark.parametrize("fails_at", [1, 4, 9])
def test_an_interrupted_job_resumes_to_the_same_bytes(fails_at, whole, tmp_path):
    out = tmp_path / "a.npz"
    with pytest.raises(KeyboardInterrupt):
        draw(out, FakeClassifier(fails_at))
    parts = list(candidates_folder(out).glob("*.safetensors"))
    assert len(parts) == fails_at - 1 and not out.exists()
    classifier = FakeClassifier()
    draw(out, classifier)
    assert classifier.calls == 9 - len(parts)  # 42 candidates in 9 parts
    assert out.read_bytes() == whole
    model = FakeSampler()
    assert draw(out, classifier, model).endswith("their labels") and model.calls == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]


def test_a_job_interrupted_while_writing_resumes(whole, tmp_path, monkeypatch):
    out, add = tmp_path / "a.npz", NpzOutput.add

    def failing(self, part, images_NHWC):
        if part.start == 5:
            raise KeyboardInterrupt
        add(self, part, images_NHWC)

    monkeypatch.setattr(NpzOutput, "add", failing)
    with pytest.raises(KeyboardInterrupt):
        draw(out)
    assert len(list(parts_folder(out).glob("*.safetensors"))) == 1
    monkeypatch.setattr(NpzOutput, "add", add)
    classifier = FakeClassifier()
    draw(out, classifier)
    assert classifier.calls == 0 and out.read_bytes() == whole


def test_the_output_may_be_the_current_folder(tmp_path, monkeypatch):
    folder = tmp_path / "images"
    folder.mkdir()
    monkeypatch.chdir(folder)
    draw(".")
    assert len(list(folder.glob("*.png"))) == len(LABELS) * COUNT
    assert [path.name for path in tmp_path.iterdir()] == ["images"]
    assert (
        candidates_folder("other/..") == candidates_folder(".") == tmp_path / ".images.candidates"
    )
    candidates_folder("/")  # no error here: the output is refused later


def test_a_damaged_part_is_sampled_again(whole, tmp_path):
    out = tmp_path / "a.npz"
    with pytest.raises(KeyboardInterrupt):
        draw(out, FakeClassifier(fails_at=9))
    file = sorted(candidates_folder(out).glob("*.safetensors"))[2]
    file.write_bytes(file.read_bytes()[:-1] + b"\0")
    classifier = FakeClassifier()
    draw(out, classifier)
    assert classifier.calls == 2 and out.read_bytes() == whole


def test_only_candidates_that_may_be_kept_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(rejection, "remove_work_folder", lambda folder: None)
    draw(tmp_path / "a.npz", accept=0.02, batch_size=50)
    parts = candidates_folder(tmp_path / "a.npz").glob("*.safetensors")
    contents = [files.read_tensors(path)[0] for path in parts]
    assert sum(len(content["probability_n"]) for content in contents) == 600
    assert 12 <= sum(len(content["image_NHWC"]) for content in contents) < 200


def test_two_processes_share_the_work(whole, tmp_path, monkeypatch):
    """Threads stand in for processes, and a barrier for their communication."""
    local, barrier, values = threading.local(), threading.Barrier(2, timeout=60), [None, None]

    def gather(value):
        values[local.index] = value
        barrier.wait()
        gathered = list(values)
        barrier.wait()
        return gathered

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: local.index)
    monkeypatch.setattr(distributed, "gather_json", gather)
    messages, classifiers = {}, [FakeClassifier(), FakeClassifier()]

    def process(index):
        local.index = index
        messages[index] = draw(tmp_path / "a.npz", classifiers[index])

    threads = [threading.Thread(target=process, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [classifier.calls for classifier in classifiers] == [5, 4]
    assert messages[0].endswith("before)") and messages[1] == ""
    assert (tmp_path / "a.npz").read_bytes() == whole


def test_a_different_classifier_or_acceptance_is_refused(tmp_path, monkeypatch):
    draw(tmp_path / "a.npz")
    with pytest.raises(InputError, match="accept: 0.3 there, 0.5 requested"):
        draw(tmp_path / "a.npz", accept=0.5)
    monkeypatch.setattr(FakeClassifier, "identity", {"network": "other"})
    with pytest.raises(InputError, match="classifier.network: 'fake' there, 'other' requested"):
        draw(tmp_path / "a.npz")


def test_invalid_probabilities_are_refused(tmp_path):
    for probabilities in (np.zeros(3), np.full(5, np.nan)):
        classifier = FakeClassifier()
        classifier.probabilities = lambda images, labels, found=probabilities: found
        with pytest.raises(InputError, match="probabilities have shape .* expected .5,. finite"):
            draw(tmp_path / "a.npz", classifier)


def test_sample_best_refuses_unsuitable_labels_and_classifiers():
    with pytest.raises(InputError, match="takes single classes, no mixes of them or no class"):
        sample_best(FakeSampler(), FakeClassifier(), [3, 10])
    with pytest.raises(InputError, match="takes images of 4x4 pixels"):
        sample_best(FakeSampler(), loaded(image_size=(4, 4)), [3])


def test_too_many_candidates_are_refused():
    with pytest.raises(InputError, match="count=50000 of 3 classes at accept=0.001 are 150"):
        job(accept=0.001, count=50_000)


SAMPLE = ["--weights=fake", "--labels=3,7", "--count=2", "--batch_size=2", "--out=a.npz"]


def loaded(**settings):
    identity = FakeClassifier.identity
    return LoadedClassifier(10, identity, lambda x: np.zeros((len(x), 10)), **settings)


@pytest.fixture
def model(monkeypatch):
    found = FakeSampler()
    monkeypatch.setattr(sample, "load", lambda *_, **__: found)
    monkeypatch.setattr(sample, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(
        rejection,
        "load_classifier",
        lambda location: loaded() if location == "fake" else load_classifier(location),
    )
    return found


def test_the_command_reports_how_many_images_were_kept(model, capsys):
    assert sample.main([*SAMPLE, "--accept=0.2", "--classifier=fake"]) == 0
    out = capsys.readouterr().out
    assert "a.npz: 4 images, shuffled" in out and "kept 4 of 20 images" in out
    with np.load("a.npz") as file:
        assert sorted(file["arr_0"][:, 0, 0, 0]) == [0, 1, 2, 3]  # ties keep the first


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--accept=0", "--classifier=fake"], "accept=0.0: must be above 0"),
        (["--accept=1.5", "--classifier=fake"], "accept=1.5: must be above 0"),
        (["--accept=nan", "--classifier=fake"], "accept=nan: must be above 0"),
        (["--accept=0.5"], "classifier=None: give both"),
        (["--classifier=fake"], "accept=None, classifier=fake: give both"),
        (
            ["--accept=0.5", "--classifier=nowhere"],
            "nowhere is not a directory of weights; make one",
        ),
    ],
)
def test_invalid_flags_are_refused_before_sampling(flags, message, model, capsys):
    assert sample.main([*SAMPLE, *flags]) == 1
    assert message in capsys.readouterr().err
    assert model.calls == 0


def test_a_classifier_that_does_not_match_the_model_is_refused(model, capsys, monkeypatch):
    arguments = [*SAMPLE, "--accept=0.5", "--classifier=fake"]
    model.classes = 1000
    assert sample.main(arguments) == 1
    assert "distinguishes 10 classes, the model draws 1000" in capsys.readouterr().err
    model.classes, model.image_shape = 10, (8, 8, 4)
    assert sample.main([*arguments, "--out=images"]) == 1
    assert "have 4 channels; classifiers take 1 (gray) or 3" in capsys.readouterr().err
    model.image_shape, size = (28, 28, 1), (8, 8)
    monkeypatch.setattr(rejection, "load_classifier", lambda _: loaded(image_size=size))
    assert sample.main(arguments) == 1
    assert "takes images of 8x8 pixels, the model's have 28x28" in capsys.readouterr().err
    assert model.calls == 0


@pytest.mark.slow
def test_the_classifier_of_digits_is_accurate():
    from varjax.data.sources import Digits

    held_out, classifier = Digits().source("held_out"), load_classifier("digits")
    probability_N = classifier.probabilities(held_out.images_NHWC, held_out.labels_N)
    assert classifier.classes == 10 and probability_N.dtype == np.float32
    assert np.mean(probability_N) > 0.85 and np.mean(probability_N > 0.5) > 0.9
    other_N = classifier.probabilities(held_out.images_NHWC, (held_out.labels_N + 1) % 10)
    assert np.mean(other_N) < 0.05


def test_images_are_divided_into_parts():
    assert divided(7, 3) == (range(0, 3), range(3, 6), range(6, 7)) and divided(0, 3) == ()
