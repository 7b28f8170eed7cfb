"""Training a VQ tokenizer: one step of it and its discriminator, evaluation, previews."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn.autoencoder import to_model_range, to_unit_range
from varjax.nn.compute import ComputeConfig
from varjax.nn.rng import InitStream, stream_key
from varjax.runtime import flops
from varjax.tokenizers import tokenizer_task
from varjax.tokenizers.losses.gan import MAX_ADAPTIVE_WEIGHT, GANConfig
from varjax.tokenizers.losses.image_losses import (
    ImageGradientsFn,
    LossGradients,
    image_losses,
    reconstruct,
    valid_sums,
)
from varjax.tokenizers.losses.lpips import LPIPSConfig
from varjax.tokenizers.vq.codebook import (
    CodebookConfig,
    entropy_loss,
    init_codebook,
    init_usage,
    kmeans_init,
    quantizer_inputs,
    replace_codebook,
    restart_dead_codes,
    sample_scale_dropout,
    scale_residuals,
)
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer, decode_every_scale, quantize_images
from varjax.tokenizers.vq.quantizer import code_counts, code_perplexity, quantizer_loss
from varjax.training.optimizer import AdamW
from varjax.training.previews import PREVIEW_IMAGES
from varjax.training.task import Batch, Plan, TrainState
from varjax.training.train_step import Metrics
from varjax.trees import PyTree


@dataclasses.dataclass(frozen=True)
class VQTask:
    """Trains a VQ tokenizer: l1·|x̂-x| + l2·|x̂-x|² + LPIPS + the quantizer's loss + a GAN's.

        VQTask(VQConfig(), perceptual=LPIPSConfig(), gan=GANConfig(), ema_decay=0.9999)

    VAR's eq. 5. The state's `params` are the tokenizer's alone: the discriminator and the codes'
    usage are next to the moments in `opt_state`. Raises InputError for a value out of range.

    Attributes:
        model: config of the tokenizer.
        optimizer: AdamW and its schedule, for the tokenizer.
        l1: weight of the mean absolute error of images in [-1, 1].
        l2: weight of the mean squared error of images in [-1, 1].
        beta: weight of the commitment loss.
        codebook: initialization of the codes and remedies against unused ones.
        perceptual: LPIPS loss; none for no perceptual loss.
        gan: discriminator and adversarial loss; none for no discriminator.
        dtype: dtype of all convolutions in training; "auto" is bfloat16 on an accelerator
            and float32 on a CPU. Evaluation and the quantizer are always float32.
        ema_decay: decay of the parameters' moving average; 0 for none.
        ema_warmup: whether the decay starts low, for short runs: min(ema_decay, (1 + t) / (10 + t))
            after t updates.
        accumulate: number of microbatches that a batch is split into, to save memory.
    """

    model: VQConfig
    optimizer: AdamW = AdamW(b1=0.9, b2=0.95, weight_decay=0.0)
    l1: float = 0.2
    l2: float = 1.0
    beta: float = 0.25
    codebook: CodebookConfig = CodebookConfig()
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
        tokenizer_task.check_decay_and_weights(self, "l1", "l2", "beta")
        self.codebook.check(self.model.pyramid)

    def init(self, key: jax.Array) -> TrainState:
        params = self.model.init(key)
        codebook_key = stream_key(key, InitStream.CODEBOOK)
        params = init_codebook(self.codebook, self.model, params, codebook_key)
        usage_V = init_usage(self.codebook, self.model.vocab)
        return tokenizer_task.init_state(self, params, key, usage_V=usage_V)

    def tokenizer_identity(self, frozen: PyTree) -> dict[str, Any]:
        return {}

    def with_tokenizer_of(self, location: str) -> "VQTask":
        return self  # it trains a tokenizer, and uses none

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array, plan: Plan
    ) -> tuple[TrainState, Metrics]:
        """Updates the tokenizer, and the discriminator on the same reconstructions.

        The metric "loss" leaves the adversarial loss out, as in evaluation.
        """
        pyramid, codebook = self.model.pyramid, self.codebook
        state, others = tokenizer_task.split_state(state)
        key = jax.random.fold_in(key, state.step)
        batch = tokenizer_task.with_example_keys(batch, key)
        inputs_fn = functools.partial(
            quantizer_inputs, self.model, batch["image_BHWC"], self.accumulate
        )
        state = kmeans_init(codebook, pyramid, state, inputs_fn, key)
        gradients = functools.partial(_gradients, self, state.params)
        state, others["discriminator"], metrics, statistics = tokenizer_task.update_networks(
            self, state, others.get("discriminator"), frozen, batch, plan, gradients
        )
        frequency_KV = statistics["frequency_KV"]
        metrics["perplexity"] = code_perplexity(frequency_KV, jnp)
        if codebook.restart_every:
            state, others["usage_V"], restarts = restart_dead_codes(
                codebook, pyramid, state, others["usage_V"], frequency_KV, inputs_fn, key
            )
            metrics |= restarts
        return tokenizer_task.join_state(state, others), metrics

    def train_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        # Without k-means and restarts, which only some steps do.
        codebook = dataclasses.replace(self.codebook, init="uniform", restart_every=0)
        every_step = dataclasses.replace(self, accumulate=1, codebook=codebook)
        return flops.count(every_step.train_step, state, frozen, batch, jax.random.key(0), Plan())

    def losses(
        self, params: PyTree, frozen: PyTree, image_BHWC: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Computes each image's losses without the adversarial one, which measures two networks.

        Args:
            params: parameters of the tokenizer.
            frozen: parameters of frozen loss networks, from `VQTask.frozen`.
            image_BHWC: uint8 images to reconstruct.

        Returns:
            (B,) each: every loss, their weighted sum "loss", and "psnr" in dB; and tokens (B, L).
        """
        x_BHWC = to_model_range(image_BHWC)
        y_BHWC, f_BhwZ, quantized = VQTokenizer(self.model).bind({"params": params})(x_BHWC)
        losses = image_losses(self, frozen, x_BHWC, y_BHWC)
        losses["quantizer"] = quantizer_loss(f_BhwZ, quantized.f_hats, self.beta)
        losses["loss"] = losses["loss"] + losses["quantizer"]
        return losses, quantized.tokens_BL

    def eval_step(self, state: TrainState, frozen: PyTree, batch: Batch) -> PyTree:
        valid_B = batch["valid_B"]
        losses, tokens_BL = self.losses(state.params, frozen, batch["image_BHWC"])
        weight_B = valid_B.astype(jnp.float32)
        count_KV = code_counts(self.model.pyramid, self.model.vocab, tokens_BL, weight_B)
        return valid_sums(losses, valid_B) | {"codes_KV": count_KV}

    def eval_metrics(self, sums: PyTree) -> dict[str, Any]:
        """Returns means over images, and for each scale the codes' perplexity and usage."""
        images, codes_KV = sums.pop("images"), sums.pop("codes_KV")
        metrics = {name: total / images for name, total in sums.items()}
        metrics["perplexity"] = code_perplexity(codes_KV / images, np)
        metrics["usage"] = np.mean(codes_KV > 0, axis=1)
        return metrics

    def preview(self, state: TrainState, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Returns a row of held-out images, and below it reconstructions, scale by scale."""
        x_BHWC = to_model_range(batch["image_BHWC"][:PREVIEW_IMAGES])
        f_hats = quantize_images(self.model, state.params, x_BHWC).f_hats
        y_KBHWC = decode_every_scale(self.model, state.params, f_hats)
        return {"reconstructions": to_unit_range(jnp.concatenate([x_BHWC[None], y_KBHWC]))}

    def sampler(self) -> None:
        return None  # a tokenizer generates no images

    @property
    def max_adaptive_weight(self) -> float:
        """The bound of the adversarial loss's adaptive weight, VQGAN's: its losses are means."""
        return MAX_ADAPTIVE_WEIGHT

    @property
    def compute(self) -> ComputeConfig:
        """How a tokenizer in training is computed."""
        return tokenizer_task.training_compute(self.dtype)


def _gradients(
    task: VQTask, params: PyTree, image_gradients: ImageGradientsFn, batch: Batch
) -> LossGradients:
    """Computes the gradients of all losses on a microbatch, and how often each code is used."""
    x_BHWC, key_B = to_model_range(batch["image_BHWC"]), batch["key_B"]
    model = VQTokenizer(task.model, task.compute, task.compute.jax_dtype)
    pyramid = task.model.pyramid
    kept_B = sample_scale_dropout(task.codebook, pyramid, key_B)

    def forward(params):
        (y_BHWC, f_BhwZ, quantized), last_BHWC = reconstruct(model, params, x_BHWC, kept_B)
        return (y_BHWC, f_BhwZ, quantized.f_hats), (quantized.tokens_BL, last_BHWC)

    def codebook_loss(f_BhwZ, f_hats, codebook_VZ):
        losses = {"quantizer": jnp.mean(quantizer_loss(f_BhwZ, f_hats, task.beta, kept_B))}
        total = losses["quantizer"]
        if task.codebook.entropy:
            inputs = scale_residuals(pyramid, f_BhwZ, f_hats)
            losses["entropy"] = entropy_loss(codebook_VZ, inputs, task.model.cosine_codes)
            total = total + task.codebook.entropy * losses["entropy"]
        return total, losses

    (y_BHWC, f_BhwZ, f_hats), vjp, (tokens_BL, last_BHWC) = jax.vjp(forward, params, has_aux=True)
    from_images = image_gradients(x_BHWC, y_BHWC, last_BHWC, key_B)
    (*feature_grads, codebook_grad_VZ), codebook_losses = jax.grad(
        codebook_loss, (0, 1, 2), has_aux=True
    )(f_BhwZ, f_hats, params["quantizer"]["codebook"])
    metrics = from_images.metrics | codebook_losses
    metrics["loss"] = metrics["loss"] + metrics["quantizer"]
    (grads,) = vjp((from_images.image_grad_BHWC, *feature_grads))
    if task.codebook.entropy:
        grads = replace_codebook(grads, grads["quantizer"]["codebook"] + codebook_grad_VZ)
    B = len(x_BHWC)
    count_KV = code_counts(pyramid, task.model.vocab, tokens_BL, jnp.ones(B))
    statistics = {"frequency_KV": count_KV / B}
    return LossGradients(
        grads, metrics, statistics, from_images.discriminator_grads, from_images.last_layer
    )
