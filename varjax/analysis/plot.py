"""Draws the curves of several training runs into one PNG.

varjax plot runs/a runs/b --out=plot.png
varjax plot runs --out=all.png
varjax plot runs/var_d16 --reference=d16
varjax plot runs/mar_b --reference=mar

The upper panels show loss, accuracy, PSNR and the metrics of samples, as far as the runs have
logged them, over the images seen, so that runs with different batch sizes can be compared. Losses
of different kinds, such as those of a tokenizer and a transformer, are in different panels. Below
is one panel for each scale. Thin lines are training, thick lines its running means, dots held-out
images. Runs may still be in progress.
"""

import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from varjax.analysis.pyplot import load_pyplot
from varjax.analysis.run_log import PUBLISHED_LOGS, PublishedLog, RunLog, read_run_log
from varjax.analysis.runs import find_runs
from varjax.errors import InputError
from varjax.runtime.commands import command_parser, run_command
from varjax.storage import files
from varjax.storage.buckets import as_path, short_path

PREFIX_LABELS = {"": "training", "eval/": "held out", "eval_ema/": "held out, EMA weights"}
TITLES = {
    "loss": "loss",
    "accuracy": "accuracy",
    "psnr": "PSNR in dB",
    "fid": "FID",
    "inception_score": "Inception Score",
    "label_accuracy": "label accuracy of samples",
}
TASK_METRICS = ("loss", "accuracy")  # their meaning depends on the task
SAMPLE_METRICS = ("fid", "inception_score", "label_accuracy")  # depend on the features
SCALE_METRICS = ("loss_at_scale", "perplexity")  # in the lower panels: all that the logs have
PANEL_COLUMNS, LARGE_COLUMNS = 5, 3
LARGE_HEIGHT, SMALL_HEIGHT, LEGEND_HEIGHT = 4.4, 2.3, 0.25  # inches of a row
DISTINCT_COLORS = 10  # in Matplotlib's default cycle


@dataclasses.dataclass(frozen=True)
class Panel:
    """Names what a panel shows: a metric that means the same in all of its runs.

    Attributes:
        metric: name in the logs, without "eval/".
        runs: positions of the runs that have logged it.
        title: text above the panel.
        large: whether it is one of the upper panels.
    """

    metric: str
    runs: tuple[int, ...]
    title: str
    large: bool


def metric_kind(run: RunLog, metric: str) -> tuple[str, ...]:
    """Says what a metric measures in a run, where that depends on the run; () where it does not.

    Losses of different tasks, or of different heads of MAR, are different quantities. So are FIDs
    by other features, with another reference, or of another number of images.
    """
    if metric in TASK_METRICS:
        head = _text(run, "task", "model", "head", "_type")
        words = [_text(run, "task", "_type").removesuffix("Task"), head]
    elif metric in SAMPLE_METRICS:
        features, reference = (_text(run, "fid", x) for x in ("features", "reference"))
        words = [features, reference if metric == "fid" else "", _sample_count(run)]
    else:
        words = []
    return tuple(word for word in words if word)


def _sample_count(run: RunLog) -> str:
    """Returns how many samples an evaluation draws, on which FID and Inception Score depend."""
    images = run.setting("fid", "images")
    return f"{images:,} images" if type(images) is int else ""


def large_panels(runs: Sequence[RunLog]) -> list[Panel]:
    """Returns the upper panels: one for each metric that the runs have logged, and each kind."""
    panels = []
    for metric, title in TITLES.items():
        kinds: dict[tuple[str, ...], list[int]] = {}
        for i, run in enumerate(runs):
            if any(run.points(prefix + metric)[0].size for prefix in PREFIX_LABELS):
                kinds.setdefault(metric_kind(run, metric), []).append(i)
        for kind, members in kinds.items():
            name = ", ".join(map(short_path, kind)) or "others"
            text = f"{title}: {name}" if len(kinds) > 1 else title
            panels.append(Panel(metric, tuple(members), text, large=True))
    return panels


