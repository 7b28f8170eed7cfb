"""Training a VQ tokenizer: one step of it and its discriminator, evaluation, previews."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from varjax import trees
from varjax.errors import check_setting
from varjax.nn.autoencoder import to_model_range, to_unit_range
from varjax.nn.compute import ComputeConfig
from varjax.nn.rng import InitStream, stream_key
from varjax.runtime import flops
from varjax.tokenizers.load import read_tokenizer
from varjax.tokenizers.losses.gan import MAX_ADAPTIVE_WEIGHT, GANConfig
from varjax.tokenizers.losses.image_losses import (
    check_image_losses,
    image_losses,
    init_discriminator,
    load_frozen_losses,
    loss_gradients,
    train_discriminator,
    valid_sums,
)
from varjax.tokenizers.losses.lpips import LPIPSConfig
from varjax.tokenizers.tokenizer_state import join_state, split_state
from varjax.tokenizers.vq.codebook import (
    CodebookConfig,
    init_codebook,
    init_usage,
    kmeans_init,
    quantizer_inputs,
    restart_dead_codes,
)
from varjax.tokenizers.vq.gradients import vq_gradients
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer
from varjax.tokenizers.vq.quantizer import code_counts, code_perplexity, quantizer_loss
from varjax.training.optimizer import AdamW
from varjax.training.task import (
    PREVIEW_IMAGES,
    Batch,
    MatchingRows,
    Plan,
    TrainState,
    ema_notes,
)
from varjax.training.train_step import apply_gradients, create_state, example_keys
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
        dtype: number format of all convolutions in training; "auto" is bfloat16 on an accelerator
            and float32 on a CPU. Evaluation and the quantizer are always float32.
        ema_decay: decay of the parameters' moving average; 0 for none.
        accumulate: number of microbatches that a batch is split into, to save memory.
        plan: length of the run; the loop fills it in.
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
    accumulate: int = 1
    plan: Plan = Plan()

    def __post_init__(self):
        check_setting("ema_decay", self.ema_decay, 0 <= self.ema_decay <= 1, "in [0, 1]")
        for name in ("l1", "l2", "beta"):
            value = getattr(self, name)
            check_setting(name, value, value >= 0, "0 (off) or more")
        self.codebook.check(self.model.pyramid)

    def check(self, image_shape: tuple[int, int, int], classes: int) -> None:
        check_image_losses(self, image_shape)

    def notes(self) -> list[str]:
        return ema_notes(self.ema_decay, self.plan)

    def init(self, key: jax.Array) -> TrainState:
        params = self.model.init(key)
        params = init_codebook(
            self.codebook, self.model, params, stream_key(key, InitStream.CODEBOOK)
        )
        state = create_state(params, self._tx(params), self.ema_decay)
        others = {
            "discriminator": init_discriminator(self, key),
            "usage_V": init_usage(self.codebook, self.model.vocab),
        }
        return join_state(state, others)

    def pretrained(self, location: str) -> tuple[PyTree, MatchingRows]:
        return read_tokenizer(location)[1], {}

    def tokenizer_identity(self, frozen: PyTree) -> dict[str, Any]:
        return {}

    def frozen(self) -> PyTree:
        """Reads {"lpips": parameters} where they are needed; InputError says how to get them."""
        return load_frozen_losses(self)

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """Updates the tokenizer, and the discriminator on the same reconstructions.

        The metric "loss" leaves the adversarial loss out, as in evaluation.
        """
        pyramid = self.model.pyramid
        state, others = split_state(state)
        key, step = jax.random.fold_in(key, state.step), state.step
        image_BHWC = batch["image_BHWC"]
        batch = {"image_BHWC": image_BHWC, "key_B": example_keys(key, len(image_BHWC))}
        inputs_fn = functools.partial(quantizer_inputs, self.model, image_BHWC, self.accumulate)

        state = kmeans_init(self.codebook, pyramid, state, inputs_fn, key)
        discriminator = others.get("discriminator")
        gradients = functools.partial(vq_gradients, self, state.params)
        found = loss_gradients(self, discriminator, frozen, batch, step, gradients)
        frequency_KV = found.statistics["frequency_KV"]
        state, norms = apply_gradients(state, found.grads, self._tx(state.params), self.ema_decay)
        metrics = found.metrics | norms | {"lr": self.optimizer.lr(step, self.plan)}
        metrics["perplexity"] = code_perplexity(frequency_KV, jnp)
        if self.codebook.restart_every:
            state, others["usage_V"], restarts = restart_dead_codes(
                self.codebook, pyramid, state, others["usage_V"], frequency_KV, inputs_fn, key
            )
            metrics |= restarts
        others["discriminator"], gan_metrics = train_discriminator(self, discriminator, found, step)
        return join_state(state, others), metrics | gan_metrics

    def train_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        # k-means and restarts come once in a while only.
        codebook = dataclasses.replace(self.codebook, init="uniform", restart_every=0)
        every_step = dataclasses.replace(self, accumulate=1, codebook=codebook)
        return flops.count(every_step.train_step, state, frozen, batch, jax.random.key(0))

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
        """Returns means over images, and per scale: code perplexity, and share of codes in use."""
        images, codes_KV = sums.pop("images"), sums.pop("codes_KV")
        metrics = {name: total / images for name, total in sums.items()}
        metrics["perplexity"] = code_perplexity(codes_KV / images, np)
        metrics["usage"] = np.mean(codes_KV > 0, axis=1)
        return metrics

    def preview(self, state: TrainState, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Returns a row of held-out images, and below it reconstructions, scale by scale."""
        model = VQTokenizer(self.model).bind({"params": state.params})
        x_BHWC = to_model_range(batch["image_BHWC"][:PREVIEW_IMAGES])
        y_KBHWC = model.decode_every_scale(model.encode(x_BHWC))
        return {"reconstructions": to_unit_range(jnp.concatenate([x_BHWC[None], y_KBHWC]))}

    def sampler(self) -> None:
        return None  # a tokenizer draws nothing

    @property
    def max_adaptive_weight(self) -> float:
        """The bound of the adversarial loss's adaptive weight, VQGAN's: its losses are means."""
        return MAX_ADAPTIVE_WEIGHT

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The number format that `dtype` stands for on this machine."""
        return self.compute.jax_dtype

    @property
    def compute(self) -> ComputeConfig:
        """How a tokenizer in training is computed."""
        return ComputeConfig(self.dtype, encoder_precision="highest")

    def _tx(self, params):
        decay = trees.map_with_path(lambda path, _: path.endswith("kernel"), params)
        return self.optimizer.make(self.plan, decay)
