"""Training the transformer: cross-entropy of the next scale's tokens under teacher forcing."""

import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from varjax import flops, trees
from varjax.nn.compute import Compute
from varjax.nn.transformer import drop_path
from varjax.tokenizer.load import load_tokenizer
from varjax.tokenizer.model import Tokenizer, TokenizerConfig, init_tokenizer
from varjax.tokenizer.task import check_images, check_share, to_model
from varjax.training.optimizer import AdamW
from varjax.training.step import apply, check_parts, gradients, start
from varjax.training.task import Batch, Plan, PyTree, Rows, TrainState
from varjax.var.model import VAR, VARConfig, init_var
from varjax.var.pretrained import read_pretrained
from varjax.var.sample import Options, image_keys, sample_images

# What the reference does not decay: biases, positions, levels, AdaLN tables, attention scales.
DECAYED = ((r"(kernel|class_embed)$", True), (r"", False))
RANDOM = "random"


@dataclasses.dataclass(frozen=True)
class VARTask:
    """What a transformer is trained on, and how.

    tokenizer_weights: a tokenizer's run or a converted directory, which must hold `tokenizer`; or
    "random" for an untrained one, whose tokens mean nothing.
    class_dropout: share of images whose label becomes "no class". drop_path: the last layer's.
    ema: decay of the parameters' moving average, 0 for none. sampling: what suits the model, for
    previews and as the default of everybody who loads it.
    """

    model: VARConfig
    tokenizer: TokenizerConfig
    tokenizer_weights: str
    optimizer: AdamW = AdamW()
    class_dropout: float = 0.1
    drop_path: float = 0.0
    label_smoothing: float = 0.0
    ema: float = 0.0
    accumulate: int = 1
    compute: Compute = Compute()
    sampling: Options = Options()
    plan: Plan = Plan()

    def __post_init__(self):
        check_fit(self.tokenizer, self.model)
        self.sampling.check()
        for name in ("class_dropout", "drop_path", "label_smoothing", "ema"):
            check_share(name, getattr(self, name))

    def check(self, image_shape: tuple[int, int, int], classes: int) -> None:
        check_images(self.tokenizer, image_shape)
        check_parts(self.plan.batch_size, self.accumulate)
        if classes != self.model.classes:
            raise ValueError(
                f"the data has {classes} classes, but the model {self.model.classes}; "
                f"set task.model.classes={classes}, or train on other data"
            )

    def init(self, key: jax.Array) -> TrainState:
        params = init_var(self.model, key)
        return start(params, self._tx(params), self.ema)

    def pretrained(self, location: str) -> tuple[PyTree, Rows]:
        return read_pretrained(location, self.model)

    def frozen(self) -> PyTree:
        """The tokenizer's parameters; ValueError where they are not those of `tokenizer`."""
        if self.tokenizer_weights == RANDOM:
            print("the tokenizer is RANDOM: good for measuring, not for images", file=sys.stderr)
            init = functools.partial(init_tokenizer, self.tokenizer)
            return jax.device_get(jax.jit(init)(jax.random.key(0)))
        return load_tokenizer(self.tokenizer_weights, self.tokenizer)

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        label_key, path_key = jax.random.split(jax.random.fold_in(key, state.step))
        label_B = batch["label_B"]
        B = len(label_B)
        dropped_B = jax.random.bernoulli(label_key, self.class_dropout, (B,))
        batch = batch | {"label_B": jnp.where(dropped_B, self.model.classes, label_B)}
        keep_N2B = drop_path(path_key, self.model.depth, B, self.drop_path)
        if keep_N2B is not None:
            batch["keep_BN2"] = jnp.moveaxis(keep_N2B, -1, 0)

        def loss_fn(params, batch):
            loss_BL, correct_BL, smooth_BL = self.token_losses(params, frozen, batch)
            loss_K, correct_K = self._by_scale(loss_BL), self._by_scale(correct_BL)
            metrics = {
                "loss": jnp.mean(loss_BL),
                "accuracy": jnp.mean(correct_BL),
                "loss_last": loss_K[-1],
                "accuracy_last": correct_K[-1],
                "loss_at_scale": loss_K,
                "accuracy_at_scale": correct_K,
            }
            return jnp.mean(smooth_BL), metrics

        grads, metrics = gradients(loss_fn, state.params, batch, self.accumulate)
        state, norms = apply(state, grads, self._tx(state.params), self.ema)
        return state, metrics | norms | {"lr": self.optimizer.lr(state.step - 1, self.plan)}

    def train_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        # Fused kernels hide their products, and what is recomputed is no work of the model's.
        compute = dataclasses.replace(self.compute, remat="none", attention="xla")
        plain = dataclasses.replace(self, compute=compute)
        return flops.count(plain.train_step, state, frozen, batch, jax.random.key(0))

    def token_losses(
        self, params: PyTree, frozen: PyTree, batch: Batch
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Of each token (B, L): cross-entropy, whether it was guessed, cross-entropy as trained.

        The last one has the labels smoothed: (1-ε)·ce + ε·(mean of -log p over all codes).
        """
        tokenizer = Tokenizer(self.tokenizer).bind({"params": frozen})
        model = VAR(self.model, self.compute).bind({"params": params})
        tokens_BL, input_BlZ = tokenizer.encode_to_teach(to_model(batch["image_BHWC"]))
        keep_N2B = None if "keep_BN2" not in batch else jnp.moveaxis(batch["keep_BN2"], 0, -1)
        logits_BLV = model(input_BlZ, batch["label_B"], keep_N2B)
        loss_BL = optax.softmax_cross_entropy_with_integer_labels(logits_BLV, tokens_BL)
        smooth_BL, smoothing = loss_BL, self.label_smoothing
        if smoothing:
            uniform_BL = -jnp.mean(jax.nn.log_softmax(logits_BLV), axis=-1)
            smooth_BL = (1 - smoothing) * loss_BL + smoothing * uniform_BL
        correct_BL = (jnp.argmax(logits_BLV, axis=-1) == tokens_BL).astype(jnp.float32)
        return loss_BL, correct_BL, smooth_BL

    def eval_step(self, state: TrainState, frozen: PyTree, batch: Batch) -> PyTree:
        loss_BL, correct_BL, _ = self.token_losses(state.params, frozen, batch)
        valid_B1 = batch["valid_B"][:, None]
        return {
            "images": jnp.sum(valid_B1),
            "loss_K": self._by_scale(jnp.where(valid_B1, loss_BL, 0)) * len(loss_BL),
            "correct_K": self._by_scale(jnp.where(valid_B1, correct_BL, 0)) * len(loss_BL),
        }

    def eval_metrics(self, sums: PyTree) -> dict[str, Any]:
        loss_K, correct_K = sums["loss_K"] / sums["images"], sums["correct_K"] / sums["images"]
        weight_K = np.array(self.model.pyramid.lengths) / self.model.pyramid.length
        return {
            "loss": np.sum(weight_K * loss_K),
            "accuracy": np.sum(weight_K * correct_K),
            "loss_last": loss_K[-1],
            "accuracy_last": correct_K[-1],
            "loss_at_scale": loss_K,
            "accuracy_at_scale": correct_K,
        }

    def preview(self, state: TrainState, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Samples of the first classes, always from the same seeds."""
        label_B = jnp.arange(16) % self.model.classes
        images_BHWC = sample_images(
            self.tokenizer,
            self.model,
            {"tokenizer": frozen, "var": state.params},
            label_B,
            image_keys(0, jnp.arange(16)),
            self.sampling,
            compute=self.compute,
        )
        return {"samples": images_BHWC}

    def _by_scale(self, x_BL):
        """The mean over the tokens of each scale, (K,)."""
        return jnp.stack([jnp.mean(x_BL[:, scale]) for scale in self.model.pyramid.slices])

    def _tx(self, params):
        decay = trees.map_with_path(lambda path, _: trees.first_match(DECAYED, path), params)
        return self.optimizer.make(self.plan, decay)


def check_fit(tokenizer: TokenizerConfig, var: VARConfig) -> None:
    """Raises ValueError, with all differences, where a transformer cannot read these tokens."""
    fields = ("scales", "vocab", "code_channels")
    pairs = {name: (getattr(tokenizer, name), getattr(var, name)) for name in fields}
    if lines := [f"{n}: tokenizer {a}, transformer {b}" for n, (a, b) in pairs.items() if a != b]:
        raise ValueError("tokenizer and transformer do not fit:\n  " + "\n  ".join(lines))
