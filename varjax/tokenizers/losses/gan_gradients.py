"""The discriminator looks at images and their reconstructions: what both sides learn of it."""

import flax.struct
import jax
import jax.numpy as jnp

from varjax.core.trees import PyTree
from varjax.tokenizers.losses.diffaugment import augment
from varjax.tokenizers.losses.gan import (
    Adversary,
    Anchors,
    Opponent,
    discriminator_loss,
    generator_loss,
    lecam_loss,
)
from varjax.training.train_step import Metrics


@flax.struct.dataclass
class Verdict:
    """toward: the gradient of the tokenizer's adversarial loss by the reconstructions (B, H, W,
    channels). grads: of the discriminator's loss by its parameters. said: means of its logits."""

    toward: jax.Array
    grads: PyTree
    said: Anchors
    metrics: Metrics


def judge(
    adversary: Adversary,
    opponent: Opponent,
    real_BHWC: jax.Array,
    fake_BHWC: jax.Array,
    key_B: jax.Array,
    dtype=jnp.float32,
) -> Verdict:
    """The discriminator's verdict on images in [-1, 1] and their reconstructions.

    Each pair is augmented alike, by its own key: then only the reconstruction can tell it apart.
    Neither side's gradient reaches the other's parameters. All is a mean over the images.
    """
    module, kind = adversary.module(dtype), adversary.loss

    def logits(params, image_BHWC):
        seen_BHWC = augment(image_BHWC, key_B, adversary.diffaugment)
        return jnp.asarray(module.apply({"params": params}, seen_BHWC))

    def own_loss(real, fake):
        loss = discriminator_loss(kind, real, fake)
        lecam = lecam_loss(real, fake, opponent.anchors)
        return loss + adversary.lecam * lecam, {"loss": loss, "lecam": lecam}

    params = opponent.state.params
    real, back_real = jax.vjp(lambda params: logits(params, real_BHWC), params)
    fake, back_fake = jax.vjp(logits, params, fake_BHWC)
    loss, by_logits = jax.value_and_grad(lambda fake: generator_loss(kind, fake))(fake)
    _, toward = back_fake(by_logits)
    (by_real, by_fake), metrics = jax.grad(own_loss, (0, 1), has_aux=True)(real, fake)
    grads = jax.tree.map(jnp.add, back_real(by_real)[0], back_fake(by_fake)[0])
    if adversary.r1:
        penalty = jax.value_and_grad(lambda params: r1_loss(logits, params, real_BHWC))
        metrics["r1"], by_penalty = penalty(params)
        grads = jax.tree.map(lambda a, b: a + adversary.r1 / 2 * b, grads, by_penalty)
    said = Anchors(jnp.mean(real), jnp.mean(fake))
    right = [jnp.mean((x > 0).astype(jnp.float32)) for x in (real, -fake)]
    metrics |= {"real": said.real, "fake": said.fake, "accuracy": (right[0] + right[1]) / 2}
    metrics = {f"discriminator/{name}": x for name, x in metrics.items()}
    return Verdict(toward, grads, said, metrics | {"adversarial": loss})


def r1_loss(logits, params: PyTree, image_BHWC: jax.Array) -> jax.Array:
    """The mean over images of |∇ of an image's mean logit by its pixels|² (arXiv 1801.04406)."""

    def total(image_BHWC):
        return jnp.sum(jnp.mean(logits(params, image_BHWC), axis=(1, 2)))

    return jnp.sum(jnp.square(jax.grad(total)(image_BHWC))) / len(image_BHWC)
