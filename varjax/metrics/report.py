"""All metrics of a set of samples, as data and as a table, with what is wrong about the set."""

import dataclasses

import numpy as np

from varjax.metrics import fid
from varjax.metrics.features import Features
from varjax.metrics.references import Reference

# What is printed: key, name, digits, and which way is better.
ROWS = (
    ("fid", "FID", 4, "lower"),
    ("sfid", "sFID", 4, "lower"),
    ("inception_score", "Inception Score", 3, "higher"),
    ("precision", "precision", 4, "higher"),
    ("recall", "recall", 4, "higher"),
    ("kid", "KID", 6, "lower"),
)
PUBLISHED_IMAGES = 50_000
NAMED_CLASSES = 5  # of those without samples
MAX_CLASSES = 100_000  # larger labels in a stranger's file number no classes
ORDERED = 6.0  # standard deviations by which neighbors are alike beyond chance in an ordered set


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


def measure(
    features: Features,
    reference: Reference,
    label_N: np.ndarray | None = None,
    classes: int | None = None,
) -> SampleMetrics:
    """Computes all metrics that features and reference allow.

    Args:
        features: features of the samples, in the order in which they are scored.
        reference: reference that the samples are compared with.
        label_N: classes of the samples; None if they are not known.
        classes: number of classes; None to take it from the largest label.

    Raises:
        InputError: fewer than two samples.
    """
    metrics: dict[str, float] = {}
    left_out: dict[str, str] = {}
    pool_ND, pool_MD = features["pool_ND"], reference.pool_MD
    for key, kind in (("fid", "pool_ND"), ("sfid", "spatial_ND")):
        if kind not in features:
            left_out[key] = "pixels have no such features"
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
        reason = "the reference has statistics alone, no images"
        left_out |= dict.fromkeys(("precision", "recall", "kid"), reason)
    elif min(len(pool_ND), len(pool_MD)) <= fid.NEIGHBORS:
        reason = f"they need more than {fid.NEIGHBORS} samples and images of the reference"
        left_out |= dict.fromkeys(("precision", "recall", "kid"), reason)
    else:
        metrics["precision"], metrics["recall"] = fid.precision_recall(pool_ND, pool_MD)
        metrics["kid"], metrics["kid_std"] = fid.kernel_inception_distance(pool_ND, pool_MD)
    return SampleMetrics(metrics, left_out, _notices(features, label_N, classes))


def metrics_table(
    measured: SampleMetrics, published: dict[str, float] | None = None, name: str = ""
) -> str:
    """Formats metrics as text, with the published ones of the model `name` if it is given."""
    head = f"{'':18}{'here':>12}" + (f"{'published':>12}   ({name})" if published else "")
    lines = [head]
    for key, title, digits, better in ROWS:
        if key in measured.metrics:
            cells = f"{measured.metrics[key]:12.{digits}f}"
            if published:
                cells += f"{published[key]:12.{2}f}" if key in published else f"{'–':>12}"
            lines.append(f"{title:18}{cells}   {better} is better")
        elif key in measured.left_out:
            lines.append(f"{title:18}{'–':>12}   left out: {measured.left_out[key]}")
    return "\n".join([*lines, *(f"note: {notice}" for notice in measured.notices)])


def looks_ordered(share_NV: np.ndarray) -> bool:
    """Returns whether neighbors are alike more often than they would be in a random order.

    Works for samples of poor quality, too: what counts is not how alike they are, but whether
    chance explains it.

    Args:
        share_NV: probabilities of the classes for each sample, or 1 for its class and 0 elsewhere.
    """
    if len(share_NV) < 2:
        return False
    share_NV = share_NV - share_NV.mean(axis=0)
    alike = float(np.einsum("NV,NV->", share_NV[1:], share_NV[:-1], dtype=np.float64))
    covariance_VV = share_NV.T @ share_NV / len(share_NV)
    return _beyond_chance(alike, float(np.linalg.norm(covariance_VV)), len(share_NV))


def labels_look_ordered(label_N: np.ndarray) -> bool:
    """Does what `looks_ordered` does with 1 for the class of each sample and 0 elsewhere.

    Memory does not depend on the number of classes: a file's labels may all differ.
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
    alike = same - p_N[1:].sum() - p_N[:-1].sum() + (N - 1) * squares
    norm = max(squares - 2 * np.sum(p_V**3) + squares**2, 0.0) ** 0.5
    return _beyond_chance(float(alike), float(norm), N)


def _beyond_chance(alike: float, norm: float, count: int) -> bool:
    """Judges the sum of products of neighbors, whose mean is 0.

    In a random order the sum is near 0. Its terms, products of two independent rows, have the
    variance tr(C²), C being the covariance of a row and `norm` its Frobenius norm.
    """
    return alike > ORDERED * norm * (count - 1) ** 0.5


def _notices(features: Features, label_N: np.ndarray | None, classes: int | None) -> list[str]:
    N, notices = len(features["pool_ND"]), []
    if N < PUBLISHED_IMAGES:
        notices.append(
            f"{N:,} samples: FID is larger the fewer they are; published values are of "
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
                "the samples are ordered by class, so the Inception Score's splits hold few "
                f"classes each; shuffled, it is {score:.3f}"
            )
    if label_N is not None:
        notices += _class_notices(label_N, classes)
    return notices


def _class_notices(label_N: np.ndarray, classes: int | None) -> list[str]:
    """Returns what is wrong with the numbers of samples of each class."""
    numbered_N = label_N[(label_N >= 0) & (label_N < (classes or MAX_CLASSES))]
    if not len(numbered_N):
        return []
    count_V = np.bincount(numbered_N, minlength=classes or 0)
    equally = "published values are of equally many"
    if missing := np.flatnonzero(count_V == 0).tolist():
        names = ", ".join(map(str, missing[:NAMED_CLASSES]))
        more = f" and {len(missing) - NAMED_CLASSES:,} more" * (len(missing) > NAMED_CLASSES)
        return [
            f"{len(missing):,} of {len(count_V):,} classes have no samples ({names}{more}), the "
            f"others up to {count_V.max()} each; {equally}"
        ]
    if count_V.min() != count_V.max():
        return [f"classes have {count_V.min()} to {count_V.max()} samples each; {equally}"]
    return []


def _probabilities(logits_NV):
    share_NV = np.exp(logits_NV - logits_NV.max(axis=1, keepdims=True), dtype=np.float32)
    return share_NV / share_NV.sum(axis=1, keepdims=True)
