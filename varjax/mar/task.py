"""Training a MAR transformer: the loss of masked tokens given the known ones."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax.checkpoints.weights import open_for_setting, read_frozen_tokenizer, read_generator
from varjax.errors import InputError, check_setting
from varjax.mar.latents import TokenizerConfig, check_latents_fit, decode_tokens, encode_tokens
from varjax.mar.losses import (
    LossDraws,
    MaskedTokenLosses,
    content_keys,
    known_count,
    mask_ratio,
    masked_mean,
    token_losses,
)
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions, check_sampling, make_setup, sample_mar_tokens
from varjax.nn.autoencoder import to_model_range, to_unit_range
from varjax.nn.class_embedding import drop_labels
from varjax.nn.compute import FUSED_ATTENTION, ComputeConfig
from varjax.nn.diffusion import TRAINING_STEPS
from varjax.nn.rng import ImageStream, stream_keys
from varjax.tokenizers.contract import check_image_shape
from varjax.training import transformer_task
from varjax.training.optimizer import AdamW
from varjax.training.previews import PREVIEW_IMAGES
from varjax.training.task import Batch, ImageSampler, MatchingRows, Plan, TrainState
from varjax.training.train_step import (
    Metrics,
    accumulated_gradients,
    apply_gradients,
    create_state,
    example_keys,
)
from varjax.trees import PyTree

# As in the reference: matrices, and all tables outside the denoising MLP.
MAR_DECAYED = r"^(?!head/).*(kernel|embedding|_embed|mask_token)$"
NOISE_BINS, KNOWN_BINS = 10, 4  # ranges of the losses in evaluation


@dataclasses.dataclass(frozen=True)
class MARTask:
    """Trains a transformer to predict masked tokens (MAR).

    Samples are drawn from the EMA parameters. Raises InputError for a value out of range.

    Attributes:
        model: config of the transformer.
        tokenizer: config of the frozen tokenizer: KL for a diffusion head, VQ with one scale for a
            categorical one.
        tokenizer_weights: tokenizer's run or converted directory, whose config must equal
            `tokenizer`; or "random" for an untrained tokenizer, for tests of speed and memory.
        optimizer: AdamW and its schedule.
        class_dropout: fraction of images whose label becomes "no class".
        attention_dropout: fraction of the attention weights to drop; fused kernels do not support
            it.
        dropout: fraction of the outputs of attention and MLP to drop.
        min_mask_ratio: smallest fraction of tokens that is masked.
        diffusion_batch_mul: number of noise levels for each token in a step.
        ema_decay: decay of the parameters' exponential moving average; 0 for none.
        ema_warmup: whether the decay starts low, for short runs: min(ema_decay, (1 + t) / (10 + t))
            after t updates.
        accumulate: number of microbatches whose gradients are averaged in a step.
        compute: dtype and execution.
        sampling: sampling options that suit the model, for previews and as the default after
            loading.
    """

    model: MARConfig
    tokenizer: TokenizerConfig
    tokenizer_weights: str
    optimizer: AdamW = AdamW()
    class_dropout: float = 0.1
    attention_dropout: float = 0.1
    dropout: float = 0.1
    min_mask_ratio: float = 0.7
    diffusion_batch_mul: int = 4
    ema_decay: float = 0.9999
    ema_warmup: bool = False
    accumulate: int = 1
    compute: ComputeConfig = ComputeConfig()
    sampling: MAROptions = MAROptions()

    notes = transformer_task.transformer_notes
    with_tokenizer_of = transformer_task.with_tokenizer_of
    train_flops = transformer_task.train_flops

    def __post_init__(self):
        check_latents_fit(self.tokenizer, self.model)
        # Lists and functions become tuples, which have a hash and can be written.
        object.__setattr__(self, "sampling", check_sampling(self.model, self.sampling))
        for name in ("class_dropout", "ema_decay"):
            value = getattr(self, name)
            check_setting(name, value, 0 <= value <= 1, "in [0, 1]")
        for name in ("attention_dropout", "dropout"):
            value = getattr(self, name)
            check_setting(name, value, 0 <= value < 1, "at least 0 and below 1")
        check_setting(
            "min_mask_ratio", self.min_mask_ratio, 0 < self.min_mask_ratio < 1, "in (0, 1)"
        )
        repeats = self.diffusion_batch_mul
        check_setting("diffusion_batch_mul", repeats, repeats >= 1, "1 or more")
        kernel = self.compute.attention_impl
        if kernel in FUSED_ATTENTION and self.attention_dropout:
            raise InputError(
                f"attention_dropout={self.attention_dropout}: attention_impl={kernel} has no "
                "dropout; set task.attention_dropout=0 or task.compute.attention_impl=xla"
            )

    def check(self, image_shape: tuple[int, int, int], classes: int) -> None:
        check_image_shape(self.tokenizer, image_shape)
        transformer_task.check_classes(classes, self.model.classes)
        self.compute.attention_implementation()  # whether this machine has it

    def init(self, key: jax.Array) -> TrainState:
        return create_state(self.model.init(key), self.optimizer, self.ema_decay)

    def pretrained(self, location: str) -> tuple[PyTree, MatchingRows]:
        weights = open_for_setting("init_from", location)
        config, params, _ = read_generator(weights, "mar", "MARTask", MARConfig, MAROptions)
        return params, matching_mar_rows(self.model, config)

    def frozen(self) -> PyTree:
        """Reads the tokenizer's parameters; raises InputError if its config differs."""
        return read_frozen_tokenizer(self.tokenizer_weights, self.tokenizer)

    def tokenizer_identity(self, frozen: PyTree) -> dict[str, Any]:
        return self.tokenizer.identity(frozen)

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array, plan: Plan
    ) -> tuple[TrainState, Metrics]:
        """Makes one update, with one mask ratio for the whole batch."""
        ratio_key, key = jax.random.split(jax.random.fold_in(key, state.step))
        known = known_count(self.model.length, mask_ratio(ratio_key, self.min_mask_ratio))
        batch = batch | {
            "key_B": example_keys(key, len(batch["label_B"])),
            "known_B": jnp.broadcast_to(known, batch["label_B"].shape),
        }

        def loss_fn(params, batch):
            return self.loss(params, frozen, batch)

        grads, metrics = accumulated_gradients(loss_fn, state.params, batch, self.accumulate)
        state, update_metrics = self.update(state, grads, plan)
        return state, metrics | update_metrics

    def update(self, state: TrainState, grads: PyTree, plan: Plan) -> tuple[TrainState, Metrics]:
        """Applies gradients, as `apply_gradients` does with the settings of this task."""
        return apply_gradients(
            state, grads, self.optimizer, plan, self.ema_decay, MAR_DECAYED, self.ema_warmup
        )

    def loss(
        self, params: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Computes the mean loss of masked tokens, and its parts.

        batch: with "key_B", a random key for each image, and "known_B", how many tokens of each
        are not masked.
        """
        key_B, label_B = batch["key_B"], batch["label_B"]
        label_key_B = stream_keys(key_B, ImageStream.LABEL)
        drop = jax.vmap(drop_labels, (0, 0, None, None))
        label_B = drop(label_key_B, label_B, self.class_dropout, self.model.classes)
        draws = LossDraws.from_keys(
            self.model,
            key_B,
            batch["known_B"],
            repeats=self.diffusion_batch_mul,
            attention_dropout=self.attention_dropout,
            dropout=self.dropout,
        )
        losses = self.token_losses(params, frozen, batch | {"label_B": label_B}, draws)
        masked_BL = losses.masked_BL
        means = {name: masked_mean(x_BL, masked_BL) for name, x_BL in losses.means_BL().items()}
        return means["loss"], means | {"masked": jnp.mean(masked_BL.astype(jnp.float32))}

    def token_losses(
        self, params: PyTree, frozen: PyTree, batch: Batch, draws: LossDraws
    ) -> MaskedTokenLosses:
        """Computes the losses of all tokens of a batch of images or latents, with "key_B"."""
        posterior_key_B = stream_keys(batch["key_B"], ImageStream.LATENT)
        token_BL = jax.lax.stop_gradient(
            encode_tokens(self.tokenizer, self.model, frozen, batch, posterior_key_B, self.compute)
        )
        label_B, max_known = batch["label_B"], self.max_known
        return token_losses(self.model, params, token_BL, label_B, draws, max_known, self.compute)

    @property
    def max_known(self) -> int:
        """The largest number of tokens of an image that are not masked."""
        return self.model.length - math.ceil(self.model.length * self.min_mask_ratio)

    def eval_step(self, state: TrainState, frozen: PyTree, batch: Batch) -> PyTree:
        """Computes losses; masks and noise come from each image's values, so they never change."""
        key_B = content_keys(batch)
        ratio_key_B = stream_keys(key_B, ImageStream.MASK_RATIO)
        ratio_B = jax.vmap(mask_ratio, (0, None))(ratio_key_B, self.min_mask_ratio)
        known_B = known_count(self.model.length, ratio_B)
        draws = LossDraws.from_keys(self.model, key_B, known_B, self.diffusion_batch_mul)
        losses = self.token_losses(state.params, frozen, batch | {"key_B": key_B}, draws)
        means_BL = losses.means_BL()
        # Padding images have weight 0, as do known tokens.
        image_B = batch["valid_B"].astype(jnp.float32)
        masked_BL = losses.masked_BL.astype(jnp.float32)
        weight_BL = masked_BL * image_B[:, None]
        mean_weight_BL = weight_BL / jnp.sum(masked_BL, axis=1, keepdims=True)
        sums: dict[str, Any] = {
            name: jnp.sum(x_BL * mean_weight_BL) for name, x_BL in means_BL.items()
        }
        if not self.model.causal:  # which predicts every token from those before it
            known_bin_B = jnp.minimum(known_B * KNOWN_BINS // (self.max_known + 1), KNOWN_BINS - 1)
            loss_B = jnp.sum(means_BL["loss"] * mean_weight_BL, axis=1)
            sums["loss_by_known"] = _binned(known_bin_B, loss_B * image_B, image_B, KNOWN_BINS)
        if draws.noise is not None:
            noise_bin_BLU = draws.noise.timestep_BLU * NOISE_BINS // TRAINING_STEPS
            weight_BLU = jnp.broadcast_to(weight_BL[..., None], noise_bin_BLU.shape)
            loss_BLU = losses.loss_BLU * weight_BLU
            sums["loss_by_noise"] = _binned(noise_bin_BLU, loss_BLU, weight_BLU, NOISE_BINS)
        return sums | {"images": jnp.sum(image_B)}

    def eval_metrics(self, sums: PyTree) -> dict[str, Any]:
        """Returns means over images, and means by noise level and by number of known tokens.

        `loss_by_noise` has ten equal ranges of timesteps, least noise first. `loss_by_known` has
        four ranges of the number of known tokens, fewest first; a causal model has none. An empty
        range is NaN.
        """
        images, arrays = sums.pop("images"), {}
        for name in ("loss_by_known", "loss_by_noise"):
            if name in sums:
                total, count = sums.pop(name)
                arrays[name] = np.where(count > 0, total / np.maximum(count, 1), np.nan)
        return {name: total / images for name, total in sums.items()} | arrays

    def preview(self, state: TrainState, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Samples classes, always from the same seeds, and reconstructs images."""
        samples = transformer_task.preview_samples(
            self.sampler(), state.params, frozen, self.model.classes
        )
        first = {name: x[:PREVIEW_IMAGES] for name, x in batch.items()}
        kept = encode_tokens(self.tokenizer, self.model, frozen, first, compute=self.compute)
        rebuilt = decode_tokens(self.tokenizer, self.model, frozen, kept, self.compute)
        rows = [rebuilt]
        if "image_BHWC" in first:
            rows = [to_unit_range(to_model_range(first["image_BHWC"])), *rows]
        return {"samples": samples, "reconstructions": jnp.stack(rows)}

    def sampler(self) -> ImageSampler:
        setup = make_setup(self.model, self.sampling)

        def draw(params, frozen, label_B, key_B):
            tokens = sample_mar_tokens(
                self.model, params, label_B, key_B, setup, compute=self.compute
            )
            return decode_tokens(self.tokenizer, self.model, frozen, tokens, self.compute)

        return draw


def matching_mar_rows(config: MARConfig, other: MARConfig) -> MatchingRows:
    """Finds matching rows of embedding tables that do not match as a whole.

    With other classes, no row of the class embedding matches. With another grid or buffer size, the
    positions of the buffer tokens that both have match, and no position of the grid.

    Returns:
        {parameter: (rows of `config`, rows of `other`)}.
    """
    rows: MatchingRows = {}
    if config.classes != other.classes:
        rows["class_embed"] = [], []
    if (config.grid, config.buffer_size) != (other.grid, other.buffer_size):
        both = list(range(min(config.buffer_size, other.buffer_size)))
        rows["encoder_pos_embed"] = rows["decoder_pos_embed"] = both, both
        rows["diffusion_pos_embed"] = [], []
    return rows


def _binned(index, total, count, bins):
    """Sums totals and counts by bin, (bins,) each."""
    chosen = jax.nn.one_hot(index.reshape(-1), bins)
    both = jnp.stack([total.reshape(-1), count.reshape(-1)])
    return tuple(jnp.matmul(both, chosen, precision="highest"))
