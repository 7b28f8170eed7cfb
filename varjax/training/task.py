"""The contract between a model family and the training loop."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import flax.struct
import jax

from varjax.errors import InputError
from varjax.storage.untrusted import differences
from varjax.trees import PyTree

MAX_INITIAL_FRACTION = (
    0.1  # of the initial parameters in the final average; above it, a note is printed
)

# By name: "image_BHWC" uint8 (or latents such as "tokens_BL" int32), "label_B" int32 and, in
# evaluation, "valid_B" bool, False for rows that only fill up the last batch.
Batch = dict[str, jax.Array]

# By parameter path: (rows here, rows there), entries of the first axis that mean the same.
MatchingRows = dict[str, tuple[Sequence[int], Sequence[int]]]


@jax.tree_util.register_static  # so that jitted functions can take one: a constant to them
@dataclasses.dataclass(frozen=True)
class Plan:
    """Holds the length of a run, which schedules depend on.

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
        opt_state: state of the optimizer, and anything else that a task keeps between steps.
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
    def accumulate(self) -> int:
        """A field: the number of microbatches that a batch is split into.

        `train_step` splits its batch itself; the loop passes `eval_step` one microbatch at a time.
        """
        ...

    def check(self, image_shape: tuple[int, int, int], classes: int) -> None:
        """Raises InputError if a dataset does not fit, before any long work.

        Args:
            image_shape: (H, W, channels) of an image.
            classes: number of classes; labels are below it.
        """
        ...

    def notes(self, plan: Plan) -> list[str]:
        """Returns a line for each setting that is allowed but probably a mistake in such a run."""
        ...

    def init(self, key: jax.Array) -> TrainState:
        """Makes the state before the first step."""
        ...

    def pretrained(self, location: str) -> tuple[PyTree, MatchingRows]:
        """Reads parameters that a run may start from; their shapes may differ from `init`.

        Args:
            location: run, whose average is read if it has one, or converted directory.

        Returns:
            The parameters, and for those that match only in part, the matching rows.

        Raises:
            InputError: `location` lacks something.
        """
        ...

    def with_tokenizer_of(self, location: str) -> "Task":
        """Returns this task on the frozen tokenizer of a model that a run starts from.

        It is this task itself if it has no frozen tokenizer, or if the model comes without one.

        Args:
            location: run or converted directory of the model.

        Raises:
            InputError: that tokenizer does not fit this task, or `location` lacks something.
        """
        ...

    def frozen(self) -> PyTree:
        """Reads the pretrained weights that the steps need and do not train: nested dicts, or {}.

        Called once, at the start of a run; the run keeps its own copy.
        """
        ...

    def tokenizer_identity(self, frozen: PyTree) -> dict[str, Any]:
        """Returns flat JSON data that identifies the tokenizer of the task's latents.

        {} for a task that takes images only.
        """
        ...

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array, plan: Plan
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Makes one update.

        Args:
            state: state before the step.
            frozen: pretrained weights, from `frozen`.
            batch: batch of training examples.
            key: random key of the run; fold `state.step` into it.
            plan: length of the run.

        Returns:
            The state after the update, and metrics: scalars or 1-D arrays. A metric that is not
            finite stops the run. Norms of gradients are called "grad_norm" or ".../grad_norm".
        """
        ...

    def train_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        """Counts the model's FLOP in a `train_step` on arrays of these shapes (`flops.count`).

        Recomputation in the backward pass to save memory does not count.
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

        Images are (N, H, W, C); "samples" show `preview_labels`. Originals with their
        reconstructions below are (rows, columns, H, W, C); see `reconstruction_names`.
        """
        ...

    def sampler(self) -> ImageSampler | None:
        """Returns a function that draws images of given classes, for FID; None without one."""
        ...


def evaluated_parameters(state: TrainState) -> dict[str, PyTree]:
    """Returns the parameters to evaluate, by the first part of their metrics' names."""
    return {"eval": state.params} | ({} if state.ema is None else {"eval_ema": state.ema})


def ema_notes(ema_decay: float, ema_warmup: bool, plan: Plan) -> list[str]:
    """Returns a note if a run is too short for its EMA, for `Task.notes`.

    Args:
        ema_decay: decay of the EMA; 0 for no EMA.
        ema_warmup: whether the decay starts low, so that a run of any length is long enough.
        plan: length of the run.
    """
    if ema_warmup:
        return []
    if (initial := ema_decay**plan.steps) < MAX_INITIAL_FRACTION:
        return []
    return [
        f"ema_decay is {ema_decay:g}, but the run has {plan.steps:,} steps: at its end "
        f"{initial:.0%} of the EMA weights are still the initial parameters, and samples use them. "
        f"Set task.ema_warmup=true or task.ema_decay={max(1 - 5 / plan.steps, 0):.4g}"
    ]


def check_latents(task: Task, frozen: PyTree, tokenizer_identity: Mapping[str, Any] | None) -> None:
    """Checks that latents come from the tokenizer that a task trains on.

    Args:
        task: task to train.
        frozen: pretrained weights of the task.
        tokenizer_identity: `Task.tokenizer_identity` of the tokenizer that made the latents; None
            for images.

    Raises:
        InputError: they do not; lists all differences.
    """
    if tokenizer_identity is None:
        return
    if not (expected := task.tokenizer_identity(frozen)):
        raise InputError(f"a {type(task).__name__} trains on images, but the data are latents")
    if lines := differences(tokenizer_identity, expected, "in the data", "in this task"):
        raise InputError(
            "the latents were made by a different tokenizer:\n  "
            + "\n  ".join(lines)
            + "\nmake them again with varjax cache-latents, or use that tokenizer"
        )
