"""Fits scaling laws to runs of different sizes: loss and token error against size and compute.

varjax scaling runs/ladder_d2 runs/ladder_d3 runs/ladder_d4 runs/ladder_d5 --out=scaling
varjax scaling RUN… --out=DIR --floor=0
varjax scaling RUN… --out=DIR --fit=joint

The law is loss = floor + (x0 / x)^exponent. Against parameters, each run gives its last loss.
Against compute, the evaluations of all runs give the lowest loss for each petaFLOP (the Pareto
front). With --fit=joint the law is loss = floor + (x0 / N)^a + (x1 / D)^b for N parameters and D
images seen, fitted to whole curves (Hoffmann et al. 2022).

Only metrics.jsonl and config.json of each run are needed. The fits are printed, and written to DIR
as scaling.json and pictures.
"""

import argparse
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from varjax.analysis.ladder import LOSSES, PREFIXES, Ladder, read_ladder
from varjax.analysis.power_law import Fit, PowerLaw
from varjax.analysis.pyplot import load_pyplot
from varjax.analysis.scaling_fits import (
    COMPUTE,
    JOINT,
    PARAMETERS,
    ScalingReport,
    ScalingVariables,
    fit_scaling,
    short_number,
)
from varjax.analysis.scaling_plot import draw_scaling
from varjax.errors import InputError, check_setting
from varjax.runtime.commands import command_parser, run_command
from varjax.runtime.text_table import table_lines
from varjax.storage import files
from varjax.storage.buckets import as_path


def scaling_tables(ladder: Ladder, report: ScalingReport) -> list[str]:
    """Formats a report as tables of text."""
    weights = "EMA weights" if ladder.prefix == PREFIXES[0] else "non-EMA weights"
    lines = [f"{len(ladder.runs)} runs, last losses on held-out images ({weights}):"]
    rows = [["run", "parameters", "images seen", "petaFLOP", *ladder.curves]]
    for index, run in enumerate(ladder.runs):
        petaflop = run.petaflop_P[-1]
        cells = [run.run, short_number(run.size), f"{run.images_P[-1]:,.0f}"]
        cells.append("" if np.isnan(petaflop) else f"{petaflop:,.4g}")
        losses = [f"{curves[index].loss_P[-1]:.4f}" for curves in ladder.curves.values()]
        rows.append([*cells, *losses])
    lines += [*table_lines(rows), ""]
    variables = "ND" if JOINT.name in report.fits else "x"
    law = " + ".join(f"(x0 / {variable})^exponent" for variable in variables)
    lines.append(f"loss = floor + {law}; in brackets: 95 % of the resampled fits")
    for against in (PARAMETERS, COMPUTE, JOINT):
        if fits := report.fits.get(against.name):
            lines += ["", f"{against.title}:", *_fit_table(against, fits)]
    predicted = [name for name, found in report.predictions.items() if found]
    if predicted:
        rows = [["", "parameters", "predicted", "measured"]]
        rows += [
            [
                LOSSES[name][2],
                short_number(p.size),
                f"{p.loss:.4f}{_brackets(p.low, p.high, '{:.4f}')}",
                "" if p.measured is None else f"{p.measured:.4f} (left out of the fit)",
            ]
            for name in predicted
            for p in report.predictions[name]
        ]
        lines += ["", "predictions:", *table_lines(rows)]
    return lines + [f"note: {note}" for note in report.notes]


def _fit_table(against: ScalingVariables, fits: Mapping[str, Fit]) -> list[str]:
    header = [""]
    for variable in against.symbols:
        header += [f"exponent of {variable}", f"x0 of {variable}"]
    header.append("floor")
    header += ["r"] * (len(against.symbols) == 1)
    rows = [header]
    for name, fit in fits.items():
        cells = [LOSSES[name][2]]
        for i in range(len(against.symbols)):
            cells.append(_with_interval(fit, lambda law, i=i: law.exponents[i], "{:.3f}"))
            cells.append(_with_interval(fit, lambda law, i=i: law.x0[i], "{:.3g}"))
        cells.append(_with_interval(fit, lambda law: law.floor, "{:.3f}"))
        if len(against.symbols) == 1:
            cells.append(f"{fit.correlation:.4f}")
        rows.append(cells)
    return table_lines(rows)


def _with_interval(fit: Fit, quantity: Callable[[PowerLaw], float], form: str) -> str:
    return form.format(quantity(fit.law)) + _brackets(*fit.interval(quantity), form)


def _brackets(low: float, high: float, form: str) -> str:
    return "" if np.isnan(low) else f" [{form.format(low)}, {form.format(high)}]"


