"""Training a KL tokenizer: one step of it and its discriminator, evaluation, previews."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn.autoencoder import to_model_range, to_unit_range
from varjax.nn.compute import ComputeConfig
from varjax.nn.rng import ImageStream, stream_key
from varjax.runtime import flops
from varjax.tokenizers import tokenizer_task
from varjax.tokenizers.kl.model import (
    LATENT_STD_PATH,
    KLConfig,
    KLTokenizer,
    kl_divergence,
    latent_moments,
)
from varjax.tokenizers.losses.gan import MAX_ADAPTIVE_WEIGHT, GANConfig
from varjax.tokenizers.losses.image_losses import (
    ImageGradientsFn,
    LossGradients,
    image_losses,
    reconstruct,
    valid_sums,
)
from varjax.tokenizers.losses.lpips import LPIPSConfig
from varjax.training.optimizer import AdamW
from varjax.training.previews import PREVIEW_IMAGES
from varjax.training.task import Batch, Plan, TrainState
from varjax.training.train_step import Metrics
from varjax.trees import PyTree

LATENT_STD_DECAY = 0.99  # of the moving average that becomes the tokenizer's "latent_std"


@dataclasses.dataclass(frozen=True)
class KLTask:
    """Trains a KL tokenizer: l1·|x̂-x| + l2·|x̂-x|² + LPIPS + the latents' KL + a GAN's loss.

        KLTask(KLConfig(), perceptual=LPIPSConfig(), gan=GANConfig(), ema_decay=0.9999)

    LDM's loss (arXiv 2112.10752, section 3.1), but averaged over an image's values instead of
    summed, so that settings hold for any image size. LDM's code also has a scalar log variance that
    weights pixels and LPIPS. No optimizer trains it, so it stays 0; it does not exist here. The
    state's `params` are the tokenizer's alone, "latent_std" among them; the discriminator is kept
    with the moments in `opt_state`. Raises InputError for a value out of range.

    Attributes:
        model: config of the tokenizer.
        optimizer: AdamW and its schedule, for the tokenizer.
        l1: weight of the mean absolute error of images in [-1, 1].
        l2: weight of the mean squared error of images in [-1, 1].
        kl: weight of the KL divergence of the latents from a standard normal, in nats per value of
            the image.
        perceptual: LPIPS loss; none for no perceptual loss.
        gan: discriminator and adversarial loss; none for no discriminator.
        dtype: dtype of all convolutions in training; "auto" is bfloat16 on an accelerator
            and float32 on a CPU. Evaluation and the posterior are always float32.
        ema_decay: decay of the parameters' moving average; 0 for none.
        ema_warmup: whether the decay starts low, for short runs: min(ema_decay, (1 + t) / (10 + t))
            after t updates.
        accumulate: number of microbatches that a batch is split into, to save memory.
    """

    model: KLConfig
    optimizer: AdamW = AdamW(b1=0.5, b2=0.9, weight_decay=0.0)
    l1: float = 1.0
    l2: float = 0.0
    kl: float = 1e-6
    perceptual: LPIPSConfig | None = None
    gan: GANConfig | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    ema_decay: float = 0.0
    ema_warmup: bool = False
    accumulate: int = 1

    check = tokenizer_task.check_images
    notes = tokenizer_task.tokenizer_notes
    pretrained = tokenizer_task.pretrained_tokenizer
    frozen = tokenizer_task.load_frozen_losses

    def __post_init__(self):
        tokenizer_task.check_decay_and_weights(self, "l1", "l2", "kl")

    def init(self, key: jax.Array) -> TrainState:
        return tokenizer_task.init_state(self, self.model.init(key), key)

    def tokenizer_identity(self, frozen: PyTree) -> dict[str, Any]:
        return {}

    def with_tokenizer_of(self, location: str) -> "KLTask":
        return self  # it trains a tokenizer, and uses none

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array, plan: Plan
    ) -> tuple[TrainState, Metrics]:
        """Updates the tokenizer, and the discriminator on the same reconstructions.

        The metric "loss" leaves the adversarial loss out, as in evaluation. "latent_std" of the
        parameters, and of their average, follows the standard deviation of the batches' latents.
        """
        state, others = tokenizer_task.split_state(state)
        step, old_std = state.step, state.params[LATENT_STD_PATH]
        batch = tokenizer_task.with_example_keys(batch, jax.random.fold_in(key, step))
        gradients = functools.partial(_gradients, self, state.params)
        state, others["discriminator"], metrics, statistics = tokenizer_task.update_networks(
            self, state, others.get("discriminator"), frozen, batch, plan, gradients
        )
        std = jnp.sqrt(_variance(statistics))
        std = jnp.where(step == 0, std, LATENT_STD_DECAY * old_std + (1 - LATENT_STD_DECAY) * std)
        state = dataclasses.replace(
            state,
            params=state.params | {LATENT_STD_PATH: std},
            ema=state.ema | {LATENT_STD_PATH: std} if self.ema_decay else None,
        )
        return tokenizer_task.join_state(state, others), metrics | {LATENT_STD_PATH: std}

    def train_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        whole = dataclasses.replace(self, accumulate=1)
        return flops.count(whole.train_step, state, frozen, batch, jax.random.key(0), Plan())

    def losses(
        self, params: PyTree, frozen: PyTree, image_BHWC: jax.Array
    ) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
        """Computes each image's losses without the adversarial one, which measures two networks.

        Args:
            params: parameters of the tokenizer.
            frozen: parameters of frozen loss networks, from `KLTask.frozen`.
            image_BHWC: uint8 images, compared with the decoded mode of the posterior.

        Returns:
            (B,) each: every loss, "kl" in nats per image, their weighted sum "loss", and "psnr" in
            dB; and the posterior's moments.
        """
        x_BHWC = to_model_range(image_BHWC)
        y_BHWC, latents = KLTokenizer(self.model).bind({"params": params})(x_BHWC)
        losses = image_losses(self, frozen, x_BHWC, y_BHWC)
        losses["kl"] = kl_divergence(latents)
        losses["loss"] = losses["loss"] + self.kl_weight * losses["kl"]
        return losses, latents

    def eval_step(self, state: TrainState, frozen: PyTree, batch: Batch) -> PyTree:
        losses, latents = self.losses(state.params, frozen, batch["image_BHWC"])
        return valid_sums(losses | latent_moments(latents), batch["valid_B"])

    def eval_metrics(self, sums: PyTree) -> dict[str, Any]:
        """Returns means over images, and the standard deviation of all samples of latents."""
        images = sums.pop("images")
        metrics = {name: total / images for name, total in sums.items()}
        moments = {name: metrics.pop(name) for name in ("latent_mean", "latent_square")}
        return metrics | {LATENT_STD_PATH: np.sqrt(_variance(moments))}

    def preview(self, state: TrainState, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Returns a row of held-out images, and below it their reconstructions."""
        images_BHWC = batch["image_BHWC"][:PREVIEW_IMAGES]
        y_BHWC = self.model.decode(state.params, self.model.encode(state.params, images_BHWC))
        x_BHWC = to_unit_range(to_model_range(images_BHWC))
        return {"reconstructions": jnp.stack([x_BHWC, y_BHWC])}

    def sampler(self) -> None:
        return None  # a tokenizer generates no images

    @property
    def compute(self) -> ComputeConfig:
        """How a tokenizer in training is computed."""
        return tokenizer_task.training_compute(self.dtype)

    @property
    def kl_weight(self) -> float:
        """The weight of an image's KL, summed over its latents, in the loss."""
        return self.kl / math.prod(self.model.image_shape)

    @property
    def max_adaptive_weight(self) -> float:
        """The bound of the adversarial loss's adaptive weight: 0.05 for 256 px in color.

        LDM bounds the ratio by the same number as VQGAN, but its reconstruction loss is a sum over
        an image's values, H·W·C times the mean that it is here.
        """
        return MAX_ADAPTIVE_WEIGHT / math.prod(self.model.image_shape)


