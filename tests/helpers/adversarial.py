"""Builds a tiny tokenizer task with a discriminator, for 16x16 images, and its training state."""

import functools
import re

import jax
import numpy as np

from varjax import trees
from varjax.tokenizers.losses.gan import GANConfig
from varjax.tokenizers.losses.lpips import init_lpips
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.task import VQTask
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan, TrainState

CONFIG = VQConfig(
    scales=(1, 2, 16), image_channels=3, width=8, channel_mult=(1,), blocks=1, groups=4, vocab=16,
    code_channels=4,
)  # fmt: skip
OPTIMIZER = AdamW(base_lr=2e-3, schedule="constant", warmup=0.0)
GAN = GANConfig(
    "patch", 8, 1, start=0.5, ramp=0.25, lecam=0.1, diffaugment=("cutout",), optimizer=OPTIMIZER
)
TASK = VQTask(CONFIG, OPTIMIZER, l1=0.0, gan=GAN, ema_decay=0.5)
PLAN = Plan(steps=8, batch_size=256)
BATCH = {"image_BHWC": np.random.default_rng(0).integers(0, 256, (8, 16, 16, 3), np.uint8)}
KEY = jax.random.key(5)
QUICKLY = {"xla_backend_optimization_level": 0}  # halves the compilation time


def state(task: VQTask, step: int) -> TrainState:
    """Returns a state after `step` updates, filled by NumPy, because compiling `init` is slow."""
    rng = np.random.default_rng(1)

    def fill(path, leaf):
        last = path.rpartition("/")[2]
        if last in ("kernel", "phi_kernel", "codebook") and not re.search("/(mu|nu)/", path):
            return np.float32(rng.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape))
        if path != "step" and last == "step":  # the discriminator's own step
            return np.full(leaf.shape, max(step - GAN.first_step(PLAN), 0), leaf.dtype)
        return np.full(leaf.shape, step if path == "step" else last == "scale", leaf.dtype)

    return trees.map_with_path(fill, jax.eval_shape(task.init, KEY))


@functools.cache
def frozen():
    """Returns random weights of LPIPS, with a network narrow enough to compile quickly."""
    widths = tuple((4,) * convolutions for convolutions in (2, 2, 3, 3, 3))
    shapes = jax.eval_shape(functools.partial(init_lpips, widths=widths), KEY)
    rng = np.random.default_rng(0)
    return {"lpips": jax.tree.map(lambda x: np.float32(abs(rng.normal(0, 0.3, x.shape))), shapes)}