def scaling_json(ladder: Ladder, report: ScalingReport) -> dict[str, Any]:
    """Returns the content of scaling.json: runs, points, constants with intervals, predictions."""

    def constants(fit: Fit) -> dict[str, Any]:
        law = fit.law
        entry: dict[str, Any] = dataclasses.asdict(law)
        entry["floor_interval"] = fit.interval(lambda law: law.floor)
        for i in range(len(law.x0)):
            entry[f"x0_{i}_interval"] = fit.interval(lambda law, i=i: law.x0[i])
            entry[f"exponent_{i}_interval"] = fit.interval(lambda law, i=i: law.exponents[i])
        if len(law.x0) == 1:
            entry["correlation"] = fit.correlation
        entry["points"] = {"x": fit.points.x_TP.tolist(), "loss": fit.points.loss_P.tolist()}
        return entry

    content = {
        "weights": ladder.prefix,
        "runs": [{"run": run.run, "parameters": run.size} for run in ladder.runs],
        "fits": {
            against: {name: constants(fit) for name, fit in fits.items()}
            for against, fits in report.fits.items()
        },
        "predictions": {
            name: [dataclasses.asdict(prediction) for prediction in predictions]
            for name, predictions in report.predictions.items()
        },
        "notes": report.notes,
    }
    return _without_nan(content)


def _without_nan(data: Any) -> Any:
    """Replaces NaN, which JSON lacks, by None in nested dicts and sequences."""
    if isinstance(data, dict):
        return {name: _without_nan(value) for name, value in data.items()}
    if isinstance(data, list | tuple):
        return [_without_nan(value) for value in data]
    return None if isinstance(data, float) and not np.isfinite(data) else data


def parse_floors(text: str) -> dict[str, float]:
    """Reads --floor: "free", "0" for all losses, or "loss=2.9,error=0.8" for some.

    Raises InputError for anything else.
    """
    if text == "free":
        return {}
    if text == "0":
        return dict.fromkeys(LOSSES, 0.0)
    floors = {}
    for word in text.split(","):
        name, _, value = word.partition("=")
        try:
            floors[name] = float(value)
        except ValueError:
            floors[name] = np.nan
        if name not in LOSSES or not np.isfinite(floors[name]):
            raise InputError(
                f"floor={text}: allowed are free, 0, and NAME=NUMBER for {', '.join(LOSSES)}, "
                "with commas between them"
            )
    return floors


def _numbers(text: str) -> list[float]:
    try:
        numbers = [float(word) for word in text.split(",") if word]
        valid = all(0 < number < np.inf for number in numbers)
    except ValueError:
        numbers, valid = [], False
    if not valid:
        raise argparse.ArgumentTypeError(
            f"{text!r}: give numbers of parameters above 0, separated by commas, such as 5e6,1e7"
        )
    return numbers


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    parser = command_parser("varjax scaling", __doc__)
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="directories of the runs, of different sizes")
    add("--out", required=True, metavar="DIR", help="folder for scaling.json and the pictures")
    add(
        "--fit",
        choices=("separate", "joint"),
        default="separate",
        help="one law each of size and of compute (separate), or one of size and images seen",
    )
    add(
        "--floor",
        default="free",
        help="loss that no size goes below: free (fitted), 0, or values such as "
        "loss=2.9,error_last=0.8",
    )
    add(
        "--weights",
        choices=PREFIXES,
        default="",
        help="evaluations to read: EMA weights (eval_ema, if all runs have them) or eval",
    )
    add(
        "--predict",
        type=_numbers,
        default=[],
        metavar="N,…",
        help="numbers of parameters to predict losses for, such as 5e6,1e7",
    )
    add("--resamples", type=int, default=300, help="bootstrap resamples for the intervals (300)")
    add("--seed", type=int, default=0, help="random seed of the resamples (0)")
    flags = parser.parse_args(arguments)

    def scaling() -> None:
        check_setting("resamples", flags.resamples, 0 <= flags.resamples <= 100_000, "0 … 100,000")
        check_setting("seed", flags.seed, flags.seed >= 0, "0 or more")
        floors = parse_floors(flags.floor)
        load_pyplot()  # the pictures come last, after all fits
        ladder = read_ladder(flags.runs, flags.weights)
        if flags.floor == "0":
            floors = {name: floor for name, floor in floors.items() if name in ladder.curves}
        report = fit_scaling(
            ladder, flags.fit == "joint", floors, flags.predict, flags.resamples, flags.seed
        )
        print("\n".join(scaling_tables(ladder, report)))
        out = as_path(flags.out)
        again = (out / "scaling.json").exists()
        files.write_json(out / "scaling.json", scaling_json(ladder, report))
        for against in (PARAMETERS, COMPUTE, JOINT):
            picture = out / f"{against.name}.png"
            if fits := report.fits.get(against.name):
                draw_scaling(ladder, against, fits, picture)
            elif again:
                files.remove(picture)  # of an earlier call, whose scaling.json is replaced
        print(f"written to {out}")

    return run_command("varjax scaling", scaling)
