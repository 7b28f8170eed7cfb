"""Draws the curves of several training runs into one PNG.

varjax plot runs/a runs/b --out=plot.png
varjax plot runs/var_d16 --reference=d16
varjax plot runs/mar_b --reference=mar

The upper panels show loss and accuracy (PSNR for tokenizers) over the images seen, so that runs
with different batch sizes can be compared. Below is one panel for each scale. Thin lines are
training, thick lines its running means, dots held-out images. Runs may still be in progress.
"""

import pathlib
import sys
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from varjax.analysis.run_log import PUBLISHED_LOGS, PublishedLog, RunLog, read_run_log
from varjax.analysis.runs import find_runs
from varjax.errors import InputError
from varjax.runtime.commands import command_parser, run_command
from varjax.storage import files
from varjax.storage.buckets import as_path

PREFIX_LABELS = {"": "training", "eval/": "held out", "eval_ema/": "held out, averaged weights"}
SECOND_METRICS = ("accuracy", "psnr")  # right of the loss: the first one that the logs have
SAMPLE_METRICS = ("fid", "inception_score")  # then: all that the logs have
SCALE_METRICS = (
    "loss_at_scale",
    "perplexity",
)  # in the lower panels: the first one that the logs have
PANEL_COLUMNS = 5


def draw_curves(
    runs: Sequence[RunLog],
    out: str | pathlib.Path,
    reference: PublishedLog | None = None,
    by_scale: str = "",
) -> None:
    """Draws the curves of runs, over images seen, into a PNG file.

    Args:
        runs: logs to draw, each in a color.
        out: PNG file to write.
        reference: published log to draw as well.
        by_scale: metric of the lower panels; "" for the first of SCALE_METRICS that the logs
            contain.

    Raises:
        InputError: no run has logged anything yet, or no run has logged `by_scale`.
    """
    if not any(run.points(kind + "loss")[0].size for run in runs for kind in PREFIX_LABELS):
        raise InputError(f"nothing is logged yet in {', '.join(run.name for run in runs)}")
    second = _first(SECOND_METRICS, lambda name: any(run.points(name)[0].size for run in runs))
    large = ["loss", *[second] * bool(second)]
    large += [
        name
        for name in SAMPLE_METRICS
        if any(run.points(kind + name)[0].size for run in runs for kind in PREFIX_LABELS)
    ]
    if by_scale and not any(run.scales(by_scale) for run in runs):
        raise InputError(
            f"by_scale={by_scale}: no run has logged it for each scale; such metrics are "
            f"{', '.join(SCALE_METRICS)}"
        )
    by_scale = by_scale or _first(SCALE_METRICS, lambda name: any(run.scales(name) for run in runs))
    scales = max(run.scales(by_scale) for run in runs)

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    rows = -(-scales // PANEL_COLUMNS)
    figure = pyplot.figure(figsize=(13, 4.8 + 2.3 * rows), layout="constrained")
    ratios = (4.8, 2.3 * rows)[: 1 + bool(rows)]
    parts: Any = figure.subfigures(len(ratios), 1, squeeze=False, height_ratios=ratios)
    above, *below = parts[:, 0]
    panels = _large(above, large)
    for part in below:
        panels |= _small(part, by_scale, scales)
    for name, panel in panels.items():
        for i, run in enumerate(runs):
            _curves(panel, run, name, f"C{i % 10}")
        if reference:
            _reference(panel, reference, name)
            panel.set_xscale("log")
        else:
            panel.set_xlim(left=0)
        low, high = panel.dataLim.intervaly
        if name == "loss" and low > 0 and high > 10 * low:
            panel.set_yscale("log")
            panel.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        panel.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
        panel.grid(alpha=0.25)
    handles = _legend(runs, reference)
    above.legend(handles=handles, loc="outside upper center", ncols=4 if len(handles) > 5 else 5)
    with files.atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def _large(part: Any, names: list[str]) -> dict[str, Any]:
    widths = (3, *[2] * (len(names) - 1))
    axes = part.subplots(1, len(names), width_ratios=widths, squeeze=False)[0]
    for panel, name in zip(axes, names, strict=True):
        panel.set(title=name, xlabel="images seen")
    return dict(zip(names, axes, strict=True))


def _small(part: Any, metric: str, scales: int) -> dict[str, Any]:
    """Makes a panel for each scale; rows and columns share their axes."""
    columns = min(scales, PANEL_COLUMNS)
    axes = part.subplots(-(-scales // columns), columns, sharex=True, sharey=True, squeeze=False)
    for k, panel in enumerate(axes.flat):
        panel.set_visible(k < scales)
        panel.tick_params(labelbottom=k + columns >= scales)
        panel.set_title(f"{metric.removesuffix('_at_scale')}, scale {k}", fontsize=10)
    return {f"{metric}/{k}": panel for k, panel in enumerate(axes.flat[:scales])}


def _curves(panel: Any, run: RunLog, name: str, color: str) -> None:
    images, values = run.points(name)
    if len(values) > 100:
        panel.plot(images, values, color=color, alpha=0.2, linewidth=0.8)
        values = _running_mean(values, len(values) // 40)
    panel.plot(images, values, color=color, linewidth=1.6)
    for kind, fill in (("eval/", color), ("eval_ema/", "white")):
        x, y = run.points(kind + name)
        size = 4 if len(x) <= 30 else 2.5
        style = {"marker": "o", "markersize": size, "markerfacecolor": fill}
        panel.plot(x, y, color=color, linewidth=0.8, linestyle="--", **style)


def _reference(panel: Any, reference: PublishedLog, name: str) -> None:
    if name in reference.points:
        images_N, values_N = reference.points[name]
        panel.plot(images_N, values_N, color="black", marker="D", markersize=4, linestyle=":")


def _legend(runs: Sequence[RunLog], reference: PublishedLog | None) -> list[Any]:
    """Lists runs by color, then the kinds of curves that exist by style."""
    from matplotlib.lines import Line2D

    def line(label: str, color: str, **style: Any) -> Line2D:
        return Line2D([], [], color=color, label=label, **style)

    handles = [line(run.name, f"C{i % 10}", linewidth=3) for i, run in enumerate(runs)]
    dots = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 0.8}
    styles = {"": {}, "eval/": dots, "eval_ema/": dots | {"markerfacecolor": "white"}}
    for kind, label in PREFIX_LABELS.items():
        if any(run.points(kind + "loss")[0].size for run in runs):
            handles.append(line(label, "gray", **styles[kind]))
    if reference:
        handles.append(line(reference.name, "black", marker="D", markersize=4, linestyle=":"))
    return handles


def _running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Averages up to `width` values on each side, fewer at the steep beginning."""
    sums, i = np.concatenate([[0.0], np.cumsum(y)]), np.arange(len(y))
    reach = np.minimum(width, i // 4)
    start, stop = i - reach, np.minimum(i + reach + 1, len(y))
    return (sums[stop] - sums[start]) / (stop - start)


def _first(names: Iterable[str], exists: Any) -> str:
    return next((name for name in names if exists(name)), "")


def _runs_at(location: str) -> list[str]:
    """Returns the directory of a run, or those of all runs in a folder."""
    path = as_path(location)
    if not path.is_dir() or (path / "config.json").is_file():
        return [location]
    try:
        return [str(run) for run in find_runs(location)]
    except InputError:  # reading it as a run says what is missing
        return [location]


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    parser = command_parser("varjax plot", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="runs, or folders of runs")
    parser.add_argument("--out", default="plot.png", help="picture to write (plot.png)")
    parser.add_argument(
        "--reference", choices=tuple(PUBLISHED_LOGS), help="published log to draw as well"
    )
    parser.add_argument(
        "--by_scale",
        default="",
        help="metric of the lower panels (loss_at_scale, or else perplexity)",
    )
    flags = parser.parse_args(arguments)

    def plot() -> None:
        directories = [run for location in flags.runs for run in _runs_at(location)]
        logs = [read_run_log(directory) for directory in directories]
        draw_curves(logs, flags.out, PUBLISHED_LOGS.get(flags.reference), flags.by_scale)
        print(f"{flags.out} is written")

    return run_command("varjax plot", plot)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
