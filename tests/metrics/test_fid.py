"""Tests FID and related metrics against official values, closed forms and definitions."""

import numpy as np
import pytest

from tests.golden import weights
from varjax.errors import InputError
from varjax.metrics import fid
from varjax.metrics.fid import Moments, MomentSums, frechet_distance

OUTPUTS = weights.case("metrics")["outputs"]


def golden_features():
    """Returns (samples, reference, logits), made by the recipe in metrics.json."""
    rng = np.random.RandomState(5)
    base = rng.standard_normal((64, 64)) / 8
    reference = np.maximum(rng.standard_normal((700, 64)) @ base + 0.3, 0)
    samples = np.maximum(1.1 * rng.standard_normal((600, 64)) @ base + 0.35, 0)
    logits = 3 * rng.standard_normal((1000, 40))
    return tuple(x.astype(np.float32) for x in (samples, reference, logits))


SAMPLES, REFERENCE, LOGITS = golden_features()


def test_fid_matches_the_official_value():
    reference = Moments.of(REFERENCE)
    expected = OUTPUTS["fid"]["frechet_inception_distance"]
    assert frechet_distance(Moments.of(SAMPLES), reference) == pytest.approx(expected, rel=1e-6)
    few = OUTPUTS["few_samples_fid"]["frechet_inception_distance"]  # the covariance is singular
    assert frechet_distance(Moments.of(SAMPLES[:40]), reference) == pytest.approx(few, rel=1e-6)


def test_the_inception_score_matches_the_official_value():
    score, std = fid.inception_score(LOGITS, split=100)
    assert score == pytest.approx(OUTPUTS["isc_no_shuffle"]["inception_score_mean"], rel=1e-6)
    assert std == pytest.approx(OUTPUTS["isc_no_shuffle"]["inception_score_std"], rel=1e-5)
    _, std = fid.inception_score(LOGITS)
    assert std == 0  # one split


def test_precision_and_recall_match_the_official_values(monkeypatch):
    found = fid.precision_recall(SAMPLES, REFERENCE)
    np.testing.assert_allclose(found, OUTPUTS["prc"], rtol=1e-6)
    monkeypatch.setattr(fid, "DISTANCE_BLOCK", 128)  # more than one block in either direction
    assert fid.precision_recall(SAMPLES, REFERENCE) == found


def test_kid_matches_the_official_value():
    """Uses the subsets of the recipe in metrics.json, drawn in the same order."""
    kid, std = fid.kernel_inception_distance(SAMPLES, REFERENCE, subset_size=500)
    assert kid == pytest.approx(OUTPUTS["kid"]["kernel_inception_distance_mean"], rel=1e-6)
    assert std == pytest.approx(OUTPUTS["kid"]["kernel_inception_distance_std"], rel=1e-6)


def test_kid_matches_its_definition():
    x_ND, y_ND = SAMPLES[:5, :3].astype(np.float64), REFERENCE[:5, :3].astype(np.float64)

    def kernel(a, b):
        return (a @ b / 3 + 1) ** 3

    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    expected = sum(kernel(x_ND[i], x_ND[j]) + kernel(y_ND[i], y_ND[j]) for i, j in pairs) / 20
    expected -= 2 * np.mean([kernel(a, b) for a in x_ND for b in y_ND])
    kid, std = fid.kernel_inception_distance(x_ND, y_ND, subsets=2)
    assert kid == pytest.approx(expected, rel=1e-12) and std < 1e-15


def test_absent_classes_do_not_change_the_inception_score():
    """Their probabilities underflow to 0, and contribute nothing."""
    logits_NV = np.array([[0.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    more_NV = np.append(logits_NV, [[-800.0], [-900.0], [-800.0]], axis=1)
    assert fid.inception_score(more_NV) == pytest.approx(fid.inception_score(logits_NV))
    assert fid.inception_score(more_NV)[0] > 1


def test_equal_sets_have_distance_0_and_recall_1():
    moments = Moments.of(REFERENCE)
    assert 0 <= frechet_distance(moments, moments) < 1e-6
    few = Moments.of(REFERENCE[:20])
    assert 0 <= frechet_distance(few, few) < 1e-6
    assert fid.precision_recall(REFERENCE, REFERENCE) == (1, 1)


def test_frechet_distance_of_gaussians_has_the_closed_form():
    a = Moments(np.array([1.0, 0.0]), np.diag([1.0, 4.0]))
    b = Moments(np.array([0.0, 0.0]), np.diag([9.0, 4.0]))
    assert frechet_distance(a, b) == pytest.approx(1 + (3 - 1) ** 2)
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])  # the distance does not depend on the axes
    a, b = (Moments(turn @ m.mean_D, turn @ m.covariance_DD @ turn.T) for m in (a, b))
    assert frechet_distance(a, b) == pytest.approx(5)


def test_moments_match_numpy_even_far_from_zero():
    x_ND = 1000 + np.random.default_rng(0).normal(size=(1300, 3))
    moments = Moments.of(x_ND)
    np.testing.assert_allclose(moments.mean_D, x_ND.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(moments.covariance_DD, np.cov(x_ND, rowvar=False), rtol=1e-10)


def test_collapse_lowers_recall_and_outliers_lower_precision():
    rng = np.random.default_rng(0)
    real_ND = rng.normal(size=(500, 2))
    collapsed_ND = real_ND[:100] * 0.05
    precision, recall = fid.precision_recall(collapsed_ND, real_ND)
    assert precision > 0.95 and recall < 0.1
    far_ND = np.concatenate([rng.normal(size=(250, 2)), rng.normal(size=(250, 2)) + 50])
    precision, recall = fid.precision_recall(far_ND, real_ND)
    assert 0.4 < precision < 0.52 and recall > 0.8


def test_too_few_images_are_refused():
    with pytest.raises(InputError, match="1 images: a covariance needs two"):
        Moments.of(np.zeros((1, 4)))
    with pytest.raises(InputError, match="0 images"):
        MomentSums().moments()
