"""Training the tokenizer: reconstruction and quantizer losses, code usage per scale."""

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from varjax.core import flops, trees
from varjax.core.errors import InputError
from varjax.core.trees import PyTree
from varjax.nn.autoencoder import to_model_range
from varjax.nn.compute import Compute
from varjax.tokenizers.checks import check_images, check_share
from varjax.tokenizers.load import read_tokenizer
from varjax.tokenizers.losses.gan import Adversary, start_opponent, update_opponent
from varjax.tokenizers.losses.lpips import Perceptual, load_lpips
from varjax.tokenizers.losses.lpips import check_images as check_lpips
from varjax.tokenizers.losses.reconstruction import reconstruction_losses
from varjax.tokenizers.vq.codebook import Codebook, read_inputs
from varjax.tokenizers.vq.gradients import learn
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer
from varjax.tokenizers.vq.quantizer import quantizer_loss
from varjax.tokenizers.vq.usage import count_codes, perplexity
from varjax.training.optimizer import AdamW
from varjax.training.task import Batch, Plan, Rows, TrainState
from varjax.training.train_step import apply_gradients, check_microbatches, create_state


@dataclasses.dataclass(frozen=True)
class VQTask:
    """What a tokenizer is trained for: l1·|x̂-x| + l2·|x̂-x|² + the quantizer's loss, and where
    they are given LPIPS and a discriminator's verdict (VAR's eq. 5).

    Images are in [-1, 1] here, as everywhere inside the models. ema: decay of the parameters'
    moving average, 0 for none. accumulate: parts of a batch that are worked off one by one.
    dtype: of all convolutions in training; "auto" is bfloat16 on an accelerator and float32 on a
    CPU. Evaluation and what the quantizer does are float32 always.

    The state's parameters are the tokenizer's alone, with or without an adversary: the
    discriminator's are as much a tool of training as moments are, and lie beside them, as does how
    often codes are used.
    """

    model: VQConfig
    optimizer: AdamW = AdamW(b1=0.9, b2=0.95, weight_decay=0.0)
    l1: float = 0.2
    l2: float = 1.0
    beta: float = 0.25  # commitment: how much the features follow the codes
    codebook: Codebook = Codebook()
    perceptual: Perceptual | None = None
    adversary: Adversary | None = None
    dtype: Literal["auto", "float32", "bfloat16"] = "float32"
    ema: float = 0.0
    accumulate: int = 1
    plan: Plan = Plan()

    def __post_init__(self):
        check_share("ema", self.ema)
        for name in ("l1", "l2", "beta"):
            if not getattr(self, name) >= 0:
                raise InputError(f"{name}={getattr(self, name)}: a weight is 0 (off) or more")
        self.codebook.check(self.model.pyramid)

    def check(self, image_shape: tuple[int, int, int], classes: int) -> None:
        check_images(self.model, image_shape)
        check_microbatches(self.plan.batch_size, self.accumulate)
        if self.perceptual:
            check_lpips(image_shape)
        if self.adversary:
            self.adversary.check(image_shape)

    def init(self, key: jax.Array) -> TrainState:
        params = self.model.init(key)
        params = self.codebook.start(self.model, params, jax.random.fold_in(key, 2))
        state = create_state(params, self._tx(params), self.ema)
        beside: dict[str, Any] = {**self.codebook.use(self.model)}
        if self.adversary is not None:
            key, shape = jax.random.fold_in(key, 1), self.model.image_shape
            beside["opponent"] = start_opponent(self.adversary, shape, self.plan, key)
        return _joined(state, beside)

    def pretrained(self, location: str) -> tuple[PyTree, Rows]:
        return read_tokenizer(location)[1], {}

    def tokenizer_identity(self, frozen: PyTree) -> dict[str, Any]:
        return {}

    def frozen(self) -> PyTree:
        """LPIPS's parameters where they are needed; ValueError that says how to get them."""
        return {"lpips": load_lpips(self.perceptual.weights)} if self.perceptual else {}

    def train_step(
        self, state: TrainState, frozen: PyTree, batch: Batch, key: jax.Array
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        """One update of the tokenizer, and one of the discriminator on the same reconstructions.

        "loss" is all that does not depend on the adversary, the same as in evaluation.
        """
        state, beside = _parted(state)
        opponent = beside.get("opponent")
        key, step = jax.random.fold_in(key, state.step), state.step
        image_BHWC = batch["image_BHWC"]
        key_B = jax.vmap(functools.partial(jax.random.fold_in, key))(jnp.arange(len(image_BHWC)))
        batch = {"image_BHWC": image_BHWC, "key_B": key_B}
        share = self.adversary.share(step, self.plan) if self.adversary else jnp.float32(0)
        read = functools.partial(read_inputs, self.model, image_BHWC, self.accumulate)
        state = self.codebook.begin(self.model.pyramid, state, read, key)
        learned = learn(self, state.params, opponent, frozen, batch, share)

        state, norms = apply_gradients(state, learned.grads, self._tx(state.params), self.ema)
        metrics = learned.metrics | norms | {"lr": self.optimizer.lr(step, self.plan)}
        metrics["perplexity"] = perplexity(learned.frequency_KV, jnp)
        state, use, restarted = self.codebook.tend(
            self.model.pyramid, state, beside, learned.frequency_KV, read, key
        )
        beside, metrics = beside | use, metrics | restarted
        if self.adversary is not None:
            assert opponent is not None and learned.said is not None
            beside["opponent"], of_opponent = update_opponent(
                self.adversary, opponent, learned.opponent_grads, learned.said, step, self.plan
            )
            metrics |= {f"discriminator/{name}": x for name, x in of_opponent.items()}
        return _joined(state, beside), metrics

    def train_flops(self, state: TrainState, frozen: PyTree, batch: Batch) -> int:
        # Without what comes once in a while.
        codebook = dataclasses.replace(self.codebook, init="uniform", restart_every=0)
        whole = dataclasses.replace(self, accumulate=1, codebook=codebook)
        return flops.count(whole.train_step, state, frozen, batch, jax.random.key(0))

    def losses(
        self, params: PyTree, frozen: PyTree, image_BHWC: jax.Array
    ) -> tuple[dict[str, jax.Array], jax.Array]:
        """Of each image (B,) every term, their weighted sum "loss", PSNR in dB; and tokens (B, L).

        image_BHWC: uint8. The adversary is left out: its verdict says more about itself.
        """
        x_BHWC = to_model_range(image_BHWC)
        y_BHWC, f_BhwZ, quantized = VQTokenizer(self.model).bind({"params": params})(x_BHWC)
        losses = self.reconstruction_losses(frozen, x_BHWC, y_BHWC)
        losses["quantizer"] = quantizer_loss(f_BhwZ, quantized.f_hats, self.beta)
        losses["loss"] = losses["loss"] + losses["quantizer"]
        return losses, quantized.tokens_BL

    def reconstruction_losses(
        self, frozen: PyTree, x_BHWC: jax.Array, y_BHWC: jax.Array, dtype: Any = jnp.float32
    ) -> dict[str, jax.Array]:
        """Of images and reconstructions in [-1, 1], see `losses.py`."""
        weights, lpips_params = {"l1": self.l1, "l2": self.l2}, None
        if self.perceptual:
            weights["perceptual"], lpips_params = self.perceptual.weight, frozen["lpips"]
        return reconstruction_losses(x_BHWC, y_BHWC, weights, lpips_params, dtype)

    def eval_step(self, state: TrainState, frozen: PyTree, batch: Batch) -> PyTree:
        valid_B = batch["valid_B"].astype(jnp.float32)
        losses, tokens_BL = self.losses(state.params, frozen, batch["image_BHWC"])
        sums = {name: jnp.sum(jnp.where(valid_B > 0, x_B, 0)) for name, x_B in losses.items()}
        counts = {"images": jnp.sum(valid_B), "codes_KV": self._counts(tokens_BL, valid_B)}
        return sums | counts

    def eval_metrics(self, sums: PyTree) -> dict[str, Any]:
        """Means over images, and per scale: code perplexity and the share of codes in use."""
        images, codes_KV = sums.pop("images"), sums.pop("codes_KV")
        metrics = {name: total / images for name, total in sums.items()}
        metrics["perplexity"] = perplexity(codes_KV / images, np)
        metrics["usage"] = np.mean(codes_KV > 0, axis=1)
        return metrics

    def preview(self, state: TrainState, frozen: PyTree, batch: Batch) -> dict[str, jax.Array]:
        """Held-out images in the first row, below them their reconstructions, scale by scale."""
        model = VQTokenizer(self.model).bind({"params": state.params})
        x_BHWC = to_model_range(batch["image_BHWC"][:8])
        y_KBHWC = model.decode_every_scale(model.encode(x_BHWC))
        rows = jnp.concatenate([x_BHWC[None], y_KBHWC])
        return {"reconstructions": (rows + 1) / 2}

    def _counts(self, tokens_BL, weight_B):
        return count_codes(self.model.pyramid, self.model.vocab, tokens_BL, weight_B)

    @property
    def jax_dtype(self) -> jnp.dtype:
        """The format that `dtype` stands for on this machine."""
        return Compute(self.dtype).jax_dtype

    def _tx(self, params):
        decay = trees.map_with_path(lambda path, _: path.endswith("kernel"), params)
        return self.optimizer.make(self.plan, decay)


def _joined(state: TrainState, beside: dict[str, Any]) -> TrainState:
    """One state of the tokenizer's and of what else changes, if there is anything."""
    if not beside:
        return state
    return dataclasses.replace(state, opt_state={"tokenizer": state.opt_state} | beside)


def _parted(state: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The tokenizer's own state, and what else there is: an "opponent", "use_V"."""
    if not isinstance(state.opt_state, dict):
        return state, {}
    beside = dict(state.opt_state)
    return dataclasses.replace(state, opt_state=beside.pop("tokenizer")), beside
