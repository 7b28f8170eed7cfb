"""Computes all metrics of a set of samples, and notices about the set, as data and as a table."""

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from varjax.metrics import fid
from varjax.metrics.features import FeatureArrays
from varjax.metrics.references import Reference

# Rows of the table: key, name, digits, and whether lower or higher is better.
ROWS = (
    ("fid", "FID", 4, "lower"),
    ("sfid", "sFID", 4, "lower"),
    ("inception_score", "Inception Score", 3, "higher"),
    ("label_accuracy", "label accuracy", 4, "higher"),
    ("precision", "precision", 4, "higher"),
    ("recall", "recall", 4, "higher"),
    ("kid", "KID", 6, "lower"),
)
PUBLISHED_IMAGES = 50_000
NAMED_CLASSES = 5  # of the classes without samples
MAX_CLASSES = 100_000  # larger labels in a file from elsewhere are not class numbers
ORDERED = 6.0  # standard deviations of similarity between neighbors that mean an ordered set
ROUNDING = 1e-12  # a smaller norm of the covariance is a rounding error of equal samples


@dataclasses.dataclass(frozen=True)
class SampleMetrics:
    """Holds the metrics of a set of samples.

    Attributes:
        metrics: values by key, as in ROWS, with "inception_score_std" and "kid_std".
        left_out: reason why a metric is missing, by its key.
        notices: remarks for readers of the metrics, one sentence each.
    """

    metrics: dict[str, float]
    left_out: dict[str, str]
    notices: list[str]

    def __str__(self) -> str:
        return metrics_table(self)


def measure(
    features: FeatureArrays,
    reference: Reference,
    label_N: np.ndarray | None = None,
    classes: int | None = None,
    logit_classes: int | None = None,
) -> SampleMetrics:
    """Computes all metrics that features and reference allow.

    Args:
        features: features of the samples, in the order in which they are scored.
        reference: reference that the samples are compared with.
        label_N: classes of the samples; None if they are not known.
        classes: number of classes; None to take it from the largest label.
        logit_classes: number of classes that the logits stand for, numbered like the labels; None
            if they stand for others, so that they do not tell whether a label is right.

    Raises:
        InputError: fewer than two samples.
    """
    metrics: dict[str, float] = {}
    left_out: dict[str, str] = {}
    pool_ND, pool_MD = features["pool_ND"], reference.pool_MD
    for key, kind in (("fid", "pool_ND"), ("sfid", "spatial_ND")):
        if kind not in features:
            left_out[key] = "these features are not spatial"
        elif kind not in reference.moments:
            left_out[key] = "the reference has no mu_s and sigma_s"
        else:
            moments = fid.Moments.of(features[kind])
            metrics[key] = fid.frechet_distance(moments, reference.moments[kind])
    if "logits_NV" in features:
        score, std = fid.inception_score(features["logits_NV"])
        metrics |= {"inception_score": score, "inception_score_std": std}
    else:
        left_out["inception_score"] = "pixels have no logits"
    if pool_MD is None:
        reason = "the reference has only statistics, no images"
        left_out |= dict.fromkeys(("precision", "recall", "kid"), reason)
    elif min(len(pool_ND), len(pool_MD)) <= fid.NEIGHBORS:
        reason = f"needs more than {fid.NEIGHBORS} samples and reference images"
        left_out |= dict.fromkeys(("precision", "recall", "kid"), reason)
    else:
        metrics["precision"], metrics["recall"] = fid.precision_recall(pool_ND, pool_MD)
        metrics["kid"], metrics["kid_std"] = fid.kernel_inception_distance(pool_ND, pool_MD)
    measured = SampleMetrics(metrics, left_out, _notices(features, label_N, classes))
    add_label_accuracy(measured, features, label_N, classes, logit_classes)
    return measured


