"""The two halves of a training step: gradients of a batch, and the update made from them."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from varjax.errors import InputError
from varjax.nn.compute import split_batch
from varjax.training.optimizer import DECAYED, AdamW
from varjax.training.task import Batch, Plan, TrainState
from varjax.trees import PyTree

Metrics = dict[str, jax.Array]
StepFn = Callable[[TrainState, PyTree, Batch, jax.Array], tuple[TrainState, Metrics]]
LossFn = Callable[[PyTree, PyTree], tuple[jax.Array, Metrics]]


SKIPPED = "skipped"  # a metric: whether this step was skipped
DECISIVE_METRICS = ("loss", "grad_norm")


def create_state(params: PyTree, optimizer: AdamW, ema_decay: float = 0.0) -> TrainState:
    """Makes the state before the first step.

    Args:
        params: initial parameters, with which the EMA starts.
        optimizer: optimizer of the parameters.
        ema_decay: decay of the EMA; 0 for a state without one.
    """
    ema = jax.tree.map(jnp.copy, params) if ema_decay else None
    return TrainState(jnp.int32(0), params, ema, optimizer.init(params))


def accumulated_gradients(
    loss_fn: LossFn, params: PyTree, batch: PyTree, accumulate: int = 1
) -> tuple[PyTree, Metrics]:
    """Differentiates a loss over a batch, one microbatch at a time.

    Args:
        loss_fn: (params, batch) -> (loss, metrics), each the mean over the examples of the batch.
        params: parameters to differentiate with respect to.
        batch: arrays with a leading axis B. Per-example randomness must be part of it, so that the
            result does not depend on `accumulate`.
        accumulate: the number of microbatches.

    Returns:
        (gradients, metrics): means over the batch.

    Raises:
        InputError: `accumulate` does not divide B.
    """
    gradients = functools.partial(jax.grad(loss_fn, has_aux=True), params)
    return mean_over_microbatches(gradients, batch, accumulate)


def mean_over_microbatches(
    function: Callable[[PyTree], PyTree], batch: PyTree, accumulate: int = 1
) -> PyTree:
    """Averages `function(microbatch)` over `accumulate` microbatches of a batch, in a scan.

    Raises InputError where `accumulate` does not divide the batch.
    """
    total = sum_over_microbatches(function, batch, accumulate)
    return total if accumulate == 1 else jax.tree.map(lambda x: x / accumulate, total)


def sum_over_microbatches(
    function: Callable[[PyTree], PyTree], batch: PyTree, accumulate: int = 1
) -> PyTree:
    """Adds `function(microbatch)` over `accumulate` microbatches of a batch, in a scan.

    Raises InputError where `accumulate` does not divide the batch.
    """
    if accumulate == 1:
        return function(batch)
    size = jax.tree.leaves(batch)[0].shape[0]
    check_microbatches(size, accumulate)

    def add(total: Any, microbatch: PyTree) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, function(microbatch)), None

    microbatches = jax.tree.map(lambda x: split_batch(x, accumulate), batch)
    shapes = jax.eval_shape(function, jax.tree.map(lambda x: x[0], microbatches))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    return jax.lax.scan(add, zeros, microbatches)[0]


def example_keys(key: jax.Array, count: int) -> jax.Array:
    """Makes a random key for each example of a batch, so that no result depends on microbatches."""
    return jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(count))


def check_microbatches(batch_size: int, accumulate: int) -> None:
    """Raises InputError unless `accumulate` microbatches divide a batch equally."""
    if accumulate < 1 or batch_size % accumulate:
        raise InputError(
            f"a batch of {batch_size} cannot be split into {accumulate} equal microbatches; "
            "set accumulate to a divisor of it"
        )


@jax.named_scope("optimizer")  # its name in profiles and in `varjax benchmark tpu`
def apply_gradients(
    state: TrainState,
    grads: PyTree,
    optimizer: AdamW,
    plan: Plan,
    ema_decay: float = 0.0,
    decayed: str = DECAYED,
    ema_warmup: bool = False,
) -> tuple[TrainState, Metrics]:
    """Updates parameters, optimizer and average.

    Args:
        state: state before the update.
        grads: gradients, not yet clipped.
        optimizer: optimizer of the parameters.
        plan: length of the run, for the optimizer's schedules.
        ema_decay: decay d in ema <- d·ema + (1-d)·params; 0 if `state.ema` is None.
        decayed: regular expression for the paths of parameters with weight decay.
        ema_warmup: whether d starts low and rises to `ema_decay`, as `warmed_up_decay` does.

    Returns:
        The state after the update, and metrics: the learning rate "lr", and the global norms
        "grad_norm" (before clipping), "update_norm" and "param_norm".
    """
    tx = optimizer.make(plan, decayed)
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None
    if ema_decay:
        decay = warmed_up_decay(ema_decay, state.step) if ema_warmup else ema_decay
        ema = optax.incremental_update(params, state.ema, 1 - decay)
    metrics = {
        "lr": optimizer.lr(optimizer.updates(state.opt_state), plan),
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(params),
    }
    return TrainState(state.step + 1, params, ema, opt_state), metrics


def warmed_up_decay(ema_decay: float, step: jax.Array) -> jax.Array:
    """Computes the decay of an average that soon forgets the initial parameters.

    It is min(ema_decay, (1 + t) / (10 + t)) after t updates, as in TensorFlow's
    `ExponentialMovingAverage(decay, num_updates)`: the EMA covers about the last tenth of the
    updates so far, until that is as long as `ema_decay` asks for.

    Args:
        ema_decay: value to which the decay rises.
        step: number t of updates before this one.
    """
    t = step.astype(jnp.float32)
    return jnp.minimum(jnp.float32(ema_decay), (1 + t) / (10 + t))


def skip_nonfinite_updates(train_step: StepFn) -> StepFn:
    """Wraps a `Task.train_step` so that updates with gradients that are not finite are skipped.

    A skipped step changes only `state.step`. The metrics "loss" and "grad_norm" of every optimizer
    ("discriminator/grad_norm") decide. They do not depend on the new state, so most of it can still
    reuse the memory of the old one; on a CPU, up to two more copies of the parameters are needed.

    The first step is never skipped, because what a task does only then, such as k-means of a
    tokenizer's codes, would be lost.

    Returns:
        The step, with the additional metric SKIPPED: 1 if it was skipped, else 0.
    """

    def step(state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array):
        updated, metrics = train_step(state, frozen, batch, key)
        by_name = {name: name.rpartition("/")[2] for name in metrics}
        if "grad_norm" not in by_name.values():
            raise InputError("skip_nonfinite is set, but this task has no metric grad_norm")
        checked = [metrics[name] for name, last in by_name.items() if last in DECISIVE_METRICS]
        finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in checked]))
        finite = finite | (state.step == 0)
        kept = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, state)
        skipped = 1 - finite.astype(jnp.float32)
        return kept.replace(step=updated.step), metrics | {SKIPPED: skipped}

    return step
