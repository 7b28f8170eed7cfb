"""What the loop itself remembers over a restart, stored as a checkpoint's `meta`."""

import dataclasses
import math


@dataclasses.dataclass
class Record:
    """The last evaluation, and the best one by the metric `keep_best`."""

    keep_best: str = ""
    best: float | None = None
    stale: int = 0  # evaluations since the best one
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    pending: bool = False  # a signal came before this step's evaluation and previews

    @classmethod
    def of(cls, meta: dict, keep_best: str) -> "Record":
        """From a checkpoint; another metric than the run's so far starts without a best."""
        known = {field.name for field in dataclasses.fields(cls)}  # of whatever version it is
        record = cls(**{name: value for name, value in meta.items() if name in known})
        if record.keep_best != keep_best:
            record = dataclasses.replace(record, keep_best=keep_best, best=None, stale=0)
        return record

    def improves(self, metrics: dict[str, float]) -> bool:
        """Takes note of an evaluation; whether it is the best so far."""
        self.metrics = metrics
        if not self.keep_best:
            return False
        value = metrics[self.keep_best]
        better = math.isfinite(value) and (self.best is None or value < self.best)
        self.best, self.stale = (value, 0) if better else (self.best, self.stale + 1)
        return better

    def over(self, step: int, steps: int, patience: int) -> bool:
        """Whether the run ends with this `step`, all that belongs to it done."""
        return not self.pending and (step == steps or 0 < patience <= self.stale)