def scale_panels(runs: Sequence[RunLog], metric: str) -> list[Panel]:
    """Returns a panel for each scale of a metric; none if no run has logged it."""
    members = tuple(i for i, run in enumerate(runs) if run.scales(metric))
    scales = max((runs[i].scales(metric) for i in members), default=0)
    name = metric.removesuffix("_at_scale")
    return [
        Panel(f"{metric}/{k}", members, f"{name}, scale {k}", large=False) for k in range(scales)
    ]


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
        by_scale: metric of the lower panels; "" for those of SCALE_METRICS that the logs contain.

    Raises:
        InputError: no run has logged anything yet, no run has logged `by_scale`, or the reference
            is of a task that no run has.
    """
    tasks = {_text(run, "task", "_type") for run in runs}
    if reference and not tasks & {"", reference.task}:
        raise InputError(
            f"reference={reference.name}: is a log of {reference.task}, which none of these runs "
            f"has trained ({', '.join(sorted(tasks))}); leave it out"
        )
    upper = large_panels(runs)
    if not upper:
        raise InputError(f"nothing is logged yet in {', '.join(run.name for run in runs)}")
    lower = [scale_panels(runs, metric) for metric in ([by_scale] if by_scale else SCALE_METRICS)]
    if by_scale and not lower[0]:
        raise InputError(
            f"by_scale={by_scale}: no run has logged it for each scale; such metrics are, for "
            f"example, {', '.join(SCALE_METRICS)}"
        )

    pyplot = load_pyplot()

    handles = _legend(runs, reference)
    legend_columns = 4 if len(handles) > 5 else 5
    large_rows = -(-len(upper) // LARGE_COLUMNS)
    groups = [upper, *(group for group in lower if group)]
    heights = [large_rows * LARGE_HEIGHT + LEGEND_HEIGHT * (1 + len(handles) // legend_columns)]
    heights += [-(-len(group) // PANEL_COLUMNS) * SMALL_HEIGHT for group in groups[1:]]
    figure = pyplot.figure(figsize=(13, sum(heights)), layout="constrained")
    parts: Any = figure.subfigures(len(groups), 1, squeeze=False, height_ratios=heights)[:, 0]
    parts[0].legend(handles=handles, loc="outside upper center", ncols=legend_columns)
    for part, group in zip(parts, groups, strict=True):
        axes = _large(part, len(group)) if group is upper else _small(part, len(group))
        for panel, axis in zip(group, axes, strict=True):
            _draw(axis, panel, runs, reference)
    with files.atomic_path(out) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    pyplot.close(figure)


def _large(part: Any, count: int) -> list[Any]:
    """Makes the upper axes: in one row the first one is the widest."""
    columns = min(count, LARGE_COLUMNS)
    widths = (3, *[2] * (columns - 1)) if count <= LARGE_COLUMNS else (1,) * columns
    axes = part.subplots(-(-count // columns), columns, width_ratios=widths, squeeze=False)
    return _visible(axes, count)


def _small(part: Any, count: int) -> list[Any]:
    """Makes axes for each scale; rows and columns share theirs."""
    columns = min(count, PANEL_COLUMNS)
    axes = part.subplots(-(-count // columns), columns, sharex=True, sharey=True, squeeze=False)
    for k, axis in enumerate(axes.flat):
        axis.tick_params(labelbottom=k + columns >= count)
    return _visible(axes, count)


def _visible(axes: Any, count: int) -> list[Any]:
    for i, axis in enumerate(axes.flat):
        axis.set_visible(i < count)
    return list(axes.flat[:count])


def _draw(axis: Any, panel: Panel, runs: Sequence[RunLog], reference: PublishedLog | None) -> None:
    """Draws a panel: the curves of its runs, and of the published log if it is comparable."""
    from matplotlib import ticker

    axis.set_title(_without_formulas(panel.title), fontsize=12 if panel.large else 10)
    axis.set_xlabel("images seen" if panel.large else "")
    for i in panel.runs:
        _curves(axis, runs[i], panel.metric, _color(i, len(runs)))
    if reference and any(_comparable(reference, runs[i], panel.metric) for i in panel.runs):
        _reference(axis, reference, panel.metric)
    if reference:
        axis.set_xscale("log")
    else:
        axis.set_xlim(left=0)
    low, high = axis.dataLim.intervaly
    if panel.metric == "loss" and low > 0 and high > 10 * low:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter(ticker.FormatStrFormatter("%g"))
        axis.yaxis.set_minor_formatter(ticker.NullFormatter())
    axis.xaxis.set_major_formatter(ticker.EngFormatter(sep=""))
    axis.grid(alpha=0.25)


def _comparable(reference: PublishedLog, run: RunLog, metric: str) -> bool:
    """Returns whether a published metric measures the same as that of a run, by its config."""
    features = _text(run, "fid", "features")
    if metric in SAMPLE_METRICS and features not in ("", "inception"):
        return False
    return _text(run, "task", "_type") in ("", reference.task)


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
        return Line2D([], [], color=color, label=_without_formulas(label), **style)

    handles = [line(run.name, _color(i, len(runs)), linewidth=3) for i, run in enumerate(runs)]
    dots = {"marker": "o", "markersize": 4, "linestyle": "--", "linewidth": 0.8}
    styles = {"": {}, "eval/": dots, "eval_ema/": dots | {"markerfacecolor": "white"}}
    for kind, label in PREFIX_LABELS.items():
        if any(run.points(kind + "loss")[0].size for run in runs):
            handles.append(line(label, "gray", **styles[kind]))
    if reference:
        handles.append(line(reference.name, "black", marker="D", markersize=4, linestyle=":"))
    return handles


def _without_formulas(text: str) -> str:
    """Escapes dollar signs, between which Matplotlib reads a formula."""
    return text.replace("$", r"\$")


def _running_mean(y: np.ndarray, width: int) -> np.ndarray:
    """Averages up to `width` values on each side, fewer at the steep beginning."""
    sums, i = np.concatenate([[0.0], np.cumsum(y)]), np.arange(len(y))
    reach = np.minimum(width, i // 4)
    start, stop = i - reach, np.minimum(i + reach + 1, len(y))
    return (sums[stop] - sums[start]) / (stop - start)


def _color(i: int, runs: int) -> Any:
    """Returns the color of a run, which no other run has."""
    from matplotlib import colormaps

    return f"C{i}" if runs <= DISTINCT_COLORS else colormaps["turbo"](i / (runs - 1))


def _text(run: RunLog, *path: str) -> str:
    """Returns a setting that is text; "" if a run has none."""
    return value if isinstance(value := run.setting(*path), str) else ""


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
        help="metric of the lower panels (loss_at_scale and perplexity)",
    )
    flags = parser.parse_args(arguments)

    def plot() -> None:
        directories = [run for location in flags.runs for run in _runs_at(location)]
        logs = []
        for directory in directories:
            try:
                logs.append(read_run_log(directory))
            except InputError as error:
                if directory in flags.runs or directory == directories[-1] and not logs:
                    raise
                print(f"note: {directory} is left out: {error}", file=sys.stderr)
        draw_curves(logs, flags.out, PUBLISHED_LOGS.get(flags.reference), flags.by_scale)
        print(f"{flags.out} is written")

    return run_command("varjax plot", plot)
