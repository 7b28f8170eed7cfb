"""Defines a minimal task: a two-layer classifier of digits, with dropout and EMA."""

import dataclasses
import json
import pathlib

import chex
import jax
import jax.numpy as jnp
import numpy as np

from varjax.checkpoints.saved_steps import SavedSteps
from varjax.data.sources import Digits
from varjax.runtime import flops
from varjax.storage import files
from varjax.storage.buckets import as_path
from varjax.training import goodput, train_step
from varjax.training.experiment import Experiment
from varjax.training.fid_evaluation import FIDConfig
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan


@dataclasses.dataclass(frozen=True)
class Tiny:
    width: int = 16
    dropout: float = 0.1
    ema_decay: float = 0.9
    ema_warmup: bool = False
    accumulate: int = 1
    optimizer: AdamW = AdamW(base_lr=0.1)
    explode_at: int = -1  # the first step with NaN gradients
    explode_steps: int = 1  # number of such steps
    offset_file: str = ""  # a file with a number: the "pretrained weight"

    def check(self, image_shape, classes):
        assert (image_shape, classes) == ((8, 8, 1), 10)

    def notes(self, plan):
        return []

    def init(self, key):
        up, down = jax.random.split(key)
        params = {
            "up": {
                "kernel": 0.1 * jax.random.normal(up, (64, self.width)),
                "bias": jnp.zeros(self.width),
            },
            "down": {"kernel": 0.1 * jax.random.normal(down, (self.width, 10))},
        }
        return train_step.create_state(params, self.optimizer, self.ema_decay)

    def pretrained(self, location):
        tree, _ = files.read_tensors(location)
        return tree, {"up/bias": ([0, 1], [1, 3])}

    def with_tokenizer_of(self, location):
        return self

    def frozen(self):
        if not self.offset_file:
            return {}
        return {"offset": np.float32(pathlib.Path(self.offset_file).read_text())}

    def train_step(self, state, frozen, batch, key, plan):
        key = jax.random.fold_in(key, state.step)
        shape = (batch["label_B"].shape[0], self.width)
        keep_BC = jax.random.bernoulli(key, 1 - self.dropout, shape).astype(jnp.float32)

        def loss_fn(params, batch):
            logits_BV = _logits(params, frozen, batch, batch["keep_BC"])
            loss = jnp.mean(_cross_entropy(logits_BV, batch["label_B"]))
            return loss, {"loss": loss, "mean_logit": jnp.mean(logits_BV, axis=0)}

        batch = batch | {"keep_BC": keep_BC}
        grads, metrics = train_step.accumulated_gradients(
            loss_fn, state.params, batch, self.accumulate
        )
        since = state.step - self.explode_at
        explodes = (self.explode_at >= 0) & (since >= 0) & (since < self.explode_steps)
        grads = jax.tree.map(lambda g: jnp.where(explodes, jnp.nan, g), grads)
        state, update_metrics = train_step.apply_gradients(
            state, grads, self.optimizer, plan, self.ema_decay, ema_warmup=self.ema_warmup
        )
        return state, metrics | update_metrics

    def train_flops(self, state, frozen, batch):
        return flops.count(self.train_step, state, frozen, batch, jax.random.key(0), Plan())

    def eval_step(self, state, frozen, batch):
        valid_B = batch["valid_B"].astype(jnp.float32)
        logits_BV = _logits(state.params, frozen, batch, 1.0)
        right_B = (jnp.argmax(logits_BV, axis=-1) == batch["label_B"]).astype(jnp.float32)
        loss_B = _cross_entropy(logits_BV, batch["label_B"])
        return {
            "n": valid_B.sum(),
            "loss": (loss_B * valid_B).sum(),
            "right": (right_B * valid_B).sum(),
        }

    def eval_metrics(self, sums):
        return {"loss": sums["loss"] / sums["n"], "accuracy": sums["right"] / sums["n"]}

    def preview(self, state, frozen, batch):
        return {"inputs": batch["image_BHWC"][:5].astype(jnp.float32) / 255}

    def sampler(self):
        """Returns a sampler of noise, scaled by a parameter, with white rows for the label."""

        def draw(params, frozen, label_B, key_B):
            noise_BHWC = jax.vmap(lambda key: jax.random.uniform(key, (8, 8, 1)))(key_B)
            dark_BHWC = noise_BHWC * jax.nn.sigmoid(jnp.mean(params["up"]["kernel"]))
            # Row 0 for label 0, rows 0 and 1 for label 1, …; all rows for labels 7 to 9.
            white_BH = jnp.arange(8)[None] <= label_B[:, None]
            return jnp.where(white_BH[..., None, None], 1.0, dark_BHWC)

        return draw


def _logits(params, frozen, batch, keep_BC):
    x_BC = batch["image_BHWC"].reshape(-1, 64).astype(jnp.float32) / 255
    x_BC = x_BC + frozen.get("offset", jnp.float32(0)).astype(jnp.float32)
    h_BC = jnp.tanh(x_BC @ params["up"]["kernel"] + params["up"]["bias"][None]) * keep_BC
    return h_BC @ params["down"]["kernel"]


def _cross_entropy(logits_BV, label_B):
    return -jnp.take_along_axis(jax.nn.log_softmax(logits_BV), label_B[:, None], axis=1)[:, 0]


def experiment(run_dir, **changes):
    task = Tiny(**{k: changes.pop(k) for k in list(changes) if k in Tiny.__dataclass_fields__})
    if isinstance(fid := changes.get("fid"), dict):  # in processes that receive settings as JSON
        changes["fid"] = FIDConfig(**fid)
    defaults = dict(steps=30, batch_size=64, log_every=5, eval_every=10, save_every=10)
    return Experiment(task, Digits(shift=1.0), str(run_dir), **(defaults | changes))


TIMING = {"images_per_second", "step_seconds", "tflops_per_device", "mfu", "step_tflop"}
TIMING |= {"parameters", "data_wait", "data_wait_fraction", "memory_gb", "memory_peak_gb"}


def lines(run_dir):
    """Returns metrics.jsonl without timings and without lines that contain only timings."""
    text = (as_path(run_dir) / "metrics.jsonl").read_text()
    parsed = [json.loads(line) for line in text.splitlines()]
    timeless = [
        {k: v for k, v in line.items() if k not in TIMING and not k.startswith(goodput.PREFIX)}
        for line in parsed
    ]
    return [line for line in timeless if line.keys() != {"step"}]


def weights(run_dir, ema=False, kind="checkpoints"):
    """Returns the step and the parameters or EMA of the newest checkpoint of a kind."""
    saved = SavedSteps(as_path(run_dir) / kind)
    step = saved.steps()[-1]
    return step, saved.params(step, ema)


def assert_same_run(a, b):
    for kind in ("checkpoints", "best"):
        for ema in (False, True):
            both = (weights(run_dir, ema, kind) for run_dir in (a, b))
            chex.assert_trees_all_equal(*both)
    assert lines(a) == lines(b)
