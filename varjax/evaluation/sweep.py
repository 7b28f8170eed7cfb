"""Evaluates one model with several sampling options: a table, and FID against Inception Score."""

import dataclasses
import hashlib
import itertools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from varjax.analysis.pyplot import load_pyplot
from varjax.config.numbers import seed_number
from varjax.errors import InputError, StorageError
from varjax.metrics.report import mean_and_deviation
from varjax.sampling.option_sweep import option_text, parse_sweep_value, read_values
from varjax.sampling.rejection import check_acceptance
from varjax.storage import files

PRINTED = ("fid", "inception_score", "label_accuracy", "precision", "recall")
SHOWN_POINTS = 4  # in a message
LONGEST_NAME = 150  # characters of a point in a file's name, of which most disks take 255 bytes
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class SweepPoint:
    """Holds one combination of options, and its report.

    Attributes:
        options: values of the swept options by name, with the acceptance and the seed if these are
            swept.
        report: report returned by `evaluate_model`; of several seeds, see `join_seeds`.
    """

    options: dict[str, Any]
    report: dict[str, Any]

    @property
    def metrics(self) -> dict[str, float]:
        """Metrics by name; of several seeds, their means."""
        return self.report["metrics"]

    @property
    def deviations(self) -> dict[str, float]:
        """Standard deviations of the metrics by name; none for one seed."""
        return self.report.get("standard_deviations", {})


def split_sweep(texts: Sequence[str]) -> tuple[list[float], list[int], list[str]]:
    """Separates "accept=1,0.5" and "seed=0,1,2" from options of the model.

    Args:
        texts: options and their values, NAME=VALUE,VALUE… each.

    Returns:
        (acceptances of rejection sampling and seeds, none if they are not swept; the other texts).

    Raises:
        InputError: an acceptance or a seed out of range, or given twice.
    """
    accepts, texts = _split(
        texts, "accept", lambda x: check_acceptance(parse_sweep_value("accept", float, x))
    )
    seeds, texts = _split(
        texts, "seed", lambda x: seed_number("seed", parse_sweep_value("seed", int, x))
    )
    return accepts, seeds, texts


def options_text(options: Mapping[str, Any]) -> str:
    """Formats options as the names of reports have them: "guidance=1.5,seed=0"."""
    return ",".join(f"{key}={option_text(value)}" for key, value in options.items())


def picture_path(out: pathlib.Path) -> pathlib.Path:
    """Returns the path of the picture of a sweep: "sweep.json" -> "sweep.png"."""
    return out.with_suffix(".png")


def point_path(out: pathlib.Path, options: Mapping[str, Any]) -> pathlib.Path:
    """Returns the path of the report of a point: "report.json" -> "report.guidance=1.5.json".

    A long name, of lists with a value for each step, ends in its hash instead.
    """
    name = options_text(options)
    if len(name) > LONGEST_NAME:
        digest = hashlib.sha256(name.encode()).hexdigest()[:16]
        name = f"{name[: LONGEST_NAME - len(digest) - 1]}-{digest}"
    return out.with_name(f"{out.stem}.{name}{out.suffix}")


def check_sweep_output(out: pathlib.Path, points: Sequence[Mapping[str, Any]]) -> None:
    """Checks that a sweep of these points would replace no other sweep and no other picture.

    A sweep with more points may replace one with fewer. The points that both have are compared by
    their reports, before anything is drawn for the others.

    Args:
        out: path of the sweep, next to which the picture and the reports are written.
        points: values of the swept options by name, for each point.

    Raises:
        InputError: `out` is not a sweep, has other points, or lacks their reports; or `out` does
            not exist, but a picture of its name does.
    """
    picture = picture_path(out)
    replace = f"delete {out}, {picture} and {out.stem}.*{out.suffix}, or choose another out"
    if not out.exists():
        if picture.exists():
            raise InputError(
                f"{picture} exists, and the picture of this sweep would replace it; delete it or "
                "choose another out"
            )
        return
    try:
        existing = [dict(point["options"]) for point in files.read_json(out)["points"]]
    except StorageError:
        raise
    except (InputError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{out} exists and is not a sweep; delete it or choose another out"
        ) from error
    names = {options_text(point) for point in points}
    if lost := [name for name in map(options_text, existing) if name not in names]:
        raise InputError(
            f"{out} is a sweep with points that would be lost: {'; '.join(lost[:SHOWN_POINTS])}"
            f"{' …' * (len(lost) > SHOWN_POINTS)}. Sweep their values too, with the options in "
            f"this order; or {replace}"
        )
    for point in existing:
        if not (report := point_path(out, point)).exists():
            raise InputError(
                f"{out} is a sweep, but the report of a point, {report}, is missing, so the sweeps "
                f"cannot be compared; {replace}"
            )


