"""Fits power laws with a floor, and resamples them for intervals."""

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from scipy import optimize

START_EXPONENTS = (0.1, 0.3, 0.9)
START_FLOORS = (1e-3, 0.3, 0.6, 0.9)  # as fractions of the lowest loss
HUBER_DELTA = 1e-3  # on differences of log losses (Hoffmann et al. 2022, appendix D.3)
FAR_OFF = 1e3  # difference of log losses that no fit keeps
INTERVAL_PERCENTILES = (2.5, 97.5)
MAX_LOG_X0 = 690.0  # so that x0 is a float


@dataclasses.dataclass(frozen=True)
class PowerLaw:
    """Predicts a loss: floor + (x0[0] / x[0])^exponents[0] + … for each variable.

        law = PowerLaw(floor=2.0, x0=(1e6,), exponents=(0.2,))
        loss_P = law(size_P)

    Attributes:
        floor: loss that no x goes below.
        x0: constants in the units of the variables.
        exponents: constants that are positive if the loss falls.
    """

    floor: float
    x0: tuple[float, ...]
    exponents: tuple[float, ...]

    @property
    def is_determined(self) -> bool:
        """Returns whether each x0 is in a float's range, where `fit_power_law` does not clip it.

        It is not if the loss hardly depends on a variable.
        """
        return bool(np.all(np.abs(np.log(self.x0)) < MAX_LOG_X0 - 1))

    def __call__(self, *x: np.ndarray | float) -> np.ndarray:
        """Returns the losses at values of each variable."""
        constants = zip(self.x0, x, self.exponents, strict=True)
        # In logarithms, because x0 may be far from 1 where an exponent is small.
        terms = [np.exp(a * (np.log(x0) - np.log(values))) for x0, values, a in constants]
        return sum(terms, start=np.asarray(self.floor))


@dataclasses.dataclass(frozen=True)
class Points:
    """Holds P measured losses to fit.

    Attributes:
        x_TP: values of the T variables that the loss depends on.
        loss_P: losses, all above 0.
        weight_P: weights of the squared differences.
    """

    x_TP: np.ndarray
    loss_P: np.ndarray
    weight_P: np.ndarray

    def values(self) -> int:
        """Counts the distinct values of the variable that has the fewest."""
        return min(len(np.unique(x_P)) for x_P in self.x_TP)

    def spare(self, floor: float | None) -> int:
        """Counts the distinct points, or values of a variable, beyond those that a fit needs.

        Below 0, the constants are not determined; at 0, the law goes through all points.

        Args:
            floor: floor of the law; None if it is fitted as well.
        """
        constants = 2 * len(self.x_TP) + (floor is None)
        points = np.unique(self.x_TP, axis=1).shape[1]
        return min(self.values() - values_needed(floor), points - constants)


@dataclasses.dataclass(frozen=True)
class Fit:
    """Holds a fitted law, and those of resampled points.

    Attributes:
        law: law fitted to the points themselves.
        resampled: laws fitted to resampled points; () for none.
        points: points that were fitted.
    """

    law: PowerLaw
    resampled: tuple[PowerLaw, ...]
    points: Points

    def interval(self, quantity: Callable[[PowerLaw], float]) -> tuple[float, float]:
        """Returns the interval that contains 95 % of a quantity of the resampled laws."""
        if not self.resampled:
            return np.nan, np.nan
        values = [quantity(law) for law in self.resampled]
        low, high = np.percentile(values, INTERVAL_PERCENTILES)
        return float(low), float(high)

    @property
    def correlation(self) -> float:
        """Pearson's r of log x and log(loss - floor) over the points above the floor.

        Only for a law of one variable.
        """
        above_P = self.points.loss_P > self.law.floor
        (x_P,), loss_P = self.points.x_TP[:, above_P], self.points.loss_P[above_P]
        return float(np.corrcoef(np.log(x_P), np.log(loss_P - self.law.floor))[0, 1])


def values_needed(floor: float | None) -> int:
    """Counts the distinct values of a variable that a fit needs: 2, or 3 if the floor is fitted."""
    return 2 + (floor is None)


