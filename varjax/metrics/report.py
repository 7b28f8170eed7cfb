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
ORDERED = 0.25  # neighbors of one class more often than by chance, by this share, mean an order


@dataclasses.dataclass(frozen=True)
class SampleMetrics:
    """Holds the metrics of a set of samples.

    Attributes:
        metrics: by key, as in ROWS; "inception_score_std" and "kid_std" among them.
        left_out: why a metric is not there, by key.
        notices: what a reader of the metrics should know, a sentence each.
    """

    metrics: dict[str, float]
    left_out: dict[str, str]
    notices: list[str]


def measure(
    features: Features, reference: Reference, label_N: np.ndarray | None = None
) -> SampleMetrics:
    """Computes all metrics that features and reference allow.

    Args:
        features: of the samples, in the order in which they are scored.
        reference: what they are compared with.
        label_N: classes of the samples, where they are known.

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
    return SampleMetrics(metrics, left_out, _notices(features, label_N))


def metrics_table(
    measured: SampleMetrics, published: dict[str, float] | None = None, name: str = ""
) -> str:
    """Formats metrics as text, beside the published ones of the model `name` where given."""
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


def looks_ordered(label_N: np.ndarray) -> bool:
    """Tells whether neighbors are of one class far more often than in a random order."""
    if len(label_N) < 2:
        return False
    _, count_V = np.unique(label_N, return_counts=True)
    by_chance = np.sum(np.square(count_V / len(label_N)))
    return bool(np.mean(label_N[1:] == label_N[:-1]) > by_chance + ORDERED)


def _notices(features: Features, label_N: np.ndarray | None) -> list[str]:
    N, notices = len(features["pool_ND"]), []
    if N < PUBLISHED_IMAGES:
        notices.append(
            f"{N:,} samples: FID is larger the fewer they are; published values are of "
            f"{PUBLISHED_IMAGES:,}"
        )
    if "logits_NV" in features:
        classes_N = features["logits_NV"].argmax(axis=1) if label_N is None else label_N
        if looks_ordered(classes_N):
            shuffled = np.random.default_rng(0).permutation(N)
            score, _ = fid.inception_score(features["logits_NV"][shuffled])
            notices.append(
                "the samples are ordered by class, so the Inception Score's splits hold few "
                f"classes each; shuffled, it is {score:.3f}"
            )
    if label_N is not None:
        _, count_V = np.unique(label_N, return_counts=True)
        if count_V.min() != count_V.max():
            notices.append(
                f"classes have {count_V.min()} to {count_V.max()} samples each; published values "
                "are of equally many"
            )
    return notices