def join_seeds(points: Sequence[SweepPoint]) -> list[SweepPoint]:
    """Joins the points that differ only in their seeds.

    Returns:
        Points without seeds, whose reports contain the means as "metrics" and, of two seeds or
        more, "standard_deviations".
    """
    groups: dict[tuple, list[dict[str, float]]] = {}
    for point in points:
        options = tuple((name, x) for name, x in point.options.items() if name != "seed")
        groups.setdefault(options, []).append(point.metrics)
    joined = []
    for options, metrics in groups.items():
        means, deviations = mean_and_deviation(metrics)
        report = {"metrics": means, "standard_deviations": deviations}
        joined.append(SweepPoint(dict(options), report))
    return joined


def sweep_table(points: Sequence[SweepPoint]) -> str:
    """Formats the metrics of all points, one line each, and marks the lowest FID.

    Points that differ only in their seeds share a line: mean ± standard deviation.
    """
    points = join_seeds(points)
    names = [name for name in PRINTED if any(name in p.metrics for p in points)]
    lowest = min(points, key=lambda p: p.metrics["fid"])
    lines = ["".join(f"{name:>18}" for name in (*points[0].options, *names))]
    for point in points:
        cells = [f" {option_text(value):>17}" for value in point.options.values()]
        cells += [f"{_metric(point, name):>18}" for name in names]
        mark = "   lowest FID" if point is lowest and len(points) > 1 else ""
        lines.append("".join(cells) + mark)
    return "\n".join(lines)


def write_sweep(points: Sequence[SweepPoint], out: pathlib.Path) -> pathlib.Path:
    """Writes all points to `out` and a picture next to it; returns the picture's path.

    The picture shows FID against the Inception Score, or, without the score, against the first
    option's values. Lines join the points that differ only in the first option. Several seeds are
    one point, with a bar of ± one standard deviation.
    """
    content = {"points": [{"options": p.options} | p.metrics for p in points]}
    if "seed" in points[0].options:
        joined = join_seeds(points)
        content["over_seeds"] = [
            {"options": p.options, "means": p.metrics, "standard_deviations": p.deviations}
            for p in joined
        ]
        points = joined if joined[0].options else points  # seeds alone are points of a line
    files.write_json(out, content)
    pyplot = load_pyplot()
    figure, axes = pyplot.subplots(figsize=(6, 4.5), layout="constrained")
    first, *others = points[0].options
    scored = all("inception_score" in point.metrics for point in points)

    # Lists have no place on an axis of numbers, so then the axis shows texts.
    lists = any(isinstance(point.options[first], tuple) for point in points)
    at = option_text if lists else lambda value: value

    def rest(point: SweepPoint) -> tuple:
        return tuple(point.options[name] for name in others)

    for values, group in itertools.groupby(sorted(points, key=lambda p: str(rest(p))), key=rest):
        line = list(group)
        x = [p.metrics["inception_score"] if scored else at(p.options[first]) for p in line]
        y = [point.metrics["fid"] for point in line]
        bars = [p.deviations["fid"] for p in line] if line[0].deviations else None
        label = (
            ", ".join(f"{n} {option_text(v)}" for n, v in zip(others, values, strict=True)) or None
        )
        axes.errorbar(x, y, bars, fmt="o-", capsize=3, label=label)
        for point, position in zip(line, zip(x, y, strict=True), strict=True):
            text, shift = f"{first} {option_text(point.options[first])}", (5, 5)
            axes.annotate(text, position, shift, textcoords="offset points", fontsize=8)
    axes.set_xlabel("Inception Score (higher is better)" if scored else first)
    axes.set_ylabel("FID (lower is better)")
    axes.grid(alpha=0.3)
    if others:
        axes.legend()
    picture = picture_path(out)
    with files.atomic_path(picture) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    pyplot.close(figure)
    return picture


def _split(texts: Sequence[str], name: str, read: Callable[[str], T]) -> tuple[list[T], list[str]]:
    """Returns the values of "NAME=VALUE,VALUE…", none without such a text, and the other texts."""
    found = [text for text in texts if text.partition("=")[0] == name]
    if len(found) > 1:
        raise InputError(f"sweep {found[1]}: {name} is swept twice")
    values = read_values(found[0], read) if found else []
    return values, [text for text in texts if text not in found]


def _metric(point: SweepPoint, name: str) -> str:
    """Formats a metric, with its standard deviation over seeds if there is one."""
    text = f"{point.metrics[name]:.4f}"
    return f"{text} ± {point.deviations[name]:.4f}" if point.deviations else text
