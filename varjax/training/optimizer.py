"""AdamW with the learning rate schedules of VAR (its utils/lr_control.py), and what decays."""

import dataclasses
import math
import re
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from varjax import trees
from varjax.errors import check_setting
from varjax.training.task import Plan
from varjax.trees import PyTree

LRSchedule = Literal["constant", "cos", "lin", "lin0", "lin00", "lin0.5", "exp"]
HOLD_FRACTION = {"lin": 0.15, "lin0": 0.05, "lin00": 0.0, "lin0.5": 0.5, "exp": 0.15}
Step = jax.typing.ArrayLike
# Pattern for the paths of parameters with weight decay: matrices and the class embedding, but no
# biases, norms, positions or codes, as in the references of VAR and of both tokenizers.
DECAYED = r"(kernel|class_embed)$"


@dataclasses.dataclass(frozen=True)
class AdamW:
    """Configures AdamW on clipped gradients, with schedules of learning rate and weight decay.

    The learning rate rises linearly, then follows `schedule` down; weight decay goes from its
    first to its last value on a half cosine. Raises InputError for a value out of range.

        optimizer = AdamW(base_lr=1e-4)
        tx = optimizer.make(Plan(steps=1000, batch_size=768))

    Attributes:
        base_lr: peak learning rate for each 256 images of the batch.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: number added to the root of the second moment.
        weight_decay: weight decay at the first step.
        weight_decay_end: weight decay at the last step; None for `weight_decay`.
        clip: largest global norm of the gradients; 0 for no clipping.
        schedule: shape of the learning rate schedule after the warm-up.
        warmup: fraction of the run in which the learning rate rises.
        warmup_start: learning rate at the first step, as a fraction of the peak.
        end: learning rate at the last step, as a fraction of the peak.
    """

    base_lr: float = 1e-4
    b1: float = 0.9
    b2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.05
    weight_decay_end: float | None = None
    clip: float = 2.0
    schedule: LRSchedule = "lin0"
    warmup: float = 0.02
    warmup_start: float = 0.005
    end: float = 0.01

    def __post_init__(self):
        for name, valid, allowed in (
            ("base_lr", self.base_lr > 0, "above 0"),
            ("b1", 0 <= self.b1 < 1, "at least 0 and below 1"),
            ("b2", 0 <= self.b2 < 1, "at least 0 and below 1"),
            ("eps", self.eps >= 0, "at least 0"),
            ("weight_decay", self.weight_decay >= 0, "at least 0"),
            ("weight_decay_end", (self.weight_decay_end or 0) >= 0, "at least 0, or none"),
            ("clip", self.clip >= 0, "a norm above 0, or 0 for no clipping"),
            ("warmup_start", 0 <= self.warmup_start <= 1, "a fraction of the peak, 0 … 1"),
            ("end", 0 <= self.end <= 1, "a fraction of the peak, 0 … 1"),
            ("end", self.end > 0 or self.schedule != "exp", "above 0 with schedule=exp"),
            ("warmup", 0 <= self.warmup < 1, "a fraction of the run, at least 0 and below 1"),
        ):
            check_setting(name, getattr(self, name), valid, allowed)

    def lr(self, step: Step, plan: Plan) -> Any:
        """Returns the learning rate of update number `step`, from 0: float64, float32 in JAX.

        After the last step of the plan it stays where it is.
        """
        xp, n = _numbers(step, plan)
        warm = round(self.warmup * plan.steps)
        rising = self.warmup_start + (1 - self.warmup_start) * n / max(warm, 1)
        done = (n - warm) / max(plan.steps - 1 - warm, 1)
        peak = self.base_lr * plan.batch_size / 256
        return peak * xp.where(n < warm, rising, self._decay(xp, done))

    def wd(self, step: Step, plan: Plan) -> Any:
        """Returns the weight decay of update number `step`, from 0."""
        xp, n = _numbers(step, plan)
        end = self.weight_decay if self.weight_decay_end is None else self.weight_decay_end
        cosine = 0.5 + 0.5 * xp.cos(math.pi * n / max(plan.steps - 1, 1))
        return end + (self.weight_decay - end) * cosine

    def init(self, params: PyTree) -> optax.OptState:
        """Makes the optimizer's state, which does not depend on the length of the run."""
        return self.make(Plan()).init(params)

    def make(self, plan: Plan, decayed: str = DECAYED) -> optax.GradientTransformation:
        """Makes the Optax transformation.

        Args:
            plan: length of the run, for the schedules.
            decayed: regular expression for the paths of parameters with weight decay.
        """

        def mask(params: PyTree) -> PyTree:
            return trees.map_with_path(lambda path, _: bool(re.search(decayed, path)), params)

        return optax.chain(
            optax.clip_by_global_norm(self.clip) if self.clip else optax.identity(),
            optax.scale_by_adam(self.b1, self.b2, self.eps),
            optax.add_decayed_weights(lambda count: self.wd(count, plan), mask=mask),
            optax.scale_by_learning_rate(lambda count: self.lr(count, plan)),
        )

    def updates(self, opt_state: Any) -> jax.Array:
        """Returns the number of updates so far, in which skipped steps do not count."""
        _, adam, *_ = opt_state
        return adam.count

    def _decay(self, xp: Any, done: Any) -> Any:
        """Returns the fraction of the peak when a fraction `done` of the decay is over."""
        end, rest = self.end, 1 - done
        if self.schedule == "constant":
            return xp.ones_like(done)
        if self.schedule == "cos":
            return end + (1 - end) * (0.5 + 0.5 * xp.cos(math.pi * done))
        hold = HOLD_FRACTION[self.schedule]
        if self.schedule == "exp":
            return xp.where(done < hold, 1.0, xp.exp((done - hold) / (1 - hold) * math.log(end)))
        if self.schedule == "lin0.5":  # halfway to where "lin" would be, then down to the end
            middle = (1 + end + (1 - end) * (1 - hold)) / 2
            falling = 1 + (middle - 1) * done / hold
            return xp.where(done < hold, falling, end + (middle - end) * rest / (1 - hold))
        return xp.where(done < hold, 1.0, end + (1 - end) * rest / (1 - hold))


def _numbers(step: Step, plan: Plan) -> tuple[Any, Any]:
    """Returns NumPy or JAX, and the number of the update, at most that of the plan's last one.

    A discriminator that trained before a fork to a longer run has more updates than its plan.
    """
    last = max(plan.steps - 1, 0)
    if isinstance(step, jax.Array):
        return jnp, jnp.minimum(step.astype(jnp.float32), last)
    return np, np.minimum(np.asarray(step, np.float64), last)
