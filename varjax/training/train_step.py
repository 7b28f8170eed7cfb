"""The two halves of a training step: gradients of a batch, and the update they make."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from varjax.core.errors import InputError
from varjax.core.trees import PyTree
from varjax.training.task import TrainState

Metrics = dict[str, jax.Array]
LossFn = Callable[[PyTree, PyTree], tuple[jax.Array, Metrics]]


def gradients(
    loss_fn: LossFn, params: PyTree, batch: PyTree, accumulate: int = 1
) -> tuple[PyTree, Metrics]:
    """Gradients and metrics of `loss_fn(params, batch) -> (loss, metrics)`, means over the batch.

    The batch (leading axis B on every leaf) is worked off in `accumulate` parts. Whatever is
    random by example must lie in `batch`: then the result does not depend on `accumulate`.
    Raises InputError when `accumulate` does not divide B.
    """
    return over_parts(functools.partial(jax.grad(loss_fn, has_aux=True), params), batch, accumulate)


def over_parts(f: Callable[[PyTree], PyTree], batch: PyTree, accumulate: int = 1) -> PyTree:
    """The mean of `f(part)` over the parts of a batch, each like `gradients` takes it."""
    if accumulate == 1:
        return f(batch)
    size = jax.tree.leaves(batch)[0].shape[0]
    check_parts(size, accumulate)

    def split(x: jax.Array) -> jax.Array:
        # Part i takes every accumulate-th row, so that each device keeps the rows it has.
        return x.reshape(size // accumulate, accumulate, *x.shape[1:]).swapaxes(0, 1)

    def add(total: Any, part: PyTree) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, f(part)), None

    parts = jax.tree.map(split, batch)
    shapes = jax.eval_shape(f, jax.tree.map(lambda x: x[0], parts))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
    total, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda x: x / accumulate, total)


def check_parts(batch_size: int, accumulate: int) -> None:
    """Raises InputError where `gradients` cannot work off a batch in so many parts."""
    if accumulate < 1 or batch_size % accumulate:
        raise InputError(
            f"a batch of {batch_size} cannot be accumulated in {accumulate} equal parts; "
            "set accumulate to a divisor of it"
        )


def start(params: PyTree, tx: optax.GradientTransformation, ema_decay: float = 0.0) -> TrainState:
    """The state before the first step; with an `ema_decay` the average starts at `params`."""
    ema = jax.tree.map(jnp.copy, params) if ema_decay else None
    return TrainState(jnp.int32(0), params, ema, tx.init(params))


def apply(
    state: TrainState, grads: PyTree, tx: optax.GradientTransformation, ema_decay: float = 0.0
) -> tuple[TrainState, Metrics]:
    """The state after one update, and the norms of gradient (unclipped), update and parameters.

    ema <- ema_decay ema + (1 - ema_decay) params, unless `ema_decay` is 0 and `ema` None.
    """
    with jax.numpy_dtype_promotion("standard"):  # Optax raises floats to integer powers
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = optax.incremental_update(params, state.ema, 1 - ema_decay) if ema_decay else None
    norms = {
        "grad_norm": optax.tree.norm(grads),
        "update_norm": optax.tree.norm(updates),
        "param_norm": optax.tree.norm(params),
    }
    return TrainState(state.step + 1, params, ema, opt_state), norms
