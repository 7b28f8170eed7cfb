"""The adversarial loss of a GAN: settings, losses, gradients, and the discriminator's training."""

import dataclasses
from typing import Any, Literal

import flax.struct
import jax
import jax.numpy as jnp
import optax

from varjax.errors import InputError, check_setting
from varjax.tokenizers.losses.diffaugment import Augmentation, diffaugment
from varjax.tokenizers.losses.discriminator import (
    CHANNELS_PER_NORM,
    STYLE_MIN_SIDE,
    PatchDiscriminator,
    StyleDiscriminator,
)
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan, TrainState
from varjax.training.train_step import Metrics, apply_gradients, create_state
from varjax.trees import PyTree

LECAM_DECAY = 0.999  # as in LeCam's code
MAX_ADAPTIVE_WEIGHT = 1e4  # taming-transformers' bound and epsilon
ADAPTIVE_WEIGHT_EPSILON = 1e-4

GANLoss = Literal["hinge", "non_saturating"]


@dataclasses.dataclass(frozen=True)
class GANConfig:
    """Configures a discriminator and the adversarial loss that it adds to a tokenizer's.

        GANConfig(kind="patch", width=64, start=0.2, lecam=1e-3, diffaugment=("color", "cutout"))

    Raises InputError for a value out of range.

    Attributes:
        kind: kind of discriminator: "patch" (PatchGAN) or "style" (StyleGAN2's); see
            discriminator.py.
        width: channels of the first convolution.
        layers: number of times that "patch" halves the image.
        loss: kind of loss, "hinge" or "non_saturating".
        weight: weight of the adversarial loss.
        adaptive: whether `weight` is multiplied by `adaptive_weight`.
        start: fraction of the run after which the discriminator starts to train.
        ramp: fraction of the run, from `start`, over which the weight rises to its value.
        r1: weight of the discriminator's R1 gradient penalty; 0 for none.
        lecam: weight of the discriminator's LeCam regularizer; 0 for none.
        diffaugment: augmentations of all images that the discriminator sees.
        optimizer: AdamW and its schedule for the discriminator, which begins at `start`.
    """

    kind: Literal["patch", "style"] = "patch"
    width: int = 64
    layers: int = 3
    loss: GANLoss = "hinge"
    weight: float = 0.5
    adaptive: bool = True
    start: float = 0.2
    ramp: float = 0.02
    r1: float = 0.0
    lecam: float = 0.0
    diffaugment: tuple[Augmentation, ...] = ()
    optimizer: AdamW = AdamW(b1=0.5, b2=0.9, weight_decay=0.0)

    def __post_init__(self):
        multiple = CHANNELS_PER_NORM // 2 if self.kind == "patch" else 1
        for name, valid, allowed in (
            ("width", self.width > 0 and self.width % multiple == 0, f"a multiple of {multiple}"),
            ("layers", self.layers >= 1, "1 or more"),
            ("weight", self.weight > 0, "above 0; task.gan=none turns it off"),
            ("start", 0 <= self.start < 1, "a fraction of the run, at least 0 and below 1"),
            ("ramp", 0 <= self.ramp <= 1, "a fraction of the run"),
            ("r1", self.r1 >= 0, "0 (off) or more"),
            ("lecam", self.lecam >= 0, "0 (off) or more"),
        ):
            check_setting(f"gan.{name}", getattr(self, name), valid, allowed)

    def check(self, image_shape: tuple[int, int, int]) -> None:
        """Raises InputError for images (H, W, channels) that the discriminator is too deep for."""
        min_side = 3 * 2**self.layers if self.kind == "patch" else STYLE_MIN_SIDE
        if min(image_shape[:2]) < min_side:
            advice = "; for smaller ones set fewer gan.layers" * (self.kind == "patch")
            raise InputError(
                f"images of {image_shape[:2]} are too small for gan.kind={self.kind!r}: it "
                f"needs {min_side} pixels a side{advice}"
            )

    def discriminator(self, dtype: Any = jnp.float32) -> PatchDiscriminator | StyleDiscriminator:
        """Returns the discriminator's module, which computes in `dtype`."""
        if self.kind == "patch":
            return PatchDiscriminator(self.width, self.layers, dtype)
        return StyleDiscriminator(self.width, dtype)

    def first_step(self, plan: Plan) -> int:
        """Returns the number of the run's update that is the discriminator's first."""
        return round(self.start * plan.steps)

    def has_started(self, updates: jax.Array, step: jax.Array, plan: Plan) -> jax.Array:
        """Returns whether update number `step`, from 0, is one of the discriminator's.

        Once started, it keeps training, even in a fork whose longer plan starts it later.

        Args:
            updates: number of updates that the discriminator has had.
            step: number of the run's update.
            plan: length of the run.
        """
        return (updates > 0) | (step >= self.first_step(plan))

    def ramp_factor(self, updates: jax.Array, step: jax.Array, plan: Plan) -> jax.Array:
        """Returns the part of `weight`, 0 … 1, that counts in an update; see `has_started`."""
        rising = (updates + 1) / max(round(self.ramp * plan.steps), 1)
        return jnp.where(self.has_started(updates, step, plan), jnp.clip(rising, 0, 1), 0)


