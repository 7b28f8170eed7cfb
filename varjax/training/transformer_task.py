"""Code shared by the tasks of all transformers: checks, notes, FLOP, previews."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax import trees
from varjax.checkpoints.weights import (
    RANDOM,
    WeightsDir,
    check_tokenizer,
    open_for_setting,
    open_weights,
)
from varjax.errors import InputError
from varjax.nn.compute import without_repeated_work
from varjax.runtime import flops
from varjax.training.previews import preview_labels
from varjax.training.task import Batch, ImageSampler, Plan, TrainState, ema_notes
from varjax.trees import PyTree


def check_classes(data: int, model: int) -> None:
    """Raises InputError where a dataset has a different number of classes than a model."""
    if data != model:
        raise InputError(
            f"the data has {data} classes, but the model {model}; set task.model.classes={data}, "
            "or train on other data"
        )


def transformer_notes(task: Any, plan: Plan) -> list[str]:
    """Returns notes on class dropout and on the EMA, for `Task.notes`.

    Args:
        task: task with `class_dropout`, `model.classes`, `sampling.guidance`, `ema_decay` and
            `ema_warmup`.
        plan: length of the run.
    """
    notes, guidance, classes = [], np.max(task.sampling.guidance), task.model.classes
    if task.class_dropout == 0 and guidance != 1:
        notes = [
            f"class_dropout is 0, but sampling.guidance is {guidance:g}: guidance uses "
            '"no class", which this run does not train, so samples will be bad unless init_from '
            "has trained it. Set task.class_dropout=0.1, or "
            "task.sampling.guidance=1 for no guidance"
        ]
    elif task.class_dropout == 1 and classes > 1:
        notes = [
            f'class_dropout is 1: every label becomes "no class", so none of the {classes} classes '
            "is trained. Set task.class_dropout=0.1"
        ]
    return notes + ema_notes(task.ema_decay, task.ema_warmup, plan)


def with_tokenizer_of(task: Any, location: str) -> Any:
    """Returns a transformer's task on the tokenizer of the model at `location`; see `Task`.

    If only its settings differ, such as scales for larger images, the task's own is kept.
    """
    if task.tokenizer_weights in (location, RANDOM):
        return task
    weights = open_for_setting("init_from", location)
    try:
        weights.tokenizer_settings()
    except InputError:  # a converted transformer alone
        return task
    try:
        check_tokenizer(weights, task.tokenizer)
    except InputError as error:
        if _same_parameters(weights, task.tokenizer_weights):
            return task
        raise InputError(
            f"init_from={location}: {error}\nSet these fields of task.tokenizer, and those of "
            "task.model that follow from them, to train on its tokenizer; or init_tokenizer=false "
            f"to train on {task.tokenizer_weights}, whose tokens the model has to learn first"
        ) from error
    return dataclasses.replace(task, tokenizer_weights=location)


def _same_parameters(weights: WeightsDir, location: str) -> bool:
    """Returns whether two tokenizers have the same parameters, also under other settings."""
    try:
        other = open_weights(location).read_tokenizer_params()
    except InputError:  # there is none yet
        return False
    return trees.digest(other) == trees.digest(weights.read_tokenizer_params())


def train_flops(task: Any, state: TrainState, frozen: PyTree, batch: Batch) -> int:
    """Counts the model's FLOP in a step of a task with a field `compute`, for `Task.train_flops`.

    Recomputation to save memory does not count.
    """
    plain = dataclasses.replace(task, compute=without_repeated_work(task.compute))
    return flops.count(plain.train_step, state, frozen, batch, jax.random.key(0), Plan())


def preview_samples(
    sampler: ImageSampler, params: PyTree, frozen: PyTree, classes: int
) -> jax.Array:
    """Samples 16 images with fixed random keys: of all classes, or of 16 if there are more."""
    label_N = jnp.asarray(preview_labels(classes))
    index_N = jnp.arange(len(label_N))
    key_N = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), index_N)
    return sampler(params, frozen, label_N, key_N)
