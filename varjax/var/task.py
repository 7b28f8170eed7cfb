"""Training the transformer: cross-entropy of the next scale's tokens under teacher forcing."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from varjax import trees
from varjax.checkpoints.model_files import read_generator
from varjax.errors import check_setting
from varjax.nn.compute import ComputeConfig, without_repeated_work
from varjax.nn.transformer import drop_path
from varjax.runtime import flops
from varjax.sampling.sampler import image_keys
from varjax.tokenizers.contract import check_image_shape
from varjax.tokenizers.load import read_frozen_tokenizer
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.quantizer import code_counts, code_perplexity
from varjax.training.optimizer import AdamW
from varjax.training.task import (
    Batch,
    ImageSampler,
    MatchingRows,
    Plan,
    TrainState,
    check_classes,
    class_dropout_notes,
    ema_notes,
)
from varjax.training.train_step import (
    accumulated_gradients,
    apply_gradients,
    check_microbatches,
    create_state,
)
from varjax.trees import PyTree
from varjax.var import teacher_forcing
from varjax.var.model import VAR, VARConfig, check_fit
from varjax.var.sample import VAROptions, sample_images

# What the reference does not decay: biases, positions, levels, AdaLN tables, attention scales.
DECAYED = ((r"(kernel|class_embed)$", True), (r"", False))
PREVIEW_SAMPLES = 16


@dataclasses.dataclass(frozen=True)
class VARTask:
    """Trains a transformer to predict the tokens of the next scale (VAR, section 3.1).

    Attributes:
        model: config of the transformer.
        tokenizer: config of the frozen tokenizer.
        tokenizer_weights: tokenizer's run or converted directory, whose config must equal
            `tokenizer`; or "random" for an untrained tokenizer, whose tokens mean nothing.
        optimizer: AdamW and its schedule.
        class_dropout: fraction of images whose label becomes "no class".
        drop_path: fraction of residual branches that the last layer drops.
        label_smoothing: fraction of the targets' probability that is spread over all codes.
        ema_decay: decay of the parameters' exponential moving average; 0 for none.
        accumulate: number of microbatches whose gradients are averaged in a step.
        compute: number format and execution.
        sampling: sampling options that suit the model, for previews and as the default after
            loading.
        plan: length of the run; the loop fills it in.
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
    plan: Plan = Plan()

    def __post_init__(self):
        check_fit(self.tokenizer, self.model)
        self.sampling.check()
        for name in ("class_dropout", "label_smoothing", "ema_decay"):
            value = getattr(self, name)
            check_setting(name, value, 0 <= value <= 1, "in [0, 1]")
        # What is kept is divided by the share that is kept.
        rate = self.drop_path
        check_setting("drop_path", rate, 0 <= rate < 1, "at least 0 and below 1")

    def check(self, image_shape: tuple[int, int, int], classes: int) -> None:
        check_image_shape(self.tokenizer, image_shape)
        check_microbatches(self.plan.batch_size, self.accumulate)
        check_classes(classes, self.model.classes)

    def notes(self) -> list[str]:
        dropout, cfg = self.class_dropout, self.sampling.cfg
        notes = class_dropout_notes(dropout, self.model.classes, cfg, off=0)
        return notes + ema_notes(self.ema_decay, self.plan)

    def init(self, key: jax.Array) -> TrainState:
        params = self.model.init(key)
        return create_state(params, self.transformation(params), self.ema_decay)

    def pretrained(self, location: str) -> tuple[PyTree, MatchingRows]:
        there, params, _ = read_generator(location, "var", "VARTask", VARConfig, VAROptions)
        return params, matching_rows(self.model, there)

    def frozen(self) -> PyTree:
        """Reads the tokenizer's parameters; raises InputError where they are another's."""
        return read_frozen_tokenizer(self.tokenizer_weights, self.tokenizer)

    def tokenizer_identity(self, frozen: PyTree) -> dict[str, Any]:
        return self.tokenizer.identity(frozen)

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        label_key, path_key = jax.random.split(jax.random.fold_in(key, state.step))
        label_B = batch["label_B"]
        B = len(label_B)
        dropped_B = jax.random.bernoulli(label_key, self.class_dropout, (B,))
        batch = batch | {"label_B": jnp.where(dropped_B, self.model.classes, label_B)}
        keep_S2B = drop_path(path_key, self.model.depth, B, self.drop_path)
        if keep_S2B is not None:
            batch["keep_BS2"] = jnp.moveaxis(keep_S2B, -1, 0)

        def loss_fn(params, batch):
            of = self.token_losses(params, frozen, batch)
            means = {name: self._by_scale(of[f"{name}_BL"]) for name in ("loss", "correct")}
            return jnp.mean(of["smooth_BL"]), means

        grads, means = accumulated_gradients(loss_fn, state.params, batch, self.accumulate)
        metrics = self._metrics(means["loss"], means["correct"], xp=jnp)
        state, norms = apply_gradients(
            state, grads, self.transformation(state.params), self.ema_decay
        )
        return state, metrics | norms | {"lr": self.optimizer.lr(state.step - 1, self.plan)}

    def train_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        compute = without_repeated_work(self.compute)
        plain = dataclasses.replace(self, compute=compute)
        return flops.count(plain.train_step, state, frozen, batch, jax.random.key(0))

    def token_losses(self, params: PyTree, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Computes losses of each token by teacher forcing.

        Returns:
            "tokens_BL", the right codes; "loss_BL", their cross-entropy; "correct_BL", 1 where they
            are the likeliest, else 0; "smooth_BL", the loss to train on: (1-ε)·loss + ε·(mean of
            -log p over all codes), with ε the label smoothing.
        """
        model = VAR(self.model, self.compute).bind({"params": params})
        given = self.tokenizer, frozen, batch, self.compute
        tokens_BL, input_BlZ = teacher_forcing.targets_and_inputs(*given)
        keep_S2B = None if "keep_BS2" not in batch else jnp.moveaxis(batch["keep_BS2"], 0, -1)
        logits_BLV = model(input_BlZ, batch["label_B"], keep_S2B)
        loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, tokens_BL)
        smooth_BL, smoothing = loss_BL, self.label_smoothing
        if smoothing:
            uniform_BL = -jnp.mean(jax.nn.log_softmax(logits_BLV), axis=-1)
            smooth_BL = (1 - smoothing) * loss_BL + smoothing * uniform_BL
        return {
            "tokens_BL": tokens_BL,
            "loss_BL": loss_BL,
            "correct_BL": (jnp.argmax(logits_BLV, axis=-1) == tokens_BL).astype(jnp.float32),
            "smooth_BL": smooth_BL,
        }

    def eval_step(self, state: TrainState, frozen: PyTree, batch: Batch) -> PyTree:
        of, valid_B = self.token_losses(state.params, frozen, batch), batch["valid_B"]

        def summed(x_BL):
            return self._by_scale(jnp.where(valid_B[:, None], x_BL, 0)) * len(x_BL)

        return {
            "images": jnp.sum(valid_B),
            "loss_K": summed(of["loss_BL"]),
            "correct_K": summed(of["correct_BL"]),
            "codes_KV": code_counts(self.model.pyramid, self.model.vocab, of["tokens_BL"], valid_B),
        }

    def eval_metrics(self, sums: PyTree) -> dict[str, Any]:
        """Computes the metrics of training, and how the images use the codebook at each scale.

        `code_perplexity_at_scale` is what a model would reach that knew no more than how often each
        code occurs; `code_usage_at_scale` is the share of codes that occur.
        """
        images, codes_KV = sums["images"], sums["codes_KV"]
        metrics = self._metrics(sums["loss_K"] / images, sums["correct_K"] / images, xp=np)
        metrics["code_perplexity_at_scale"] = code_perplexity(codes_KV, np)
        metrics["code_usage_at_scale"] = np.mean(codes_KV > 0, axis=1)
        return metrics

    def preview(self, state: TrainState, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Samples the first classes, from the same seeds always, and reconstructs images."""
        label_B = jnp.arange(PREVIEW_SAMPLES) % self.model.classes
        key_B = image_keys(0, jnp.arange(PREVIEW_SAMPLES))
        images_BHWC = self.sampler()(state.params, frozen, label_B, key_B)
        kept = teacher_forcing.reconstructions(self.tokenizer, frozen, batch, self.compute)
        return {"samples": images_BHWC, "reconstructions": kept}

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
                guided=self.sampling.cfg > 0,
            )

        return draw

    def _by_scale(self, x_BL):
        """Averages over the tokens of each scale, (K,)."""
        return jnp.stack([jnp.mean(x_BL[:, scale]) for scale in self.model.pyramid.slices])

    def _metrics(self, loss_K, correct_K, xp):
        """xp: jnp, or np for host arrays."""
        lengths_K = np.array(self.model.pyramid.lengths, np.float32)
        weight_K = lengths_K / lengths_K.sum()
        return {
            "loss": xp.sum(weight_K * loss_K),
            "accuracy": xp.sum(weight_K * correct_K),
            "loss_last": loss_K[-1],
            "accuracy_last": correct_K[-1],
            "loss_at_scale": loss_K,
            "accuracy_at_scale": correct_K,
            "perplexity_at_scale": xp.exp(loss_K),
        }

    def transformation(self, params: PyTree) -> optax.GradientTransformation:
        """Makes the optimizer."""
        decay = trees.map_with_path(lambda path, _: trees.first_match(DECAYED, path), params)
        return self.optimizer.make(self.plan, decay)


def matching_rows(here: VARConfig, there: VARConfig) -> MatchingRows:
    """Finds rows of the embeddings that mean the same in both, where the whole tables do not.

    With other classes that is "no class" alone; with other scales, levels and positions of the
    token maps whose height and width are in both lists.

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
