"""Training the transformer: predicting the next scale's tokens under teacher forcing."""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from varjax.checkpoints.weights import (
    frozen_tokenizer,
    open_for_setting,
    read_frozen_tokenizer,
    read_generator,
)
from varjax.errors import check_setting
from varjax.nn.class_embedding import drop_labels
from varjax.nn.compute import ComputeConfig
from varjax.nn.transformer import drop_path
from varjax.tokenizers.contract import check_image_shape
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.quantizer import code_counts, code_perplexity
from varjax.training import transformer_task
from varjax.training.optimizer import AdamW
from varjax.training.task import Batch, ImageSampler, MatchingRows, Plan, TrainState
from varjax.training.train_step import (
    Metrics,
    accumulated_gradients,
    apply_gradients,
    create_state,
)
from varjax.trees import PyTree
from varjax.var import teacher_forcing
from varjax.var.cca import CCAConfig, cca_loss, read_reference_params
from varjax.var.model import VAR, VARConfig, check_fit
from varjax.var.network import VARModels
from varjax.var.sample import VAROptions, guided_scales, sample_images


class TokenLosses(NamedTuple):
    """Holds losses of each token under teacher forcing.

    Attributes:
        tokens_BL: codes of the targets.
        cross_entropy_BL: cross-entropy of the target.
        correct_BL: 1 where the target is the most likely code, else 0.
        objective_BL: loss to train on, the cross-entropy with label smoothing.
    """

    tokens_BL: jax.Array
    cross_entropy_BL: jax.Array
    correct_BL: jax.Array
    objective_BL: jax.Array


