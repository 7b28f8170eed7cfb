"""Formats the metrics of an evaluation for people: a line, or a short table."""

import math
from collections.abc import Mapping

from varjax.runtime.text_table import table_lines

KINDS = {"eval": "held out", "eval_ema": "EMA weights"}
HEADLINES = ("loss", "accuracy", "psnr", "fid", "inception_score")  # shown first, in this order


def results_line(metrics: Mapping[str, float], training_loss: float = math.nan) -> str:
    """Formats the most important metrics of an evaluation.

        "loss 3.26, accuracy 0.0942; EMA weights: loss 3.86, accuracy 0.122; training loss 3.2"

    Args:
        metrics: numbers by name, such as "eval/loss" and "eval_ema/loss".
        training_loss: loss of the last training step; NaN leaves it out.
    """
    parts = []
    for kind, numbers in _by_kind(metrics).items():
        shown = ", ".join(f"{name} {numbers[name]:.4g}" for name in HEADLINES if name in numbers)
        if shown:
            parts.append(shown if kind == "eval" else f"{KINDS[kind]}: {shown}")
    if not math.isnan(training_loss):
        parts.append(f"training loss {training_loss:.4g}")
    return "; ".join(parts)


def results_table(metrics: Mapping[str, float]) -> str:
    """Formats the metrics that are single numbers as a table: a row each, a column for each kind.

    Those of each scale or noise level, such as "eval/loss_at_scale/0", are left out.
    """
    columns = _by_kind(metrics)
    names = dict.fromkeys(name for numbers in columns.values() for name in numbers)
    ordered = [name for name in HEADLINES if name in names]
    ordered += [name for name in names if name not in HEADLINES and "/" not in name]
    rows = [["", *(KINDS[kind] for kind in columns)]]
    for name in ordered:
        cells = (columns[kind].get(name, math.nan) for kind in columns)
        rows.append([name, *("" if math.isnan(x) else f"{x:.4g}" for x in cells)])
    return "\n".join(table_lines(rows, left=1))


def _by_kind(metrics: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Returns {"eval": {"loss": …}, "eval_ema": …}, without kinds that are absent."""
    kinds = {kind: f"{kind}/" for kind in KINDS}
    found = {
        kind: {
            name.removeprefix(prefix): value
            for name, value in metrics.items()
            if name.startswith(prefix)
        }
        for kind, prefix in kinds.items()
    }
    return {kind: numbers for kind, numbers in found.items() if numbers}
