"""The adversarial loss: what a discriminator learns, and what it says of reconstructions."""

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax

from varjax.core import trees
from varjax.core.errors import InputError
from varjax.core.trees import PyTree
from varjax.tokenizers.losses.diffaugment import Augmentation
from varjax.tokenizers.losses.discriminator import (
    NORM_GROUP,
    SMALLEST,
    PatchDiscriminator,
    StyleDiscriminator,
)
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan, TrainState
from varjax.training.train_step import Metrics, apply, start

LECAM_DECAY = 0.999
MAX_BALANCE = 1e4  # taming-transformers' bound and offset
OFFSET = 1e-4


@dataclasses.dataclass(frozen=True)
class Adversary:
    """A discriminator, and what it adds to the tokenizer's loss: `weight` times its verdict.

    kind: "patch" or "style", see `discriminator.py`; layers: of "patch". start: the fraction of the
    run after which the discriminator begins to learn; over the following fraction `ramp`, `weight`
    rises to its value. adaptive: `weight` is multiplied by the balance of gradients, see `balance`.
    r1, lecam: weights of the regularizers of the discriminator. diffaugment: what it sees images
    through. Raises InputError for what cannot work.
    """

    kind: Literal["patch", "style"] = "patch"
    width: int = 64
    layers: int = 3
    loss: Literal["hinge", "non_saturating"] = "hinge"
    weight: float = 0.5
    adaptive: bool = True
    start: float = 0.2
    ramp: float = 0.02
    r1: float = 0.0
    lecam: float = 0.0
    diffaugment: tuple[Augmentation, ...] = ()
    optimizer: AdamW = AdamW(b1=0.5, b2=0.9, weight_decay=0.0)

    def __post_init__(self):
        multiple = NORM_GROUP // 2 if self.kind == "patch" else 1
        for name, sensible, allowed in (
            ("width", self.width > 0 and self.width % multiple == 0, f"a multiple of {multiple}"),
            ("layers", self.layers >= 1, "1 or more"),
            ("weight", self.weight > 0, "above 0; task.adversary=none turns it off"),
            ("start", 0 <= self.start < 1, "a fraction of the run, at least 0 and below 1"),
            ("ramp", 0 <= self.ramp <= 1, "a fraction of the run"),
            ("r1", self.r1 >= 0, "0 (off) or more"),
            ("lecam", self.lecam >= 0, "0 (off) or more"),
        ):
            if not sensible:
                raise InputError(f"adversary.{name}={getattr(self, name)}: must be {allowed}")

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raises InputError for images that the discriminator is too deep for."""
        least = 3 * 2**self.layers if self.kind == "patch" else SMALLEST
        if min(image_shape[:2]) < least:
            raise InputError(
                f"images of {image_shape[:2]} are too small for adversary.kind={self.kind!r}: it "
                f"needs {least} pixels a side; for smaller ones set fewer adversary.layers"
            )

    def module(self, dtype: Any = jnp.float32) -> PatchDiscriminator | StyleDiscriminator:
        if self.kind == "patch":
            return PatchDiscriminator(self.width, self.layers, dtype)
        return StyleDiscriminator(self.width, dtype)

    def first_step(self, plan: Plan) -> int:
        """The number of updates that the tokenizer makes before the discriminator's first."""
        return round(self.start * plan.steps)

    def share(self, step: jax.Array, plan: Plan) -> jax.Array:
        """The part of `weight` that counts in update number `step`, from 0: 0 … 1."""
        rising = (step + 1 - self.first_step(plan)) / max(round(self.ramp * plan.steps), 1)
        return jnp.clip(rising, 0, 1)


def generator_loss(kind: str, fake: jax.Array) -> jax.Array:
    """The tokenizer's, of the logits of its reconstructions: it wants them high."""
    return -jnp.mean(fake) if kind == "hinge" else jnp.mean(jax.nn.softplus(-fake))


def discriminator_loss(kind: str, real: jax.Array, fake: jax.Array) -> jax.Array:
    """The discriminator's: the mean of what is wrong with both kinds of logits."""
    if kind == "hinge":
        return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2
    return (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))) / 2


def lecam_loss(real: jax.Array, fake: jax.Array, anchors: "Anchors") -> jax.Array:
    """How far logits went beyond the running means of the other kind (arXiv 2104.03310, eq. 5)."""
    high = jnp.mean(jnp.square(jax.nn.relu(real - anchors.fake)))
    return high + jnp.mean(jnp.square(jax.nn.relu(anchors.real - fake)))


def balance(reconstruction: jax.Array, adversarial: jax.Array) -> jax.Array:
    """|∇ reconstruction| / |∇ adversarial|, at most 10⁴; both at the decoder's last kernel.

    The adversarial loss, so multiplied, pulls as hard as pixels and LPIPS (VQGAN's eq. 7).
    """
    ratio = optax.tree.norm(reconstruction) / (optax.tree.norm(adversarial) + OFFSET)
    return jnp.clip(ratio, 0, MAX_BALANCE)


@flax.struct.dataclass
class Anchors:
    """Running means of the logits of images and of reconstructions."""

    real: jax.Array
    fake: jax.Array


@flax.struct.dataclass
class Opponent:
    """The discriminator in training: its parameters and moments, and LeCam's anchors."""

    state: TrainState
    anchors: Anchors


def start_opponent(
    adversary: Adversary, image_shape: tuple[int, int, int], plan: Plan, key: jax.Array
) -> Opponent:
    """The discriminator before its first update."""
    params = adversary.module().init(key, jnp.zeros((1, *image_shape)))["params"]
    anchors = Anchors(jnp.float32(0), jnp.float32(0))
    return Opponent(start(params, _optimizer(adversary, params, plan)), anchors)


def update_opponent(
    adversary: Adversary, opponent: Opponent, grads: PyTree, said: Anchors, step, plan: Plan
) -> tuple[Opponent, Metrics]:
    """The discriminator after update number `step` of the tokenizer: as before, until `start`.

    said: the means of its logits in this step.
    """
    state, norms = apply(opponent.state, grads, _optimizer(adversary, opponent.state.params, plan))
    anchors = jax.tree.map(
        lambda mean, now: LECAM_DECAY * mean + (1 - LECAM_DECAY) * now, opponent.anchors, said
    )
    begun = step >= adversary.first_step(plan)
    after = jax.tree.map(
        lambda new, old: jnp.where(begun, new, old), Opponent(state, anchors), opponent
    )
    lr = jnp.where(begun, adversary.optimizer.lr(opponent.state.step, _own(adversary, plan)), 0)
    return after, {"grad_norm": norms["grad_norm"], "lr": lr}


def _optimizer(adversary, params, plan):
    decay = trees.map_with_path(lambda path, _: path.endswith("kernel"), params)
    return adversary.optimizer.make(_own(adversary, plan), decay)


def _own(adversary, plan):
    """The part of the run that the discriminator takes part in."""
    return Plan(plan.steps - adversary.first_step(plan), plan.batch_size)