@dataclasses.dataclass(frozen=True)
class VARTask:
    """Trains a transformer to predict the tokens of the next scale (VAR, section 3.1).

    Attributes:
        model: config of the transformer.
        tokenizer: config of the frozen tokenizer.
        tokenizer_weights: tokenizer's run or converted directory, whose config must equal
            `tokenizer`; or "random" for an untrained tokenizer, for tests of speed and memory.
        optimizer: AdamW and its schedule.
        class_dropout: fraction of images whose label becomes "no class".
        drop_path: fraction of residual branches that the last layer drops.
        label_smoothing: fraction of the targets' probability that is spread over all codes.
        ema_decay: decay of the parameters' exponential moving average; 0 for none.
        ema_warmup: whether the decay starts low, for short runs: min(ema_decay, (1 + t) / (10 + t))
            after t updates.
        accumulate: number of microbatches whose gradients are averaged in a step.
        compute: dtype and execution.
        sampling: sampling options that suit the model, for previews and as the default after
            loading.
        cca: contrastive loss for fine-tuning a trained model, after which it needs no guidance;
            None for the cross-entropy.
    """

    model: VARConfig
    tokenizer: VQConfig
    tokenizer_weights: str
    optimizer: AdamW = AdamW()
    class_dropout: float = 0.1
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    ema_warmup: bool = False
    accumulate: int = 1
    compute: ComputeConfig = ComputeConfig()
    sampling: VAROptions = VAROptions()
    cca: CCAConfig | None = None

    notes = transformer_task.transformer_notes
    with_tokenizer_of = transformer_task.with_tokenizer_of
    train_flops = transformer_task.train_flops

    def __post_init__(self):
        check_fit(self.tokenizer, self.model)
        # Lists and functions become tuples, which have a hash and can be written.
        sampling = self.sampling.check(len(self.model.pyramid))
        object.__setattr__(self, "sampling", sampling)
        for name in ("class_dropout", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            check_setting(name, value, 0 <= value <= 1, "in [0, 1]")
        # Kept branches are divided by the fraction kept.
        rate = self.drop_path
        check_setting("drop_path", rate, 0 <= rate < 1, "at least 0 and below 1")
        smoothed = self.cca is not None and self.label_smoothing > 0
        check_setting("label_smoothing", self.label_smoothing, not smoothed, "0 with cca")

    def check(self, image_shape: tuple[int, int, int], classes: int) -> None:
        check_image_shape(self.tokenizer, image_shape)
        transformer_task.check_classes(classes, self.model.classes)
        self.compute.attention_implementation()  # whether this machine has it

    def init(self, key: jax.Array) -> TrainState:
        return create_state(self.model.init(key), self.optimizer, self.ema_decay)

    def pretrained(self, location: str) -> tuple[PyTree, MatchingRows]:
        weights = open_for_setting("init_from", location)
        config, params, _ = read_generator(weights, "var", "VARTask", VARConfig, VAROptions)
        return params, matching_rows(self.model, config)

    def frozen(self) -> PyTree:
        """Reads the tokenizer's parameters, and with `cca` {"tokenizer", "reference"}.

        Raises InputError if the config of either differs.
        """
        tokenizer = read_frozen_tokenizer(self.tokenizer_weights, self.tokenizer)
        if self.cca is None:
            return tokenizer
        reference = read_reference_params(self.cca.reference, self.model)
        return {"tokenizer": tokenizer, "reference": reference}

    def tokenizer_identity(self, frozen: PyTree) -> dict[str, Any]:
        return self.tokenizer.identity(frozen_tokenizer(frozen))

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array, plan: Plan
    ) -> tuple[TrainState, Metrics]:
        batch = self.with_draws(batch, jax.random.fold_in(key, state.step))
        objective = self.cross_entropy if self.cca is None else self.contrast

        def loss_fn(params, batch):
            return objective(params, frozen, batch)

        grads, means = accumulated_gradients(loss_fn, state.params, batch, self.accumulate)
        metrics = self._metrics(means.pop("loss_K"), means.pop("accuracy_K")) | means
        state, update_metrics = self.update(state, grads, plan)
        return state, metrics | update_metrics

    def update(self, state: TrainState, grads: PyTree, plan: Plan) -> tuple[TrainState, Metrics]:
        """Applies gradients, as `apply_gradients` does with the settings of this task."""
        return apply_gradients(
            state, grads, self.optimizer, plan, self.ema_decay, ema_warmup=self.ema_warmup
        )

    def with_draws(self, batch: Batch, key: jax.Array) -> Batch:
        """Adds what a step draws: dropped labels and paths, and with `cca` "other_label_B"."""
        label_key, path_key = jax.random.split(key)
        label_B, passes = batch["label_B"], 1
        drop = functools.partial(
            drop_labels, label_key, rate=self.class_dropout, classes=self.model.classes
        )
        batch = batch | {"label_B": drop(label_B)}
        if self.cca is not None:
            # The next image's label. The same key drops both labels of an image, or neither.
            batch["other_label_B"] = drop(jnp.roll(label_B, -1))
            passes = 4  # each label, by the trained model and by the reference
        branch_scale_S2N = drop_path(
            path_key, self.model.depth, passes * len(label_B), self.drop_path
        )
        if branch_scale_S2N is not None:  # batch axis first, because microbatches split that axis
            scale_NS2 = jnp.moveaxis(branch_scale_S2N, -1, 0)
            batch["branch_scale_BUS2"] = scale_NS2.reshape(-1, passes, *scale_NS2.shape[1:])
        return batch

    def cross_entropy(
        self, params: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, Metrics]:
        """Computes the mean loss of all tokens, and the metrics' means by scale."""
        losses = self.token_losses(params, frozen, batch)
        return jnp.mean(losses.objective_BL), self._means(
            losses.cross_entropy_BL, losses.correct_BL
        )

    def contrast(self, params: PyTree, frozen: PyTree, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Computes `cca_loss`, and the metrics' means; the batch has "other_label_B", too."""
        assert self.cca is not None
        tokens_BL, _ = teacher_forcing.targets_and_inputs(
            self.tokenizer, frozen_tokenizer(frozen), batch, self.compute
        )
        # Rows 2b and 2b + 1 are image b with both labels, so each device keeps its own images.
        label_B2 = jnp.stack([batch["label_B"], batch["other_label_B"]], axis=1)
        pairs = {"tokens_BL": jnp.repeat(tokens_BL, 2, axis=0), "label_B": label_B2.reshape(-1)}

        def log_probability(params: PyTree, passes: slice) -> tuple[jax.Array, TokenLosses]:
            paths = {}
            if "branch_scale_BUS2" in batch:
                paths = {"branch_scale_BUS2": batch["branch_scale_BUS2"][:, passes]}
            losses = self.token_losses(params, frozen, pairs | paths)
            return -jnp.sum(losses.cross_entropy_BL, axis=1).reshape(-1, 2), losses

        trained_B2, losses = log_probability(params, slice(0, 2))
        reference_B2, _ = log_probability(frozen["reference"], slice(2, 4))
        log_ratio_B2 = trained_B2 - reference_B2
        matches_B = batch["label_B"] == batch["other_label_B"]
        loss = cca_loss(log_ratio_B2, matches_B, self.cca)
        own_B, other_B = log_ratio_B2.T
        means = self._means(losses.cross_entropy_BL[::2], losses.correct_BL[::2]) | {
            "cca/loss": loss,
            "cca/log_ratio": jnp.mean(own_B),
            "cca/other_log_ratio": jnp.mean(other_B),
            "cca/accuracy": jnp.mean((own_B > other_B).astype(jnp.float32)),
        }
        return loss, means

    def token_losses(self, params: PyTree, frozen: PyTree, batch: Batch) -> TokenLosses:
        """Computes the losses of each token by teacher forcing."""
        tokens_BL, input_BlZ = teacher_forcing.targets_and_inputs(
            self.tokenizer, frozen_tokenizer(frozen), batch, self.compute
        )
        branch_scale_S2B = None
        if "branch_scale_BUS2" in batch:
            scale_BS2 = batch["branch_scale_BUS2"].reshape(-1, self.model.depth, 2)
            branch_scale_S2B = jnp.moveaxis(scale_BS2, 0, -1)
        model = VAR(self.model, self.compute).bind({"params": params})
        logits_BLV = model(input_BlZ, batch["label_B"], branch_scale_S2B)
        loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, tokens_BL)
        correct_BL = (jnp.argmax(logits_BLV, axis=-1) == tokens_BL).astype(jnp.float32)
        if not (smoothing := self.label_smoothing):
            return TokenLosses(tokens_BL, loss_BL, correct_BL, objective_BL=loss_BL)
        uniform_BL = -jnp.mean(jax.nn.log_softmax(logits_BLV), axis=-1)
        objective_BL = (1 - smoothing) * loss_BL + smoothing * uniform_BL
        return TokenLosses(tokens_BL, loss_BL, correct_BL, objective_BL)

    def eval_step(self, state: TrainState, frozen: PyTree, batch: Batch) -> PyTree:
        losses, valid_B = self.token_losses(state.params, frozen, batch), batch["valid_B"]
        codes_KV = code_counts(self.model.pyramid, self.model.vocab, losses.tokens_BL, valid_B)

        def sum_by_scale(x_BL):
            return jnp.sum(jnp.where(valid_B[:, None], self.mean_by_scale(x_BL), 0), axis=0)

        return {
            "images": jnp.sum(valid_B),
            "loss_K": sum_by_scale(losses.cross_entropy_BL),
            "accuracy_K": sum_by_scale(losses.correct_BL),
            "codes_KV": codes_KV,
        }

    def eval_metrics(self, sums: PyTree) -> dict[str, Any]:
        """Computes the metrics of training, and how the images use the codebook at each scale.

        `code_perplexity_at_scale` is the perplexity of a model that knows only how often each code
        occurs. `code_usage_at_scale` is the fraction of codes that occur.
        """
        images, codes_KV = sums["images"], sums["codes_KV"]
        metrics = self._metrics(sums["loss_K"] / images, sums["accuracy_K"] / images)
        metrics["code_perplexity_at_scale"] = code_perplexity(codes_KV, np)
        metrics["code_usage_at_scale"] = np.mean(codes_KV > 0, axis=1)
        return metrics

    def preview(self, state: TrainState, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        samples = transformer_task.preview_samples(
            self.sampler(), state.params, frozen, self.model.classes
        )
        tokenizer = frozen_tokenizer(frozen)
        rebuilt = teacher_forcing.reconstructions(self.tokenizer, tokenizer, batch, self.compute)
        return {"samples": samples, "reconstructions": rebuilt}

    def sampler(self) -> ImageSampler:
        def draw(params, frozen, label_B, key_B):
            return sample_images(
                VARModels(self.tokenizer, self.model, self.compute),
                {"tokenizer": frozen_tokenizer(frozen), "var": params},
                label_B,
                key_B,
                self.sampling,
                guided=guided_scales(self.model.pyramid, self.sampling),
            )

        return draw

    def mean_by_scale(self, x_BL: jax.Array) -> jax.Array:
        """Averages numbers of tokens over each scale of an image, (B, K)."""
        means = [jnp.mean(x_BL[:, scale], axis=1) for scale in self.model.pyramid.slices]
        return jnp.stack(means, axis=1)

    def _means(self, cross_entropy_BL: jax.Array, correct_BL: jax.Array) -> Metrics:
        """Averages what the metrics of training need over images and each scale's tokens."""
        named = {"loss_K": cross_entropy_BL, "accuracy_K": correct_BL}
        return {name: jnp.mean(self.mean_by_scale(x_BL), axis=0) for name, x_BL in named.items()}

    def _metrics(self, loss_K: Any, accuracy_K: Any) -> dict[str, Any]:
        """Returns metrics from the means of each scale, arrays of JAX or NumPy."""
        lengths_K = np.array(self.model.pyramid.lengths, np.float32)
        weight_K = lengths_K / lengths_K.sum()
        return {
            "loss": (weight_K * loss_K).sum(),
            "accuracy": (weight_K * accuracy_K).sum(),
            "loss_last": loss_K[-1],
            "accuracy_last": accuracy_K[-1],
            "loss_at_scale": loss_K,
            "accuracy_at_scale": accuracy_K,
            "perplexity_at_scale": (jnp if isinstance(loss_K, jax.Array) else np).exp(loss_K),
        }


def matching_rows(here: VARConfig, there: VARConfig) -> MatchingRows:
    """Finds matching rows of embedding tables that do not match as a whole.

    With other classes, only "no class" matches. With other scales, levels and positions of token
    maps with the same height and width match.

    Returns:
        {parameter: (rows here, rows there)}.
    """
    rows: MatchingRows = {}
    if here.classes != there.classes:
        rows["class_embed"] = [here.classes], [there.classes]
    a, b = here.pyramid, there.pyramid
    if a.shapes != b.shapes:
        levels = [(a.shapes.index(s), b.shapes.index(s)) for s in a.shapes if s in b.shapes]
        rows["level_embed"] = [i for i, _ in levels], [j for _, j in levels]
        rows["pos_embed"] = (
            [row for i, _ in levels for row in range(a.slices[i].start, a.slices[i].stop)],
            [row for _, j in levels for row in range(b.slices[j].start, b.slices[j].stop)],
        )
    return rows