def generator_loss(kind: GANLoss, fake: jax.Array) -> jax.Array:
    """Computes the tokenizer's adversarial loss, low where logits of reconstructions are high."""
    return -jnp.mean(fake) if kind == "hinge" else jnp.mean(jax.nn.softplus(-fake))


def discriminator_loss(kind: GANLoss, real: jax.Array, fake: jax.Array) -> jax.Array:
    """Computes the discriminator's loss, half from logits of images, half from reconstructions.

    Args:
        kind: kind of loss, "hinge" or "non_saturating".
        real: logits of images, of any shape.
        fake: logits of reconstructions.
    """
    if kind == "hinge":
        return (jnp.mean(jax.nn.relu(1 - real)) + jnp.mean(jax.nn.relu(1 + fake))) / 2
    return (jnp.mean(jax.nn.softplus(-real)) + jnp.mean(jax.nn.softplus(fake))) / 2


@flax.struct.dataclass
class LecamEma:
    """Holds the moving averages of the logits of images (real) and reconstructions (fake)."""

    real: jax.Array
    fake: jax.Array


def lecam_loss(real: jax.Array, fake: jax.Array, ema: LecamEma) -> jax.Array:
    """Computes LeCam's regularizer (arXiv 2104.03310, eq. 5).

    Penalizes logits that go beyond the moving average of the other kind.
    """
    high = jnp.mean(jnp.square(jax.nn.relu(real - ema.fake)))
    return high + jnp.mean(jnp.square(jax.nn.relu(ema.real - fake)))


def r1_loss(logits_fn, params: PyTree, image_BHWC: jax.Array) -> jax.Array:
    """Computes the R1 penalty |∇ D(x)|², a mean over images (arXiv 1801.04406).

    Args:
        logits_fn: (params, images) -> logits (B, h, w), of which each image's mean is D(x).
        params: parameters of the discriminator.
        image_BHWC: real images in [-1, 1].
    """

    def total(image_BHWC):
        return jnp.sum(jnp.mean(logits_fn(params, image_BHWC), axis=(1, 2)))

    return jnp.sum(jnp.square(jax.grad(total)(image_BHWC))) / len(image_BHWC)


def adaptive_weight(
    reconstruction: jax.Array, adversarial: jax.Array, largest: float = MAX_ADAPTIVE_WEIGHT
) -> jax.Array:
    """Computes |∇ reconstruction| / |∇ adversarial|, at most `largest` (VQGAN's eq. 7).

    Below the bound, the adversarial loss multiplied by it pulls as hard as pixels and LPIPS.

    Args:
        reconstruction: gradient of the pixel losses and LPIPS with respect to the decoder's last
            kernel, from `last_layer_grads`.
        adversarial: gradient of the adversarial loss with respect to the decoder's last kernel.
        largest: upper bound of the weight.
    """
    ratio = optax.tree.norm(reconstruction)
    ratio = ratio / (optax.tree.norm(adversarial) + ADAPTIVE_WEIGHT_EPSILON)
    return jnp.clip(ratio, 0, largest)


def last_layer_grads(last_BHWC: jax.Array, image_grad_BHWC: jax.Array) -> jax.Array:
    """Computes a loss's gradient by the decoder's last kernel from its gradient by the image.

    Args:
        last_BHWC: the input of the last convolution.
        image_grad_BHWC: gradient of the loss with respect to the output of the convolution.

    Returns:
        (3, 3, C, channels), as the kernel.
    """

    def convolve(kernel):
        return jax.lax.conv_general_dilated(
            last_BHWC.astype(jnp.float32),
            kernel,
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )

    shape = (3, 3, last_BHWC.shape[-1], image_grad_BHWC.shape[-1])
    kernel = jax.ShapeDtypeStruct(shape, jnp.float32)
    return jax.linear_transpose(convolve, kernel)(image_grad_BHWC)[0]


@flax.struct.dataclass
class DiscriminatorState:
    """Holds a discriminator's state: parameters, optimizer moments, and LeCam's averages."""

    train_state: TrainState
    lecam_ema: LecamEma


@flax.struct.dataclass
class GanGradients:
    """Holds the gradients of both networks' losses, and what is logged; all are means over images.

    Attributes:
        image_grad_BHWC: gradient of the tokenizer's adversarial loss with respect to the
            reconstructions.
        discriminator_grads: gradients of the discriminator's loss with respect to its parameters.
        metrics: scalars "adversarial" and "discriminator/…".
    """

    image_grad_BHWC: jax.Array
    discriminator_grads: PyTree
    metrics: Metrics