def add_label_accuracy(
    measured: SampleMetrics,
    features: FeatureArrays,
    label_N: np.ndarray | None,
    classes: int | None,
    logit_classes: int | None,
) -> None:
    """Adds the fraction of images that a classifier assigns to their class, or why there is none.

    Adds a notice if the labels may number the classes differently than the classifier.

    Args:
        measured: metrics to add it to.
        features: features of the images, with the classifier's logits.
        label_N: classes of the images; None if they are not known.
        classes: number of classes; None to take it from the largest label.
        logit_classes: number of classes of the logits; None if they stand for others.
    """
    if logit_classes is None:
        return
    if reason := _labels_do_not_fit(label_N, classes, logit_classes):
        measured.left_out["label_accuracy"] = reason
    else:
        assert label_N is not None
        right_N = features["logits_NV"].argmax(axis=1) == label_N
        measured.metrics["label_accuracy"] = float(right_N.mean())
        if classes is None and (largest := label_N.max()) + 1 < logit_classes:
            measured.notices.append(
                f"the largest label is {largest}, but the classifier distinguishes "
                f"{logit_classes:,} classes; label accuracy is meaningless unless both number "
                "their classes alike"
            )


def _labels_do_not_fit(
    label_N: np.ndarray | None, classes: int | None, logit_classes: int
) -> str | None:
    """Returns the reason why a classifier of these classes cannot check the labels, or None."""
    if label_N is None:
        return "the samples have no labels"
    if classes not in (None, logit_classes):
        return f"the classifier distinguishes {logit_classes} classes, the samples have {classes}"
    if len(wrong := label_N[(label_N < 0) | (label_N >= logit_classes)]):
        return f"the classifier has classes 0 to {logit_classes - 1}, a sample has {wrong[0]}"
    return None


def metrics_table(
    measured: SampleMetrics,
    published: Mapping[str, float] | None = None,
    name: str = "",
    real: Mapping[str, float] | None = None,
) -> str:
    """Formats metrics as text.

    Args:
        measured: metrics of the samples.
        published: published metrics of the model, if any.
        name: name of the model that `published` belongs to.
        real: metrics of real images, if they were measured.
    """
    head = f"{'':18}{'here':>12}" + (f"{'real':>12}" if real else "")
    lines = [head + (f"{'published':>12}   ({name})" if published else "")]
    for key, title, digits, better in ROWS:
        if key in measured.metrics:
            cells = f"{measured.metrics[key]:12.{digits}f}"
            for others, places in (real, digits), (published, 2):
                if others:
                    cells += f"{others[key]:12.{places}f}" if key in others else f"{'–':>12}"
            lines.append(f"{title:18}{cells}   {better} is better")
        elif key in measured.left_out:
            lines.append(f"{title:18}{'–':>12}   left out: {measured.left_out[key]}")
    return "\n".join([*lines, *(f"note: {notice}" for notice in measured.notices)])


def mean_and_deviation(
    metrics: Sequence[Mapping[str, float]],
) -> tuple[dict[str, float], dict[str, float]]:
    """Computes the mean and the standard deviation (ddof 1) of each metric over several sets.

    With one set, there are no standard deviations.
    """
    columns = {name: [values[name] for values in metrics] for name in metrics[0]}
    means = {name: float(np.mean(column)) for name, column in columns.items()}
    if len(metrics) == 1:
        return means, {}
    return means, {name: float(np.std(column, ddof=1)) for name, column in columns.items()}


def looks_ordered(p_NV: np.ndarray) -> bool:
    """Returns whether neighbors are more similar than they would be in a random order.

    This also works for samples of poor quality: it tests not how similar they are, but whether
    chance explains it.

    Args:
        p_NV: probabilities of the classes for each sample, or 1 for its class and 0 elsewhere.
    """
    if len(p_NV) < 2:
        return False
    p_NV = p_NV - p_NV.mean(axis=0, dtype=np.float64)
    similarity = float(np.einsum("NV,NV->", p_NV[1:], p_NV[:-1], dtype=np.float64))
    covariance_VV = p_NV.T @ p_NV / len(p_NV)
    return _beyond_chance(similarity, float(np.linalg.norm(covariance_VV)), len(p_NV))