def _gradients(
    task: KLTask, params: PyTree, image_gradients: ImageGradientsFn, batch: Batch
) -> LossGradients:
    """Computes the gradients of all losses on a microbatch, and the latents' moments over it."""
    x_BHWC, key_B = to_model_range(batch["image_BHWC"]), batch["key_B"]
    model = KLTokenizer(task.model, task.compute, task.compute.jax_dtype)

    def draw(key):
        return jax.random.normal(stream_key(key, ImageStream.POSTERIOR), task.model.latent_shape)

    def forward(params):
        (y_BHWC, latents), last_BHWC = reconstruct(model, params, x_BHWC, jax.vmap(draw)(key_B))
        return (y_BHWC, latents), last_BHWC

    def latent_loss(latents):
        kl = jnp.mean(kl_divergence(latents))
        return task.kl_weight * kl, kl

    (y_BHWC, latents), vjp, last_BHWC = jax.vjp(forward, params, has_aux=True)
    from_images = image_gradients(x_BHWC, y_BHWC, last_BHWC, key_B)
    (loss, kl), latent_grads = jax.value_and_grad(latent_loss, has_aux=True)(latents)
    (grads,) = vjp((from_images.image_grad_BHWC, latent_grads))
    metrics = from_images.metrics | {"kl": kl, "loss": from_images.metrics["loss"] + loss}
    statistics = {name: jnp.mean(x_B) for name, x_B in latent_moments(latents).items()}
    return LossGradients(
        grads, metrics, statistics, from_images.discriminator_grads, from_images.last_layer
    )


def _variance(moments):
    return moments["latent_square"] - moments["latent_mean"] ** 2
