"""FID, Inception Score, precision and recall, and KID of features, as in ADM's evaluator.

All sums are float64 in a fixed order, except for the distances of precision and recall, which are
float32 in blocks of a fixed size. So no result depends on batch size or devices.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np

from varjax.errors import InputError

SUM_BLOCK = 500  # rows in a sum
DISTANCE_BLOCK = 2000  # rows and columns of a block of distances
NEIGHBORS = 3  # k of precision and recall
KID_SUBSETS, KID_SUBSET_SIZE, KID_SEED = 100, 1000, 2020  # torch-fidelity's
TINY = float(np.finfo(np.float64).tiny)
SCORE_SPLIT = 5000  # images of a split of the Inception Score


@dataclasses.dataclass(frozen=True, eq=False)
class Moments:
    """Holds the mean (D,) and the covariance (D, D) of features, float64."""

    mean_D: np.ndarray
    covariance_DD: np.ndarray

    @functools.cached_property
    def root_DD(self) -> np.ndarray:
        """The symmetric square root of the covariance; eigenvalues below 0 are rounding errors."""
        value_D, vector_DD = np.linalg.eigh(self.covariance_DD)
        return (vector_DD * np.sqrt(np.maximum(value_D, 0))) @ vector_DD.T

    @classmethod
    def of(cls, feature_ND: np.ndarray) -> "Moments":
        """Computes the moments of features (N, D); raises InputError for fewer than two rows."""
        sums = MomentSums()
        for start in range(0, len(feature_ND), SUM_BLOCK):
            sums.add(feature_ND[start : start + SUM_BLOCK])
        return sums.moments()


class MomentSums:
    """Sums the moments of features block by block, in float64.

    Blocks are added one by one, so equal blocks in equal order give equal bits.
    """

    def __init__(self):
        self.count = 0
        self._center_D = self._sum_D = self._product_DD = np.zeros(0)

    def add(self, feature_ND: np.ndarray) -> None:
        """Adds a block (N, D) of any dtype."""
        feature_ND = feature_ND.astype(np.float64)
        if not self.count:  # centered numbers lose fewer digits in sums
            self._center_D = feature_ND.mean(axis=0)
            self._sum_D = np.zeros_like(self._center_D)
            self._product_DD = np.zeros((self._center_D.size,) * 2)
        feature_ND -= self._center_D
        self.count += len(feature_ND)
        self._sum_D += feature_ND.sum(axis=0)
        self._product_DD += feature_ND.T @ feature_ND

    def moments(self) -> Moments:
        """Returns mean and covariance of all rows; raises InputError for fewer than two."""
        if self.count < 2:
            raise InputError(f"{self.count} images: a covariance needs two or more")
        mean_D = self._sum_D / self.count
        product_DD = self._product_DD - self.count * np.outer(mean_D, mean_D)
        return Moments(mean_D + self._center_D, product_DD / (self.count - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """Computes the Fréchet distance of two Gaussians, the FID of Inception's features.

    |μa - μb|² + tr(Σa + Σb - 2 (Σa Σb)^½), Heusel et al., arXiv 1706.08500, eq. 6.
    """
    # tr (Σa Σb)^½ is the sum of the singular values of √Σa √Σb: always real, and exact where
    # covariances are singular, unlike a general matrix square root.
    root_trace = np.linalg.svd(a.root_DD @ b.root_DD, compute_uv=False).sum()
    trace = np.trace(a.covariance_DD) + np.trace(b.covariance_DD)
    distance = np.sum(np.square(a.mean_D - b.mean_D)) + trace - 2 * root_trace
    return max(float(distance), 0.0)  # rounding errors make that of equal sets negative


def inception_score(logits_NV: np.ndarray, split: int = SCORE_SPLIT) -> tuple[float, float]:
    """Computes the Inception Score, exp E KL(p(y|x) ‖ p(y)), over splits of consecutive images.

    Args:
        logits_NV: Inception's logits, without bias, of images in random order.
        split: images in a split; the remainder makes another split.

    Returns:
        Mean and standard deviation over the splits (Salimans et al., arXiv 1606.03498, section 4).
    """
    scores = []
    for start in range(0, len(logits_NV), split):
        logits_nV = logits_NV[start : start + split].astype(np.float64)
        log_nV = logits_nV - logits_nV.max(axis=1, keepdims=True)
        log_nV -= np.log(np.exp(log_nV).sum(axis=1, keepdims=True))
        p_nV = np.exp(log_nV)
        mean_V = np.maximum(p_nV.mean(axis=0), TINY)  # 0 where all underflow, so that 0 · ∞ is NaN
        kl_n = np.sum(p_nV * (log_nV - np.log(mean_V)), axis=1)
        scores.append(np.exp(kl_n.mean()))
    return float(np.mean(scores)), float(np.std(scores))


def precision_recall(sample_ND: np.ndarray, reference_MD: np.ndarray) -> tuple[float, float]:
    """Computes improved precision and recall (Kynkäänniemi et al., arXiv 1904.06991, eq. 1 and 2).

    An image is in the manifold of a set if its distance to some image of the set is at most that
    image's distance to its k-th nearest neighbor in the set, with k = NEIGHBORS.

    Args:
        sample_ND: features of samples, more than k.
        reference_MD: features of real images, more than k.

    Returns:
        Fraction of samples in the reference's manifold; fraction of the reference in the samples'.
    """
    assert min(len(sample_ND), len(reference_MD)) > NEIGHBORS
    sample_radius_N, reference_radius_M = map(_manifold_radii, (sample_ND, reference_MD))
    precise, recalled_M = 0, np.zeros(len(reference_MD), bool)
    for start in range(0, len(sample_ND), DISTANCE_BLOCK):
        block_nD, radius_n = (
            x[start : start + DISTANCE_BLOCK] for x in (sample_ND, sample_radius_N)
        )
        inside_n = np.zeros(len(block_nD), bool)
        for first in range(0, len(reference_MD), DISTANCE_BLOCK):
            rows = slice(first, first + DISTANCE_BLOCK)
            squared_nm = _squared_distances(block_nD, reference_MD[rows])
            inside_n |= np.any(squared_nm <= reference_radius_M[rows], axis=1)
            recalled_M[rows] |= np.any(squared_nm <= radius_n[:, None], axis=0)
        precise += int(inside_n.sum())
    return precise / len(sample_ND), float(recalled_M.mean())


def kernel_inception_distance(
    sample_ND: np.ndarray,
    reference_MD: np.ndarray,
    subsets: int = KID_SUBSETS,
    subset_size: int = KID_SUBSET_SIZE,
) -> tuple[float, float]:
    """Computes KID: the unbiased squared MMD with the kernel (x·y / D + 1)³, over random subsets.

    Args:
        sample_ND: features of samples, two or more.
        reference_MD: features of real images, two or more.
        subsets: number of pairs of subsets.
        subset_size: images in a subset; all images if there are fewer.

    Returns:
        Mean and standard deviation over the subsets (Bińkowski et al., arXiv 1801.01401, eq. 4).
    """
    size = min(subset_size, len(sample_ND), len(reference_MD))
    assert size >= 2
    rng = np.random.RandomState(KID_SEED)
    distances = []
    for _ in range(subsets):
        pair = (
            x[rng.choice(len(x), size, replace=False)].astype(np.float64)
            for x in (sample_ND, reference_MD)
        )
        distances.append(_squared_mmd(*pair))
    return float(np.mean(distances)), float(np.std(distances))


def _squared_mmd(x_ND, y_ND):
    """Computes the unbiased squared MMD of two sets of equal size (Gretton et al. 2012, eq. 3)."""
    N = len(x_ND)
    xx, yy = _kernel(x_ND, x_ND), _kernel(y_ND, y_ND)
    within = sum(k_NN.sum() - np.trace(k_NN) for k_NN in (xx, yy))
    return within / (N * (N - 1)) - 2 * _kernel(x_ND, y_ND).mean()


def _kernel(x_ND, y_ND):
    k_NN = x_ND @ y_ND.T / x_ND.shape[1] + 1
    return k_NN * k_NN * k_NN  # much faster than a power


def _manifold_radii(feature_ND: np.ndarray) -> np.ndarray:
    """Returns the squared distance of each row to its k-th nearest neighbor, (N,)."""
    N, radii = len(feature_ND), []
    for start in range(0, N, DISTANCE_BLOCK):
        block_nD = feature_ND[start : start + DISTANCE_BLOCK]
        # Only the nearest k + 1 of each block of columns matter, including the row itself.
        nearest = [
            _smallest(_squared_distances(block_nD, feature_ND[first : first + DISTANCE_BLOCK]))
            for first in range(0, N, DISTANCE_BLOCK)
        ]
        radii.append(_smallest(np.concatenate(nearest, axis=1))[:, -1])
    return np.concatenate(radii)


def _smallest(x_nm: np.ndarray) -> np.ndarray:
    """Returns the k + 1 smallest numbers of each row, in order."""
    return np.sort(np.partition(x_nm, min(NEIGHBORS, x_nm.shape[1] - 1))[:, : NEIGHBORS + 1])


def _squared_distances(x_nD: np.ndarray, y_mD: np.ndarray) -> np.ndarray:
    """Computes (n, m) distances in float32 on the default device, by one program for all blocks."""
    padded = (np.pad(a, ((0, DISTANCE_BLOCK - len(a)), (0, 0))) for a in (x_nD, y_mD))
    return np.asarray(_block_distances(*padded))[: len(x_nD), : len(y_mD)]


@jax.jit
def _block_distances(x_nD, y_mD):
    x_n1 = jnp.sum(jnp.square(x_nD), axis=1, keepdims=True)
    y_1m = jnp.sum(jnp.square(y_mD), axis=1)[None]
    # Full precision: TF32 or bfloat16 would change which images are neighbors.
    product_nm = jnp.einsum("nD,mD->nm", x_nD, y_mD, precision="highest")
    return jnp.maximum(x_n1 - 2 * product_nm + y_1m, 0)
