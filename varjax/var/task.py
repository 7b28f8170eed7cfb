"""Training the transformer: cross-entropy of the next scale's tokens under teacher forcing."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from varjax.checkpoints.weights import open_weights, read_frozen_tokenizer, read_generator
from varjax.errors import check_setting
from varjax.nn.compute import ComputeConfig
from varjax.nn.transformer import drop_path
from varjax.tokenizers.contract import check_image_shape
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.quantizer import code_counts, code_perplexity
from varjax.training.optimizer import AdamW
from varjax.training.task import Batch, ImageSampler, MatchingRows, Plan, TrainState
from varjax.training.train_step import (
    Metrics,
    accumulated_gradients,
    apply_gradients,
    create_state,
)
from varjax.training.transformer_task import (
    check_classes,
    drop_labels,
    preview_samples,
    train_flops,
    transformer_notes,
)
from varjax.trees import PyTree
from varjax.var import teacher_forcing
from varjax.var.model import VAR, VARConfig, check_fit
from varjax.var.sample import VAROptions, sample_images


class TokenLosses(NamedTuple):
    """Holds losses of each token under teacher forcing.

    Attributes:
        tokens_BL: codes of the targets.
        cross_entropy_BL: cross-entropy of the target.
        correct_BL: 1 where the target is the likeliest code, else 0.
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
        accumulate: number of microbatches whose gradients are averaged in a step.
        compute: number format and execution.
        sampling: sampling options that suit the model, for previews and as the default after
            loading.
    """

    model: VARConfig
    tokenizer: VQConfig
    tokenizer_weights: str
    optimizer: AdamW = AdamW()
    class_dropout: float = 0.1
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    ema_decay: float = 0.0
    accumulate: int = 1
    compute: ComputeConfig = ComputeConfig()
    sampling: VAROptions = VAROptions()

    def __post_init__(self):
        check_fit(self.tokenizer, self.model)
        self.sampling.check()
        for name in ("class_dropout", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            check_setting(name, value, 0 <= value <= 1, "in [0, 1]")
        # Kept branches are divided by the fraction kept.
        rate = self.drop_path
        check_setting("drop_path", rate, 0 <= rate < 1, "at least 0 and below 1")

    def check(self, image_shape: tuple[int, int, int], classes: int) -> None:
        check_image_shape(self.tokenizer, image_shape)
        check_classes(classes, self.model.classes)

    def notes(self, plan: Plan) -> list[str]:
        return transformer_notes(self, plan)

    def init(self, key: jax.Array) -> TrainState:
        return create_state(self.model.init(key), self.optimizer, self.ema_decay)

    def pretrained(self, location: str) -> tuple[PyTree, MatchingRows]:
        weights = open_weights(location)
        config, params, _ = read_generator(weights, "var", "VARTask", VARConfig, VAROptions)
        return params, matching_rows(self.model, config)

    def frozen(self) -> PyTree:
        """Reads the tokenizer's parameters; raises InputError if its config differs."""
        return read_frozen_tokenizer(self.tokenizer_weights, self.tokenizer)

    def tokenizer_identity(self, frozen: PyTree) -> dict[str, Any]:
        return self.tokenizer.identity(frozen)

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array, plan: Plan
    ) -> tuple[TrainState, Metrics]:
        label_key, path_key = jax.random.split(jax.random.fold_in(key, state.step))
        label_B, classes = batch["label_B"], self.model.classes
        batch = batch | {"label_B": drop_labels(label_key, label_B, self.class_dropout, classes)}
        branch_scale_S2B = drop_path(path_key, self.model.depth, len(label_B), self.drop_path)
        if branch_scale_S2B is not None:  # batch axis first, because microbatches split that axis
            batch["branch_scale_BS2"] = jnp.moveaxis(branch_scale_S2B, -1, 0)

        def loss_fn(params, batch):
            losses = self.token_losses(params, frozen, batch)
            means = {
                "loss_K": jnp.mean(self.mean_by_scale(losses.cross_entropy_BL), axis=0),
                "accuracy_K": jnp.mean(self.mean_by_scale(losses.correct_BL), axis=0),
            }
            return jnp.mean(losses.objective_BL), means

        grads, means = accumulated_gradients(loss_fn, state.params, batch, self.accumulate)
        metrics = self._metrics(means["loss_K"], means["accuracy_K"])
        state, update_metrics = self.update(state, grads, plan)
        return state, metrics | update_metrics

    def update(self, state: TrainState, grads: PyTree, plan: Plan) -> tuple[TrainState, Metrics]:
        """Applies gradients, as `apply_gradients` does with the settings of this task."""
        return apply_gradients(state, grads, self.optimizer, plan, self.ema_decay)

    def train_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        return train_flops(self, state, frozen, batch)

    def token_losses(self, params: PyTree, frozen: PyTree, batch: Batch) -> TokenLosses:
        """Computes the losses of each token by teacher forcing."""
        tokens_BL, input_BlZ = teacher_forcing.targets_and_inputs(
            self.tokenizer, frozen, batch, self.compute
        )
        branch_scale_S2B = (
            jnp.moveaxis(batch["branch_scale_BS2"], 0, -1) if "branch_scale_BS2" in batch else None
        )
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
        samples = preview_samples(self.sampler(), state.params, frozen, self.model.classes)
        rebuilt = teacher_forcing.reconstructions(self.tokenizer, frozen, batch, self.compute)
        return {"samples": samples, "reconstructions": rebuilt}

    def sampler(self) -> ImageSampler:
        def draw(params, frozen, label_B, key_B):
            return sample_images(
                self.tokenizer,
                self.model,
                {"tokenizer": frozen, "var": params},
                label_B,
                key_B,
                self.sampling,
                compute=self.compute,
                guided=self.sampling.guidance != 1,
            )

        return draw

    def mean_by_scale(self, x_BL: jax.Array) -> jax.Array:
        """Averages numbers of tokens over each scale of an image, (B, K)."""
        means = [jnp.mean(x_BL[:, scale], axis=1) for scale in self.model.pyramid.slices]
        return jnp.stack(means, axis=1)

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
    """Finds rows of the embeddings that mean the same in both, where the whole tables do not.

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
