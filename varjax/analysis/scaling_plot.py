"""Draws scaling laws as the VAR paper does: four panels of losses against size or compute."""

import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from varjax.analysis.ladder import LOSSES, Curve, Ladder
from varjax.analysis.power_law import INTERVAL_PERCENTILES, Fit, PowerLaw
from varjax.analysis.pyplot import load_pyplot
from varjax.analysis.scaling_fits import JOINT, ScalingVariables
from varjax.storage import files
from varjax.tokenizers.vq.pyramid import SCALES_256

AXES = {"N": "parameters N", "C": "petaFLOP C", "D": "images seen D"}
# Exponents of the VAR paper's fits (Tian et al. 2024, Fig. 5 and 6, quoted from memory). Their
# constants are not used: with them, the losses do not agree with the public training logs.
PAPER_EXPONENTS = {
    "N": {"loss_last": 0.23, "loss": 0.20, "error_last": 0.016, "error": 0.010},
    "C": {"loss_last": 0.13, "loss": 0.13, "error_last": 0.0067, "error": 0.011},
}
PAPER_VOCAB = 4096


def draw_scaling(
    ladder: Ladder, against: ScalingVariables, fits: Mapping[str, Fit], out: str | pathlib.Path
) -> None:
    """Draws a panel for each kind of loss, with points, fits and their 95 % bands, into a PNG file.

    Runs on the tokens of the VAR paper also get a line with the paper's exponent, through the
    middle of the fit.

    Args:
        ladder: runs that were fitted.
        against: variables of the fits; the last one is the horizontal axis.
        fits: fits by the kind of loss.
        out: PNG file to write.
    """
    pyplot = load_pyplot()
    from matplotlib import ticker

    rows = -(-len(fits) // 2)
    columns = min(len(fits), 2)
    figure = pyplot.figure(figsize=(6 * columns + 1.5, 4.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    sizes = np.log([curve.size for curve in ladder.runs])
    spread = (sizes - sizes.min()) / max(float(np.ptp(sizes)), 1e-9)
    colors = [pyplot.get_cmap("viridis")(0.9 * value) for value in spread]
    for panel, (name, fit) in zip(panels, fits.items(), strict=False):
        curves = ladder.curves[name]
        axis = against.symbols[-1]
        panel.set(xscale="log", yscale="log", xlabel=AXES[axis], ylabel=LOSSES[name][2])
        if against is JOINT:
            _draw_joint(panel, curves, colors, fit)
        else:
            _draw_law(panel, curves, colors, fit, axis)
            if has_paper_tokens(ladder):
                _draw_paper(panel, fit, PAPER_EXPONENTS[axis][name])
        panel.yaxis.set_major_locator(ticker.MaxNLocator(5))
        panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%.3g"))
        panel.yaxis.set_minor_locator(ticker.NullLocator())
        if axis != "C":  # "1m" would read as a million petaFLOP
            panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        panel.xaxis.set_minor_formatter(ticker.NullFormatter())
        panel.grid(alpha=0.25)
        panel.legend(fontsize=8)
    _list_sizes(figure, ladder.runs, colors)
    with files.atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def _list_sizes(figure: Any, runs: Sequence[Curve], colors: Sequence[Any]) -> None:
    """Lists the sizes by color, to the right of the panels."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import EngFormatter

    form = EngFormatter(places=1, sep="")
    by_size = {form(run.size): color for run, color in zip(runs, colors, strict=True)}
    lines = [Line2D([], [], color=color, label=size, lw=3) for size, color in by_size.items()]
    figure.legend(handles=lines, title="parameters", loc="outside right upper", fontsize=9)


def has_paper_tokens(ladder: Ladder) -> bool:
    """Returns whether the runs predict the VAR paper's 680 tokens of 4,096 codes."""
    tokens = [ladder.smallest.setting("task", "tokenizer", name) for name in ("scales", "vocab")]
    return tokens == [list(SCALES_256), PAPER_VOCAB]


def _draw_law(
    panel: Any, curves: Sequence[Curve], colors: Sequence[Any], fit: Fit, axis: str
) -> None:
    if axis == "C":
        for curve, color in zip(curves, colors, strict=True):
            panel.plot(curve.petaflop_P, curve.loss_P, color=color, linewidth=1, alpha=0.8)
        panel.plot(*fit.points.x_TP, fit.points.loss_P, "k.", markersize=4, label="Pareto front")
        # The first evaluations are far above the front and would flatten it.
        low, high = fit.points.loss_P.min(), fit.points.loss_P.max()
        panel.set_ylim(low * (low / high) ** 0.1, high * (high / low) ** 0.3)
    else:
        for curve, color in zip(curves, colors, strict=True):
            panel.plot(curve.size, curve.loss_P[-1], "o", color=color)
    (x_P,) = fit.points.x_TP
    line = np.geomspace(x_P.min() / 1.1, x_P.max() * 1.1, 100)
    label = f"{_equation(fit.law, axis)},  r = {fit.correlation:.4f}"
    panel.plot(line, fit.law(line), "k--", linewidth=1.2, label=label)
    if fit.resampled:
        band = np.percentile([law(line) for law in fit.resampled], INTERVAL_PERCENTILES, axis=0)
        panel.fill_between(line, *band, color="gray", alpha=0.2, linewidth=0)


def _equation(law: PowerLaw, symbols: Sequence[str]) -> str:
    constants = zip(law.x0, symbols, law.exponents, strict=True)
    terms = [f"({x0:.3g} / {symbol})^{exponent:.3f}" for x0, symbol, exponent in constants]
    return " + ".join([f"{law.floor:.3f}"] * (law.floor >= 0.0005) + terms)


def _draw_paper(panel: Any, fit: Fit, exponent: float) -> None:
    (x_P,) = fit.points.x_TP
    ends = np.array([x_P.min(), x_P.max()])
    middle = np.sqrt(ends.prod())
    values = fit.law(middle) * (middle / ends) ** exponent
    label = f"exponent {exponent} of the VAR paper"
    panel.plot(ends, values, color="tab:red", linestyle=":", label=label)


def _draw_joint(panel: Any, curves: Sequence[Curve], colors: Sequence[Any], fit: Fit) -> None:
    images_P = fit.points.x_TP[1]
    line = np.geomspace(images_P.min(), images_P.max(), 100)
    for i, (curve, color) in enumerate(zip(curves, colors, strict=True)):
        kept = curve.images_P >= images_P.min()
        panel.plot(curve.images_P[kept], curve.loss_P[kept], ".", color=color, markersize=4)
        label = _equation(fit.law, JOINT.symbols) if i == 0 else None
        panel.plot(line, fit.law(curve.size, line), "--", color=color, linewidth=1, label=label)
