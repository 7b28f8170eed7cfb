"""Finds the license under which a model's weights are published."""

from collections.abc import Mapping
from typing import Any

from varjax.checkpoints.weights import WeightsDir, find_weights, open_weights, split_step
from varjax.storage import files


def license_of(weights: WeightsDir) -> dict[str, str]:
    """Returns {"license": …} of published weights, or of those that a run started from, or {}.

    A run says it itself, but not one of an older version, which only names what it started from.
    """
    seen = set()
    while (
        weights.task
        and not weights.config.get("license")
        and (start := _start(weights.config))
        and start not in seen
    ):
        seen.add(start)  # runs that were made again may name each other
        if not files.exists(find_weights(start) / "config.json"):
            break
        weights = open_weights(start)
    text = weights.config.get("license")
    return {"license": text} if isinstance(text, str) and text else {}


def _start(config: Mapping[str, Any]) -> str:
    """Returns the run or weights that a run started from, without the step; "" for none."""
    start = config.get("init_from") or config.get("fork_from") or ""
    return str(split_step(start)[0])
