"""The contract between a model family and the training loop."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax

from varjax.core.errors import InputError
from varjax.core.trees import PyTree

Batch = dict[str, jax.Array]
Rows = dict[str, tuple[Sequence[int], Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """The length of a run, which schedules need; the loop fills it in."""

    steps: int = 1
    batch_size: int = 256


@flax.struct.dataclass
class TrainState:
    """All that a step changes. `step` counts the updates done (int32 scalar); `ema` may be None."""

    step: jax.Array
    params: PyTree
    ema: PyTree
    opt_state: PyTree


class Task(Protocol):
    """What is trained: a frozen dataclass of settings with pure methods, which the loop jits.

    `batch` is {"image_BHWC": uint8, "label_B": int32}; in evaluation also {"valid_B": bool}, False
    for rows to leave out. Instead of images it holds {"tokens_BL": int32} where the data are those
    of `tokenized_by`.
    """

    @property
    def plan(self) -> Plan:
        """A field `plan: Plan = Plan()`, which the loop replaces by the run's own."""
        ...

    def check(self, image_shape: tuple[int, int, int], classes: int) -> None:
        """Raises InputError where such a dataset or `plan` does not suit; before any long work.

        image_shape: (H, W, channels). classes: labels are below it.
        """
        ...

    def init(self, key: jax.Array) -> TrainState:
        """The state before the first step."""
        ...

    def pretrained(self, location: str) -> tuple[PyTree, Rows]:
        """Parameters that a run may start from, of a run (averaged if it averages) or converted.

        They may be of other sizes than `init`'s. Where only some rows (entries of the first axis)
        of a parameter mean the same here and there, its path names them: (rows here, rows there).
        Raises InputError that says what `location` lacks.
        """
        ...

    def frozen(self) -> PyTree:
        """Nested dicts of the pretrained weights that the steps need and do not train, or {}.

        Called once, at the start of a run; the run keeps its own copy.
        """
        ...

    def tokenized_by(self, frozen: PyTree) -> dict[str, Any]:
        """What identifies the tokenizer whose tokens it trains on, as flat JSON data.

        {} for a task that takes images only.
        """
        ...

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update. `key` is the run's: fold `state.step` into it.

        Metrics are scalars or 1-D arrays; one that is not finite stops the run.
        """
        ...

    def train_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        """Model FLOP of a `train_step` on arrays of these shapes; nothing is computed.

        `flops.count`, without what the backward pass computes a second time to save memory.
        """
        ...

    def eval_step(self, state: TrainState, frozen: PyTree, batch: Batch) -> PyTree:
        """Arrays that add over batches, from `state.params` and the valid rows of `batch`."""
        ...

    def eval_metrics(self, sums: PyTree) -> dict[str, Any]:
        """Floats or 1-D arrays from the added results of `eval_step`, as NumPy arrays."""
        ...

    def preview(self, state: TrainState, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Images to look at by name, in [0, 1]; {} for none.

        (N, H, W, C), or (rows, columns, H, W, C) where the arrangement says something.
        """
        ...


def check_tokens(task: Task, frozen: PyTree, tokenized_by: Mapping[str, Any] | None) -> None:
    """Raises InputError, with all differences, for tokens that are not what `task` trains on.

    tokenized_by: the `Task.tokenized_by` of what made them; None for images.
    """
    if (there := tokenized_by) is None:
        return
    if not (here := task.tokenized_by(frozen)):
        raise InputError(f"a {type(task).__name__} trains on images, but the data are tokens")
    names = [name for name in dict.fromkeys((*there, *here)) if there.get(name) != here.get(name)]
    if lines := [f"{name}: {there.get(name)} theirs, {here.get(name)} here" for name in names]:
        raise InputError(
            "the tokens are another tokenizer's:\n  "
            + "\n  ".join(lines)
            + "\nmake them anew by python -m varjax.data.cache_latents, or use that tokenizer"
        )
