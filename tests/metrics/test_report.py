"""Tests what a report on samples says about their order, classes and label accuracy."""

import numpy as np
import pytest

from varjax.metrics import report
from varjax.metrics.fid import Moments
from varjax.metrics.references import Reference

RNG = np.random.default_rng(0)
CLASSES, EACH = 50, 40
LABEL_N = np.repeat(np.arange(CLASSES), EACH)


def notices(label_N, logits_NV=None, classes=None):
    N = LABEL_N.size if logits_NV is None else len(logits_NV)
    features = {"pool_ND": RNG.normal(size=(N, 2))}
    if logits_NV is not None:
        features["logits_NV"] = logits_NV
    reference = Reference("", {"pool_ND": Moments.of(features["pool_ND"])}, None, 9)
    found = report.measure(features, reference, label_N, classes).notices
    return [notice for notice in found if "FID is larger" not in notice]


def poor_logits(signal):
    """Returns logits of samples that a classifier mostly assigns to wrong classes."""
    return signal * np.eye(CLASSES)[LABEL_N] + RNG.normal(size=(LABEL_N.size, CLASSES))


def test_ordered_samples_of_poor_quality_are_noticed_without_labels():
    logits_NV = poor_logits(signal=1.5)
    right = np.mean(logits_NV.argmax(axis=1) == LABEL_N)
    assert right < 0.3  # so neighbors rarely have the same predicted class
    (notice,) = notices(None, logits_NV)
    assert "ordered by class" in notice
    shuffled = float(notice.rpartition(" ")[2])
    assert shuffled > 1
    assert not notices(None, RNG.permutation(logits_NV))


@pytest.mark.parametrize("seed", range(20))
def test_a_random_order_does_not_look_ordered(seed):
    rng = np.random.default_rng(seed)
    classes = int(rng.integers(2, 60))
    label_N = rng.integers(0, classes, int(rng.integers(2, 300)))
    for order_N in (label_N, np.sort(label_N), np.sort(label_N)[::-1]):
        one_hot_NV = np.eye(classes, dtype=np.float32)[order_N]
        assert report.labels_look_ordered(order_N) == report.looks_ordered(one_hot_NV)
    assert not report.labels_look_ordered(label_N)
    probability_NV = rng.dirichlet(np.full(classes, 0.1), 300).astype(np.float32)
    assert not report.looks_ordered(probability_NV)


@pytest.mark.parametrize("label_N", [[3], [3, 3], [1] * 50])
def test_a_single_class_does_not_look_ordered(label_N):
    assert not report.labels_look_ordered(np.array(label_N))


@pytest.mark.parametrize("count", [50, 5_000])
def test_equal_samples_do_not_look_ordered(count):
    row_V = np.random.default_rng(0).dirichlet(np.ones(10)).astype(np.float32)
    assert not report.looks_ordered(np.tile(row_V, (count, 1)))


def test_memory_suffices_if_all_labels_differ():
    number_N = np.arange(100_000)  # a one-hot matrix of these would have 40 GB
    assert not report.labels_look_ordered(number_N)
    assert report.labels_look_ordered(number_N // 2)


def test_random_logits_give_no_notice_of_order():
    assert not notices(None, RNG.normal(size=(LABEL_N.size, CLASSES)))


def test_missing_classes_are_noticed():
    shuffled_N = RNG.permutation(LABEL_N)
    assert not notices(shuffled_N) and not notices(shuffled_N, classes=CLASSES)
    (notice,) = notices(shuffled_N, classes=CLASSES + 2)
    assert "2 of 52 classes have no samples (50, 51)" in notice
    without = np.where(np.isin(shuffled_N, [3, 4, 5, 6, 7, 8, 9]), 0, shuffled_N)
    (notice,) = notices(without)  # the number of classes is not given
    assert "7 of 50 classes have no samples (3, 4, 5, 6, 7 and 2 more)" in notice
    assert "the others have up to 320 each" in notice


@pytest.mark.parametrize("count, noticed", [(5000, False), (5010, True), (4990, False)])
def test_a_short_last_split_of_the_inception_score_is_noticed(count, noticed):
    """Uses perfect logits of 10 classes, which score 10 in each complete split."""
    label_N = np.arange(count) % 10
    found = [n for n in notices(label_N, 99 * np.eye(10)[label_N]) if "last split" in n]
    assert len(found) == noticed
    if noticed:
        assert "has 10 samples instead of 5,000" in found[0] and "score is 10.000" in found[0]


def test_labels_that_number_no_class_are_ignored():
    assert not notices(np.full(LABEL_N.size, -1)) and not notices(np.full(LABEL_N.size, 10**12))
    no_class_N = np.concatenate([RNG.permutation(LABEL_N)[:-1], [CLASSES]])
    (notice,) = notices(no_class_N, classes=CLASSES)
    assert "classes have 39 to 40 samples" in notice


def test_label_accuracy_needs_labels_that_the_classifier_knows():
    logits_NV = np.eye(4)[[0, 1, 2, 3, 3]]
    features = {"pool_ND": RNG.normal(size=(5, 2)), "logits_NV": logits_NV}
    reference = Reference("", {"pool_ND": Moments.of(features["pool_ND"])}, None, 9)
    label_N = np.array([0, 1, 2, 3, 0])
    measured = report.measure(features, reference, label_N, 4, logit_classes=4)
    assert measured.metrics["label_accuracy"] == 0.8
    assert "label_accuracy" not in report.measure(features, reference, label_N, 4).metrics
    for labels, classes, reason in (
        (None, None, "the samples have no labels"),
        (label_N, 5, "distinguishes 4 classes, the samples have 5"),
        (label_N + 1, None, "has classes 0 to 3, a sample has 4"),
    ):
        measured = report.measure(features, reference, labels, classes, logit_classes=4)
        assert reason in measured.left_out["label_accuracy"]
    assert not any("largest label" in notice for notice in measured.notices)
    few = {name: x[:3] for name, x in features.items()}
    for classes, warned in ((4, False), (None, True)):
        measured = report.measure(few, reference, label_N[:3], classes, logit_classes=4)
        assert any("largest label is 2" in notice for notice in measured.notices) == warned
    real = {"fid": 0.5, "label_accuracy": 0.9}
    table = report.metrics_table(measured, real=real)
    assert table.splitlines()[0].split() == ["here", "real"]
    assert "0.5000   lower" in table and "label accuracy" in table
