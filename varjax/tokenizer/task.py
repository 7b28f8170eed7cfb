"""Training the tokenizer: reconstruction and quantizer losses, code usage per scale."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax import flops, trees
from varjax.tokenizer.load import read_tokenizer
from varjax.tokenizer.model import Tokenizer, TokenizerConfig, init_tokenizer
from varjax.tokenizer.quantizer import quantizer_loss
from varjax.training.optimizer import AdamW
from varjax.training.step import apply, check_parts, gradients, start
from varjax.training.task import Batch, Plan, PyTree, Rows, TrainState


@dataclasses.dataclass(frozen=True)
class TokenizerTask:
    """What a tokenizer is trained for: l1·|x̂-x| + l2·|x̂-x|² + the quantizer's loss.

    Images are in [-1, 1] here, as everywhere inside the models. ema: decay of the parameters'
    moving average, 0 for none. accumulate: parts of a batch that are worked off one by one.
    """

    model: TokenizerConfig
    optimizer: AdamW = AdamW(b1=0.9, b2=0.95, weight_decay=0.0)
    l1: float = 0.2
    l2: float = 1.0
    beta: float = 0.25  # commitment: how much the features follow the codes
    ema: float = 0.0
    accumulate: int = 1
    plan: Plan = Plan()

    def __post_init__(self):
        check_share("ema", self.ema)
        for name in ("l1", "l2", "beta"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)}: a weight is 0 (off) or more")

    def check(self, image_shape: tuple[int, int, int], classes: int) -> None:
        check_images(self.model, image_shape)
        check_parts(self.plan.batch_size, self.accumulate)

    def init(self, key: jax.Array) -> TrainState:
        params = init_tokenizer(self.model, key)
        return start(params, self._tx(params), self.ema)

    def pretrained(self, location: str) -> tuple[PyTree, Rows]:
        return read_tokenizer(location)[1], {}

    def frozen(self) -> PyTree:
        return {}

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        def loss_fn(params, batch):
            losses, tokens_BL = self.losses(params, batch["image_BHWC"])
            means = {name: jnp.mean(loss_B) for name, loss_B in losses.items()}
            frequency_KV = self._counts(tokens_BL, jnp.ones(tokens_BL.shape[0])) / len(tokens_BL)
            return means["loss"], means | {"frequency_KV": frequency_KV}

        grads, metrics = gradients(loss_fn, state.params, batch, self.accumulate)
        state, norms = apply(state, grads, self._tx(state.params), self.ema)
        metrics["perplexity"] = _perplexity(metrics.pop("frequency_KV"), jnp)
        lr = self.optimizer.lr(state.step - 1, self.plan)
        return state, metrics | norms | {"lr": lr}

    def train_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        return flops.count(self.train_step, state, frozen, batch, jax.random.key(0))

    def losses(
        self, params: PyTree, image_BHWC: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Of each image (B,) every term, their weighted sum "loss", PSNR in dB; and tokens (B, L).

        image_BHWC: uint8.
        """
        x_BHWC = to_model(image_BHWC)
        y_BHWC, f_BhwZ, quantized = Tokenizer(self.model).bind({"params": params})(x_BHWC)
        l1_B = jnp.mean(jnp.abs(y_BHWC - x_BHWC), axis=(1, 2, 3))
        l2_B = jnp.mean(jnp.square(y_BHWC - x_BHWC), axis=(1, 2, 3))
        quantizer_B = quantizer_loss(f_BhwZ, quantized.f_hats, self.beta)
        loss_B = self.l1 * l1_B + self.l2 * l2_B + quantizer_B
        # Each image's own: what published figures average. Values span 2, from -1 to 1.
        psnr_B = 10 * jnp.log10(4 / jnp.maximum(l2_B, 1e-12))
        losses = {"loss": loss_B, "psnr": psnr_B, "l1": l1_B, "l2": l2_B, "quantizer": quantizer_B}
        return losses, quantized.tokens_BL

    def eval_step(self, state: TrainState, frozen: PyTree, batch: Batch) -> PyTree:
        valid_B = batch["valid_B"].astype(jnp.float32)
        losses, tokens_BL = self.losses(state.params, batch["image_BHWC"])
        sums = {name: jnp.sum(jnp.where(valid_B > 0, x_B, 0)) for name, x_B in losses.items()}
        counts = {"images": jnp.sum(valid_B), "codes_KV": self._counts(tokens_BL, valid_B)}
        return sums | counts

    def eval_metrics(self, sums: PyTree) -> dict[str, Any]:
        """Means over images, and per scale: code perplexity and the share of codes in use."""
        images, codes_KV = sums.pop("images"), sums.pop("codes_KV")
        metrics = {name: total / images for name, total in sums.items()}
        metrics["perplexity"] = _perplexity(codes_KV / images, np)
        metrics["usage"] = np.mean(codes_KV > 0, axis=1)
        return metrics

    def preview(self, state: TrainState, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Held-out images in the first row, below them their reconstructions, scale by scale."""
        model = Tokenizer(self.model).bind({"params": state.params})
        x_BHWC = to_model(batch["image_BHWC"][:8])
        y_KBHWC = model.decode_every_scale(model.encode(x_BHWC))
        rows = jnp.concatenate([x_BHWC[None], y_KBHWC])
        return {"reconstructions": (rows + 1) / 2}

    def _counts(self, tokens_BL, weight_B):
        """How often each scale uses each code, (K, V)."""
        weight_Bl = weight_B[:, None]
        return jnp.stack(
            [
                jnp.zeros(self.model.vocab).at[tokens_BL[:, scale]].add(weight_Bl)
                for scale in self.model.pyramid.slices
            ]
        )

    def _tx(self, params):
        decay = trees.map_with_path(lambda path, _: path.endswith("kernel"), params)
        return self.optimizer.make(self.plan, decay)


def to_model(image_BHWC: jax.Array) -> jax.Array:
    """uint8 [0, 255] -> float32 [-1, 1], the range of everything inside the models."""
    return image_BHWC.astype(jnp.float32) / 127.5 - 1


def check_images(model: TokenizerConfig, image_shape: tuple[int, int, int]) -> None:
    """Raises ValueError where a tokenizer does not take images of (H, W, channels)."""
    if tuple(image_shape) != model.image_shape:
        raise ValueError(
            f"the data's images are {tuple(image_shape)}, but the tokenizer takes "
            f"{model.image_shape} (height, width, channels); change the data, or the tokenizer's "
            "scales, multipliers or image_channels"
        )


def check_share(name: str, value: float) -> None:
    """Raises ValueError where a probability or the decay of an average lies outside of [0, 1]."""
    if not 0 <= value <= 1:
        raise ValueError(f"{name}={value}: must lie in [0, 1]")


def _perplexity(weight_KV, xp):
    """2^entropy of each row: the number of codes that are used, were they used equally."""
    p_KV = weight_KV / xp.sum(weight_KV, axis=-1, keepdims=True)
    return xp.exp(-xp.sum(p_KV * xp.log(xp.maximum(p_KV, 1e-12)), axis=-1))
