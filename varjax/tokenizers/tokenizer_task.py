"""What the tasks of all tokenizers share: settings, the discriminator, and where its state is kept.

A train state's `params` are those of the tokenizer alone, so that its parameters and their average
can be read like any tokenizer's. The discriminator and everything else are in `opt_state`.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import jax

from varjax.checkpoints.weights import open_for_setting
from varjax.errors import check_setting
from varjax.nn.compute import ComputeConfig
from varjax.nn.rng import InitStream, stream_key
from varjax.tokenizers.contract import check_image_shape
from varjax.tokenizers.losses.gan import (
    DiscriminatorState,
    LecamEma,
    create_discriminator,
    update_discriminator,
)
from varjax.tokenizers.losses.image_losses import (
    ImageGradientsFn,
    ImageLossConfig,
    LossGradients,
    loss_gradients,
)
from varjax.tokenizers.losses.lpips import check_lpips_images, load_lpips
from varjax.training.optimizer import AdamW
from varjax.training.task import Batch, MatchingRows, Plan, TrainState, ema_notes
from varjax.training.train_step import Metrics, apply_gradients, create_state, example_keys
from varjax.trees import PyTree

TOKENIZER = "tokenizer"  # name of the tokenizer's optimizer state next to the other parts


class TokenizerTask(ImageLossConfig, Protocol):
    """Names the settings that all tokenizers are trained with."""

    @property
    def optimizer(self) -> AdamW: ...
    @property
    def ema_decay(self) -> float: ...
    @property
    def ema_warmup(self) -> bool: ...


def check_decay_and_weights(task: TokenizerTask, *weights: str) -> None:
    """Raises InputError where `ema_decay` or a loss's weight, named by its field, is invalid."""
    check_setting("ema_decay", task.ema_decay, 0 <= task.ema_decay <= 1, "in [0, 1]")
    for name in weights:
        value = getattr(task, name)
        check_setting(name, value, value >= 0, "0 (off) or more")


def check_images(task: TokenizerTask, image_shape: tuple[int, int, int], classes: int) -> None:
    """Raises InputError where images do not suit a task's model and losses, for `Task.check`.

    Args:
        task: task to train.
        image_shape: (H, W, channels) of an image.
        classes: number of classes, which tokenizers do not use.
    """
    check_image_shape(task.model, image_shape)
    if task.perceptual:
        check_lpips_images(image_shape)
    if task.gan:
        task.gan.check(image_shape)


def tokenizer_notes(task: TokenizerTask, plan: Plan) -> list[str]:
    """Returns a note if a run is too short for its EMA, for `Task.notes`."""
    return ema_notes(task.ema_decay, task.ema_warmup, plan)


def pretrained_tokenizer(task: TokenizerTask, location: str) -> tuple[PyTree, MatchingRows]:
    """Reads the parameters of a tokenizer that a run may start from, for `Task.pretrained`."""
    return open_for_setting("init_from", location).read_tokenizer_params(), {}


def training_compute(dtype: Any) -> ComputeConfig:
    """Returns how a tokenizer is computed in training, with convolutions in `dtype`."""
    return ComputeConfig(dtype, encoder_precision="highest")


def load_frozen_losses(task: TokenizerTask) -> PyTree:
    """Reads {"lpips": parameters} where they are needed; InputError says how to get them."""
    return {"lpips": load_lpips(task.perceptual.weights)} if task.perceptual else {}


def init_state(task: TokenizerTask, params: PyTree, key: jax.Array, **others: PyTree) -> TrainState:
    """Makes the state before the first step.

    Args:
        task: task to train.
        params: initial parameters of the tokenizer.
        key: random key of the task's `init`, for the discriminator.
        others: further parts of the state, as for `join_state`.
    """
    discriminator = None
    if task.gan is not None:
        gan_key = stream_key(key, InitStream.DISCRIMINATOR)
        discriminator = create_discriminator(task.gan, task.model.image_shape, gan_key)
    state = create_state(params, task.optimizer, task.ema_decay)
    return join_state(state, {"discriminator": discriminator, **others})


def join_state(state: TrainState, others: dict[str, PyTree]) -> TrainState:
    """Adds the state of the other parts to the tokenizer's `opt_state`.

        state, others = split_state(state)
        others["discriminator"] = updated
        state = join_state(state, others)

    Args:
        state: train state of the tokenizer.
        others: states of the other parts by name; None for parts that this run does not have. If
            there are none, the state is returned unchanged.
    """
    others = {name: x for name, x in others.items() if x is not None}
    if not others:
        return state
    return dataclasses.replace(state, opt_state={TOKENIZER: state.opt_state} | others)


def split_state(state: TrainState) -> tuple[TrainState, dict[str, PyTree]]:
    """Undoes `join_state`; returns the tokenizer's state, and the other parts by name."""
    if not isinstance(state.opt_state, dict):
        return state, {}
    others = dict(state.opt_state)
    own = dataclasses.replace(state, opt_state=others.pop(TOKENIZER))
    return own, others


def with_example_keys(batch: Batch, key: jax.Array) -> Batch:
    """Returns {"image_BHWC": the batch's images, "key_B": a random key for each}."""
    image_BHWC = batch["image_BHWC"]
    return {"image_BHWC": image_BHWC, "key_B": example_keys(key, len(image_BHWC))}


def update_networks(
    task: TokenizerTask,
    state: TrainState,
    discriminator: DiscriminatorState | None,
    frozen: PyTree,
    batch: Batch,
    plan: Plan,
    microbatch_gradients: Callable[[ImageGradientsFn, Batch], LossGradients],
) -> tuple[TrainState, DiscriminatorState | None, Metrics, PyTree]:
    """Updates the tokenizer, and the discriminator on the same reconstructions.

    Args:
        task: task to train.
        state: state of the tokenizer alone, from `split_state`.
        discriminator: state of the discriminator; None without one.
        frozen: parameters of frozen loss networks, from `load_frozen_losses`.
        batch: images with keys, from `with_example_keys`.
        plan: length of the run.
        microbatch_gradients: function that runs a microbatch forward and backward through the
            tokenizer.

    Returns:
        The states after the update, metrics, and the batch's `LossGradients.statistics`.
    """
    step = state.step
    gradients = loss_gradients(task, discriminator, frozen, batch, step, plan, microbatch_gradients)
    state, metrics = apply_gradients(
        state, gradients.grads, task.optimizer, plan, task.ema_decay, ema_warmup=task.ema_warmup
    )
    metrics = gradients.metrics | metrics
    if task.gan is None:
        return state, None, metrics, gradients.statistics
    assert discriminator is not None
    logit_means = LecamEma(metrics["discriminator/real"], metrics["discriminator/fake"])
    discriminator, gan_metrics = update_discriminator(
        task.gan, discriminator, gradients.discriminator_grads, logit_means, step, plan
    )
    metrics |= {f"discriminator/{name}": x for name, x in gan_metrics.items()}
    return state, discriminator, metrics, gradients.statistics