def gan_gradients(
    config: GANConfig,
    discriminator: DiscriminatorState,
    real_BHWC: jax.Array,
    fake_BHWC: jax.Array,
    key_B: jax.Array,
    dtype: Any = jnp.float32,
) -> GanGradients:
    """Computes the gradients of the adversarial loss and of the discriminator's own.

    An image and its reconstruction get the same augmentation, from the image's key, so that only
    the reconstruction distinguishes them. Neither loss has a gradient in the other's parameters.

    Args:
        config: settings of the losses and the discriminator.
        discriminator: state of the discriminator.
        real_BHWC: images in [-1, 1].
        fake_BHWC: reconstructions of these images.
        key_B: random keys, one for each image.
        dtype: dtype of the discriminator.
    """
    module, kind = config.discriminator(dtype), config.loss

    def logits_fn(params, image_BHWC):
        augmented_BHWC = diffaugment(image_BHWC, key_B, config.diffaugment)
        return jnp.asarray(module.apply({"params": params}, augmented_BHWC))

    def own_loss(real, fake):
        loss = discriminator_loss(kind, real, fake)
        lecam = lecam_loss(real, fake, discriminator.lecam_ema)
        return loss + config.lecam * lecam, {"loss": loss, "lecam": lecam}

    params = discriminator.train_state.params
    real, real_vjp = jax.vjp(lambda params: logits_fn(params, real_BHWC), params)
    fake, fake_vjp = jax.vjp(logits_fn, params, fake_BHWC)
    loss, logit_grads = jax.value_and_grad(lambda fake: generator_loss(kind, fake))(fake)
    _, image_grad_BHWC = fake_vjp(logit_grads)
    (real_grads, fake_grads), metrics = jax.grad(own_loss, (0, 1), has_aux=True)(real, fake)
    grads = jax.tree.map(jnp.add, real_vjp(real_grads)[0], fake_vjp(fake_grads)[0])
    if config.r1:
        penalty = jax.value_and_grad(lambda params: r1_loss(logits_fn, params, real_BHWC))
        metrics["r1"], r1_grads = penalty(params)
        grads = jax.tree.map(lambda a, b: a + config.r1 / 2 * b, grads, r1_grads)
    right = [jnp.mean((x > 0).astype(jnp.float32)) for x in (real, -fake)]
    metrics |= {"real": jnp.mean(real), "fake": jnp.mean(fake)}
    metrics["accuracy"] = (right[0] + right[1]) / 2
    metrics = {f"discriminator/{name}": x for name, x in metrics.items()}
    return GanGradients(image_grad_BHWC, grads, metrics | {"adversarial": loss})


def create_discriminator(
    config: GANConfig, image_shape: tuple[int, int, int], key: jax.Array
) -> DiscriminatorState:
    """Draws the discriminator's state before its first update.

    Args:
        config: settings, which hold its kind and optimizer.
        image_shape: (H, W, channels) of an image.
        key: random key of the parameters.
    """
    params = config.discriminator().init(key, jnp.zeros((1, *image_shape)))["params"]
    ema = LecamEma(jnp.float32(0), jnp.float32(0))
    return DiscriminatorState(create_state(params, config.optimizer), ema)


def update_discriminator(
    config: GANConfig,
    discriminator: DiscriminatorState,
    grads: PyTree,
    logit_means: LecamEma,
    step: jax.Array,
    plan: Plan,
) -> tuple[DiscriminatorState, Metrics]:
    """Updates the discriminator once the run has reached `config.start`.

    Args:
        config: settings, which hold its optimizer and start.
        discriminator: state of the discriminator.
        grads: gradients of its loss, `GanGradients.discriminator_grads`.
        logit_means: means of its logits in this step, for LeCam's moving averages.
        step: number of the update, from 0.
        plan: length of the whole run.

    Returns:
        The state after the update, and {"grad_norm", "lr"}.
    """
    own_plan = Plan(plan.steps - config.first_step(plan), plan.batch_size)
    train_state, metrics = apply_gradients(
        discriminator.train_state, grads, config.optimizer, own_plan
    )
    ema = jax.tree.map(
        lambda mean, now: LECAM_DECAY * mean + (1 - LECAM_DECAY) * now,
        discriminator.lecam_ema,
        logit_means,
    )
    started = config.has_started(discriminator.train_state.step, step, plan)
    updated = jax.tree.map(
        lambda new, old: jnp.where(started, new, old),
        DiscriminatorState(train_state, ema),
        discriminator,
    )
    lr = jnp.where(started, metrics["lr"], 0)
    return updated, {"grad_norm": metrics["grad_norm"], "lr": lr}