def fit_power_law(
    points: Points,
    floor: float | None = None,
    robust: bool = False,
    near: PowerLaw | None = None,
) -> PowerLaw:
    """Fits a law by least squares of log losses: the best of fits from many starts.

    Args:
        points: points to fit.
        floor: floor of the law; None to fit it as well, at 0 or above.
        robust: whether large differences count linearly (Huber loss), for points with outliers,
            such as the beginnings of training curves.
        near: law to start from; None to start from many.
    """
    log_loss_P, root_P = np.log(points.loss_P), np.sqrt(points.weight_P)
    # Centered, so that a term's size and its exponent hardly depend on each other.
    center_T = np.log(points.x_TP).mean(axis=1)
    u_TP = np.log(points.x_TP) - center_T[:, None]
    fixed = [] if floor is None else [np.log(floor) if floor > 0 else -np.inf]
    first = 1 - len(fixed)  # position of the first term among the constants

    def log_terms(constants: np.ndarray) -> np.ndarray:
        """Logarithms of the floor and of each term, (1 + T, P)."""
        floor_log = constants[:first] if first else np.array(fixed)
        size_T, exponent_T = constants[first:].reshape(2, -1)
        terms_TP = size_T[:, None] - exponent_T[:, None] * u_TP
        floor_1P = np.broadcast_to(floor_log[:, None], (1, u_TP.shape[1]))
        return np.clip(np.concatenate([floor_1P, terms_TP]), -np.inf, 300)

    def residuals(constants: np.ndarray) -> np.ndarray:
        # If the best floor is 0, its logarithm hardly matters, and a step may end at NaN.
        if not np.isfinite(constants).all():
            return np.full(len(log_loss_P), FAR_OFF)
        return root_P * (np.logaddexp.reduce(log_terms(constants)) - log_loss_P)

    def jacobian(constants: np.ndarray) -> np.ndarray:
        terms = log_terms(constants)
        part_UP = np.exp(terms - np.logaddexp.reduce(terms))
        rows = [part_UP[:first], part_UP[1:], -part_UP[1:] * u_TP]
        return (root_P * np.concatenate(rows)).T

    if near is None:
        starts = _starts(points, floor, len(u_TP))
    else:
        size_T = np.array(near.exponents) * (np.log(near.x0) - center_T)
        free = [np.log(max(near.floor, START_FLOORS[0] * points.loss_P.min()))] * first
        starts = [np.concatenate([free, size_T, near.exponents])]
    least_squares: Any = optimize.least_squares  # SciPy declares `jac` as a string alone
    results = [least_squares(residuals, x, jacobian, method="lm") for x in starts]
    best = min(results, key=lambda result: result.cost).x
    if robust:  # slower, so only from the best result of the plain fits
        huber = {"loss": "huber", "f_scale": HUBER_DELTA}
        best = least_squares(residuals, best, jacobian, **huber).x
    size_T, exponent_T = best[first:].reshape(2, -1)
    # (x0 / x)^a = exp(size - a (log x - center)), so log x0 = size / a + center.
    x0 = np.exp(np.clip(size_T / exponent_T + center_T, -MAX_LOG_X0, MAX_LOG_X0))
    fitted_floor = floor if floor is not None else float(np.exp(best[0]))
    return PowerLaw(fitted_floor, tuple(x0.tolist()), tuple(exponent_T.tolist()))


def _starts(points: Points, floor: float | None, terms: int) -> list[np.ndarray]:
    """Makes constants to start from: many floors and exponents, with terms of equal size."""
    lowest, middle = points.loss_P.min(), np.median(points.loss_P)
    floors = [f * lowest for f in START_FLOORS] if floor is None else [floor]
    exponents = itertools.product(START_EXPONENTS, repeat=terms)
    starts = []
    for start_floor, exponent_T in itertools.product(floors, exponents):
        size = np.log(max(middle - start_floor, 1e-3 * middle) / terms)
        free = [np.log(start_floor)] if floor is None else []
        starts.append(np.array([*free, *[size] * terms, *exponent_T]))
    return starts


def fit_resampled(
    points: Points,
    resamples: Iterable[Points],
    floor: float | None = None,
    robust: bool = False,
) -> Fit:
    """Fits a law to points and to resamples of them.

    Args:
        points: points to fit.
        resamples: resampled points; those that do not determine the constants are left out.
        floor: floor of the law; None to fit it as well.
        robust: whether large differences count linearly.
    """
    law = fit_power_law(points, floor, robust)
    laws = [
        fit_power_law(resample, floor, robust, near=law)
        for resample in resamples
        if resample.spare(floor) >= 0
    ]
    return Fit(law, tuple(laws), points)


def pareto_front(
    x_P: Sequence[float] | np.ndarray, loss_P: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Returns the indices of points with a lower loss than all points of smaller x, by x."""
    x_P, loss_P = np.asarray(x_P), np.asarray(loss_P)
    order = np.lexsort((loss_P, x_P))
    lowest = np.minimum.accumulate(np.concatenate([[np.inf], loss_P[order][:-1]]))
    return order[loss_P[order] < lowest]


def log_widths(x_P: np.ndarray) -> np.ndarray:
    """Returns weights with which each interval of log x counts equally; x must rise."""
    if len(x_P) < 2:
        return np.ones(len(x_P))
    return np.gradient(np.log(x_P))
