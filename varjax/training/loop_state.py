"""State of the loop that survives a restart: the last evaluation, and the best one."""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

from varjax.errors import InputError, did_you_mean

# Parts of the names of metrics that should grow, unless the user sets the direction. A tokenizer's
# "perplexity" is that of its codes; a transformer's "perplexity_at_scale" should fall.
HIGHER_IS_BETTER = re.compile(
    r"accuracy|psnr|ssim|usage|code_perplexity|perplexity(?!_at_scale)|inception_score"
)


def parse_keep_best(keep_best: str) -> tuple[str, bool]:
    """Splits "max:NAME", "min:NAME" or "NAME" into the metric's name and whether it should grow."""
    direction, _, metric = keep_best.rpartition(":")
    if direction in ("max", "min"):
        return metric, direction == "max"
    return keep_best, HIGHER_IS_BETTER.search(keep_best) is not None


def check_keep_best(keep_best: str, names: Iterable[str]) -> None:
    """Raises InputError if `keep_best` is not among the names of an evaluation's metrics."""
    metric, _ = parse_keep_best(keep_best)
    if metric and metric not in names:
        raise InputError(
            f"keep_best is {keep_best!r}, but an evaluation gives {[*names]}"
            f"{did_you_mean(metric, names)}"
        )


@dataclasses.dataclass
class LoopState:
    """Keeps the last evaluation, and the best one by the metric `keep_best`.

    A checkpoint stores it as its `meta`.

    Attributes:
        keep_best: setting of the experiment, "" for none.
        measured_with: settings that values of that metric depend on (`Experiment.best_settings`).
        best: best value of that metric, None before the first.
        evaluations_since_best: number of evaluations since the best one.
        metrics: all metrics of the last evaluation.
        evaluation_due: whether a signal arrived before this step's evaluation and previews.
        skipped_steps: number of steps skipped because their gradients were not finite.
        skipped_in_row: number of these that are the most recent steps.
    """

    keep_best: str = ""
    best: float | None = None
    evaluations_since_best: int = 0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    evaluation_due: bool = False
    skipped_steps: int = 0
    skipped_in_row: int = 0
    measured_with: dict[str, Any] = dataclasses.field(default_factory=dict)

    def to_meta(self) -> dict:
        """Returns JSON data for `from_meta`; what few runs have is left out."""
        meta = dataclasses.asdict(self)
        return {k: v for k, v in meta.items() if v or not k.startswith(("skipped_", "measured_"))}

    @classmethod
    def from_meta(cls, meta: dict, keep_best: str, measured_with: dict[str, Any]) -> "LoopState":
        """Reads a checkpoint's `meta`; starts without a best value if values would not compare.

        Args:
            meta: result of `to_meta`.
            keep_best: setting of the experiment now.
            measured_with: settings that values depend on now.
        """
        known = {field.name for field in dataclasses.fields(cls)}  # other versions may have more
        state = cls(**{name: value for name, value in meta.items() if name in known})
        before = measured_with | state.measured_with  # checkpoints of older versions lack some
        if (state.keep_best, before) != (keep_best, measured_with):
            state = dataclasses.replace(state, best=None, evaluations_since_best=0)
        return dataclasses.replace(state, keep_best=keep_best, measured_with=measured_with)

    def update(self, metrics: dict[str, float]) -> bool:
        """Records an evaluation; returns whether it is the best so far."""
        self.metrics = metrics
        if not self.keep_best:
            return False
        name, higher_is_better = parse_keep_best(self.keep_best)
        value, sign = metrics[name], -1 if higher_is_better else 1
        if math.isfinite(value) and (self.best is None or sign * value < sign * self.best):
            self.best, self.evaluations_since_best = value, 0
            return True
        self.evaluations_since_best += 1
        return False

    def count_step(self, skipped: bool) -> None:
        """Counts a step as skipped or not skipped."""
        self.skipped_steps += skipped
        self.skipped_in_row = self.skipped_in_row + 1 if skipped else 0

    def is_finished(self, step: int, steps: int, patience: int) -> bool:
        """Returns whether the run ends with this step, with its evaluation done.

        Args:
            step: number of updates done.
            steps: length of the run in updates.
            patience: number of evaluations without a better one that end it early; 0 for never.
        """
        if self.evaluation_due:
            return False
        return step == steps or 0 < patience <= self.evaluations_since_best