def labels_look_ordered(label_N: np.ndarray) -> bool:
    """Computes `looks_ordered` of one-hot labels, with 1 for the class of each sample.

    Memory does not depend on the number of classes, because all labels in a file may differ.
    """
    N = len(label_N)
    if N < 2:
        return False
    _, number_N, count_V = np.unique(label_N, return_inverse=True, return_counts=True)
    p_V = count_V / N
    p_N = p_V[number_N]
    squares = np.sum(p_V**2)
    # Rows are unit vectors minus p; the covariance is diag(p) - p pᵀ.
    same = np.sum(number_N[1:] == number_N[:-1])
    similarity = same - p_N[1:].sum() - p_N[:-1].sum() + (N - 1) * squares
    norm = max(squares - 2 * np.sum(p_V**3) + squares**2, 0.0) ** 0.5
    return _beyond_chance(float(similarity), float(norm), N)


def _beyond_chance(similarity: float, norm: float, count: int) -> bool:
    """Returns whether the sum of neighbors' dot products is too large to be chance.

    In a random order, the terms are products of two independent rows with mean 0. Their variance is
    tr(C²), where C is the covariance of a row and `norm` is its Frobenius norm.
    """
    return norm > ROUNDING and similarity > ORDERED * norm * (count - 1) ** 0.5


def _notices(features: FeatureArrays, label_N: np.ndarray | None, classes: int | None) -> list[str]:
    N, notices = len(features["pool_ND"]), []
    if N < PUBLISHED_IMAGES:
        notices.append(
            f"{N:,} samples: FID is larger with fewer samples; published values use "
            f"{PUBLISHED_IMAGES:,}"
        )
    if "logits_NV" in features:
        logits_NV = features["logits_NV"]
        if label_N is not None:
            ordered = labels_look_ordered(label_N)
        else:
            ordered = looks_ordered(_probabilities(logits_NV))
        if ordered:
            score, _ = fid.inception_score(logits_NV[np.random.default_rng(0).permutation(N)])
            notices.append(
                "the samples are ordered by class, so each split of the Inception Score has few "
                f"classes; of the shuffled samples, the score is {score:.3f}"
            )
        if N > fid.SCORE_SPLIT and (rest := N % fid.SCORE_SPLIT):
            score, _ = fid.inception_score(logits_NV[: N - rest])
            notices.append(
                f"the last split of the Inception Score has {rest:,} samples instead of "
                f"{fid.SCORE_SPLIT:,}, but counts as much as the others; without it, the score is "
                f"{score:.3f}"
            )
    if label_N is not None:
        notices += _class_notices(label_N, classes)
    return notices


def _class_notices(label_N: np.ndarray, classes: int | None) -> list[str]:
    """Returns a notice if classes have different numbers of samples."""
    numbered_N = label_N[(label_N >= 0) & (label_N < (classes or MAX_CLASSES))]
    if not len(numbered_N):
        return []
    count_V = np.bincount(numbered_N, minlength=classes or 0)
    equally = "published values use equal numbers"
    if missing := np.flatnonzero(count_V == 0).tolist():
        names = ", ".join(map(str, missing[:NAMED_CLASSES]))
        more = f" and {len(missing) - NAMED_CLASSES:,} more" * (len(missing) > NAMED_CLASSES)
        return [
            f"{len(missing):,} of {len(count_V):,} classes have no samples ({names}{more}); the "
            f"others have up to {count_V.max()} each; {equally}"
        ]
    if count_V.min() != count_V.max():
        return [f"classes have {count_V.min()} to {count_V.max()} samples each; {equally}"]
    return []


def _probabilities(logits_NV):
    p_NV = np.exp(logits_NV - logits_NV.max(axis=1, keepdims=True), dtype=np.float32)
    return p_NV / p_NV.sum(axis=1, keepdims=True)
