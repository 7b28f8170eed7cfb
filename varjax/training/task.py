"""The contract between a model family and the training loop."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax

from varjax.errors import InputError
from varjax.trees import PyTree

PREVIEW_IMAGES = 8  # columns of a preview
MAX_FIRST_SHARE = 0.1  # of the first parameters in the last average, without a note

# By name: "image_BHWC" uint8 (or latents such as "tokens_BL" int32), "label_B" int32 and, in
# evaluation, "valid_B" bool, False for rows that only fill up the last batch.
Batch = dict[str, jax.Array]

# By parameter path: (rows here, rows there), entries of the first axis that mean the same.
MatchingRows = dict[str, tuple[Sequence[int], Sequence[int]]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the length of a run, which schedules need; the loop fills it in.

    Attributes:
        steps: length of the run in updates.
        batch_size: images in an update.
    """

    steps: int = 1
    batch_size: int = 256


@flax.struct.dataclass
class TrainState:
    """Holds all arrays that a step changes.

    Attributes:
        step: number of updates done, an int32 scalar.
        params: parameters of the model, float32.
        ema: exponential moving average of the parameters, or None.
        opt_state: state of the optimizer, and whatever else a task keeps from step to step.
    """

    step: jax.Array
    params: PyTree
    ema: PyTree
    opt_state: PyTree


# (params, frozen, label_B, key_B) -> images (B, H, W, C) in [0, 1], each from its own key.
ImageSampler = Callable[[PyTree, PyTree, jax.Array, jax.Array], jax.Array]


class Task(Protocol):
    """Describes what is trained: a frozen dataclass of settings with pure methods.

    The loop compiles the methods and knows no model. A family implements this once, as
    `var.task.VARTask` does.
    """

    @property
    def plan(self) -> Plan:
        """A field `plan: Plan = Plan()`, which the loop replaces by the run's own."""
        ...

    @property
    def accumulate(self) -> int:
        """A field: the number of microbatches that a batch is worked off in.

        `train_step` does so by itself; the loop gives `eval_step` one microbatch at a time.
        """
        ...

    def check(self, image_shape: tuple[int, int, int], classes: int) -> None:
        """Raises InputError where a dataset or `plan` does not suit, before any long work.

        Args:
            image_shape: (H, W, channels) of an image.
            classes: number of classes; labels are below it.
        """
        ...

    def notes(self) -> list[str]:
        """Returns a line for each setting that is allowed but can hardly be meant.

        The loop prints them at the start; `plan` is filled in.
        """
        ...

    def init(self, key: jax.Array) -> TrainState:
        """Makes the state before the first step."""
        ...

    def pretrained(self, location: str) -> tuple[PyTree, MatchingRows]:
        """Reads parameters that a run may start from; they may be of other sizes than `init`'s.

        Args:
            location: run, whose average is read if it has one, or converted directory.

        Returns:
            The parameters, and for those of which only some rows mean the same here, which.

        Raises:
            InputError: says what `location` lacks.
        """
        ...

    def frozen(self) -> PyTree:
        """Reads the pretrained weights that the steps need and do not train: nested dicts, or {}.

        Called once, at the start of a run; the run keeps its own copy.
        """
        ...

    def tokenizer_identity(self, frozen: PyTree) -> dict[str, Any]:
        """Returns flat JSON data that identify the tokenizer of its latents.

        {} for a task that takes images only.
        """
        ...

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one update.

        Args:
            state: state before the step.
            frozen: pretrained weights, from `frozen`.
            batch: batch of training examples.
            key: random key of the run; fold `state.step` into it.

        Returns:
            The state after it, and metrics: scalars or 1-D arrays, of which one that is not finite
            stops the run. The norms of gradients are called "grad_norm" or ".../grad_norm".
        """
        ...

    def train_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        """Counts the model's FLOP in a `train_step` on arrays of these shapes (`flops.count`).

        What the backward pass computes a second time to save memory does not count.
        """
        ...

    def eval_step(self, state: TrainState, frozen: PyTree, batch: Batch) -> PyTree:
        """Computes arrays that add over batches, from `state.params` and a batch's valid rows."""
        ...

    def eval_metrics(self, sums: PyTree) -> dict[str, Any]:
        """Turns the added results of `eval_step` (NumPy arrays) into floats or 1-D arrays."""
        ...

    def preview(self, state: TrainState, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Makes images to look at, in [0, 1], by name; {} for none.

        Each is (N, H, W, C), or (rows, columns, H, W, C) where the arrangement says something.
        """
        ...

    def sampler(self) -> ImageSampler | None:
        """Returns what draws images of given classes, for FID; None for a task that draws none."""
        ...


def evaluated_parameters(state: TrainState) -> dict[str, PyTree]:
    """Returns the parameters to evaluate, by the first part of their metrics' names."""
    return {"eval": state.params} | ({} if state.ema is None else {"eval_ema": state.ema})


def check_classes(data: int, model: int) -> None:
    """Raises InputError where data have another number of classes than the model of a task."""
    if data != model:
        raise InputError(
            f"the data has {data} classes, but the model {model}; set task.model.classes={data}, "
            "or train on other data"
        )


def class_dropout_notes(class_dropout: float, classes: int, cfg: float, off: float) -> list[str]:
    """Returns notes on labels and "no class" that a run never trains, for `Task.notes`.

    Args:
        class_dropout: fraction of labels that become "no class".
        classes: number of classes.
        cfg: guidance scale that the run samples with.
        off: guidance scale that means no guidance.
    """
    if class_dropout == 0 and cfg != off:
        return [
            f"class_dropout is 0, but sampling.cfg is {cfg:g}: guidance uses "
            '"no class", which this run does not train, so samples will be bad unless init_from '
            "has trained it. Set task.class_dropout=0.1, or "
            f"task.sampling.cfg={off:g} for no guidance"
        ]
    if class_dropout == 1 and classes > 1:
        return [
            f'class_dropout is 1: every label becomes "no class", so none of the {classes} classes '
            "is trained. Set task.class_dropout=0.1"
        ]
    return []


def ema_notes(ema: float, plan: Plan) -> list[str]:
    """Returns a note on an average that a run is too short for, for `Task.notes`.

    Args:
        ema: decay of the average; 0 for no average.
        plan: length of the run.
    """
    if (first := ema**plan.steps) < MAX_FIRST_SHARE:
        return []
    return [
        f"ema is {ema:g}, but the run has {plan.steps:,} steps: in the end {first:.0%} of the "
        "average are still the parameters that the run began with, and samples come from the "
        f"average. Set task.ema_decay={max(1 - 5 / plan.steps, 0):.4g}"
    ]


def check_latents(task: Task, frozen: PyTree, tokenizer_identity: Mapping[str, Any] | None) -> None:
    """Checks that latents are those that a task trains on.

    Args:
        task: task to train.
        frozen: pretrained weights of the task.
        tokenizer_identity: `Task.tokenizer_identity` of the tokenizer that made the latents; None
            for images.

    Raises:
        InputError: with all differences.
    """
    if (there := tokenizer_identity) is None:
        return
    if not (here := task.tokenizer_identity(frozen)):
        raise InputError(f"a {type(task).__name__} trains on images, but the data are latents")
    names = [name for name in dict.fromkeys((*there, *here)) if there.get(name) != here.get(name)]
    if lines := [f"{name}: {there.get(name)} theirs, {here.get(name)} here" for name in names]:
        raise InputError(
            "the latents are another tokenizer's:\n  "
            + "\n  ".join(lines)
            + "\nmake them anew by varjax cache-latents, or use that tokenizer"
        )
