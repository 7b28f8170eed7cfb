"""Fits the scaling laws of a ladder, and predicts its largest size from the smaller ones."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from varjax.analysis.ladder import (
    Curve,
    Ladder,
    curve_points,
    final_points,
    front_points,
    resampled_curves,
)
from varjax.analysis.power_law import Fit, Points, fit_resampled, values_needed
from varjax.errors import InputError, check_setting

SAME_LENGTH = 1.01  # ratio of images seen up to which runs count as equally long


@dataclasses.dataclass(frozen=True)
class ScalingVariables:
    """Describes what losses are fitted against.

    Attributes:
        name: name in scaling.json and of the picture.
        title: title of the table.
        points: function that makes the points to fit from the curves.
        symbols: symbols of the variables, in the order of the law.
        evaluations: whether single evaluations are resampled, not only runs.
        robust: whether the fit limits the influence of single points.
    """

    name: str
    title: str
    points: Callable[[Sequence[Curve]], Points]
    symbols: tuple[str, ...]
    evaluations: bool = False
    robust: bool = False


PARAMETERS = ScalingVariables("parameters", "against parameters N", final_points, ("N",))
COMPUTE = ScalingVariables(
    "compute",
    "against petaFLOP C of training (Pareto front)",
    front_points,
    ("C",),
    evaluations=True,
)
JOINT = ScalingVariables(
    "joint",
    "against parameters N and images seen D",
    curve_points,
    ("N", "D"),
    evaluations=True,
    robust=True,
)


@dataclasses.dataclass(frozen=True)
class SizePrediction:
    """Holds a loss that a law predicts for a size it was not fitted to.

    Attributes:
        size: number of parameters.
        loss: loss that the law predicts.
        low: lower end of the 95 % interval.
        high: upper end of the 95 % interval.
        measured: measured loss; None if there is no run of this size.
    """

    size: float
    loss: float
    low: float
    high: float
    measured: float | None = None


@dataclasses.dataclass(frozen=True)
class ScalingReport:
    """Holds the fits of a ladder.

    Attributes:
        fits: fits by the name of the variables, then by the kind of loss.
        predictions: predictions by the kind of loss; the first one is for the largest size, from
            the smaller ones, if these suffice for a fit.
        notes: caveats about the fits, one per line.
    """

    fits: dict[str, dict[str, Fit]]
    predictions: dict[str, list[SizePrediction]]
    notes: list[str]


def fit_scaling(
    ladder: Ladder,
    joint: bool = False,
    floors: Mapping[str, float] | None = None,
    sizes: Sequence[float] = (),
    resamples: int = 300,
    seed: int = 0,
) -> ScalingReport:
    """Fits the laws of a ladder, and predicts its largest size from the smaller ones.

    Args:
        ladder: runs of different sizes.
        joint: whether to fit one law of size and images seen, instead of one against each of size
            and compute.
        floors: floors by the names of LOSSES; those of other losses are fitted.
        sizes: numbers of parameters to predict losses for. A joint fit predicts them for the
            largest number of images that a run has seen.
        resamples: number of bootstrap resamples for the intervals.
        seed: seed of the resamples.

    Raises:
        InputError: too few sizes for the number of constants, a floor that is not below all losses,
            or one for an unknown loss.
    """
    floors = dict(floors or {})
    _check_floors(ladder, floors)
    main, report = JOINT if joint else PARAMETERS, ScalingReport({}, {}, list(ladder.notes))
    images_R = [float(curve.images_P[-1]) for curve in ladder.runs]
    if not joint and max(images_R) > SAME_LENGTH * min(images_R):
        report.notes.append(
            f"the runs saw {min(images_R):,.0f} to {max(images_R):,.0f} images, so differences "
            "between sizes also come from the length of training; --fit=joint separates them"
        )
    kinds = [main] if joint or not ladder.has_compute else [main, COMPUTE]
    for name, curves in ladder.curves.items():
        floor = floors.get(name)
        needed = values_needed(floor) + 1
        found = sorted({curve.size for curve in curves})
        if len(found) < needed:
            raise InputError(
                f"runs of {len(found)} sizes are too few: a fit of {name} needs {needed}"
                + ", or one less with --floor=0" * (floor is None)
                + f"; the sizes are {', '.join(map(short_number, found))}"
            )

        def fit(
            against: ScalingVariables, curves: Sequence[Curve], floor: float | None = floor
        ) -> Fit:
            drawn = resampled_curves(curves, resamples, seed, against.evaluations)
            resampled = (against.points(curves) for curves in drawn)
            return fit_resampled(against.points(curves), resampled, floor, against.robust)

        for against in kinds:
            points = against.points(curves)
            if points.spare(floor) < 1:
                count, values = len(points.loss_P), points.values()
                report.notes.append(
                    f"no fit of {name} {against.title}: {count} points with {values} distinct "
                    "values of a variable are too few"
                )
                continue
            fitted = fit(against, curves)
            if min(fitted.law.exponents) <= 0 or not fitted.law.is_determined:
                report.notes.append(f"{name} does not fall {against.title}")
            if not fitted.law.is_determined:
                continue
            report.fits.setdefault(against.name, {})[name] = fitted
            if against is main:
                report.predictions[name] = [_predict(fitted, size, max(images_R)) for size in sizes]
                rest = [curve for curve in curves if curve.size < found[-1]]
                if len(found) > needed and main.points(rest).spare(floor) >= 1:
                    largest = [curve for curve in curves if curve.size == found[-1]]
                    images = max(float(curve.images_P[-1]) for curve in largest)
                    last = [c.loss_P[-1] for c in largest if not joint or c.images_P[-1] == images]
                    if (smaller := fit(main, rest)).law.is_determined:
                        predicted = _predict(smaller, found[-1], images)
                        measured = dataclasses.replace(predicted, measured=float(np.mean(last)))
                        report.predictions[name].insert(0, measured)
    return report


def _predict(fit: Fit, size: float, images: float) -> SizePrediction:
    """Predicts the loss of a size, in a joint fit after it has seen this many images."""
    x = (size, images)[: len(fit.law.x0)]
    low, high = fit.interval(lambda law: float(law(*x)))
    return SizePrediction(size, float(fit.law(*x)), low, high)


def _check_floors(ladder: Ladder, floors: Mapping[str, float]) -> None:
    for name, floor in floors.items():
        if name not in ladder.curves:
            raise InputError(
                f"floor of {name!r}: the runs have {', '.join(ladder.curves)} in common"
            )
        lowest = min(float(curve.loss_P.min()) for curve in ladder.curves[name])
        allowed = f"at least 0 and below the lowest {name}, {lowest:.4g}"
        check_setting(f"floor of {name}", floor, 0 <= floor < lowest, allowed)


def short_number(number: float) -> str:
    """Formats a number of parameters: "589.8 k"."""
    for unit, size in (("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number:.4g}"
