import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.adversarial import QUICKLY
from varjax.tokenizers.losses import gan_gradients
from varjax.tokenizers.losses.diffaugment import augment
from varjax.tokenizers.losses.gan import Adversary, Anchors, discriminator_loss, start_opponent
from varjax.training.task import Plan

ADVERSARY = Adversary("patch", 8, 1, r1=0.5, lecam=0.3, diffaugment=("translation",))
REAL, FAKE = np.random.default_rng(0).uniform(-1, 1, (2, 4, 8, 8, 1)).astype(np.float32)
KEY_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(4))


@functools.cache
def opponent():
    """Parameters so large that some logits go beyond 1, and anchors between logits."""
    init = functools.partial(start_opponent, ADVERSARY, (8, 8, 1), Plan())
    fresh, rng = jax.eval_shape(init, jax.random.key(0)), np.random.default_rng(1)
    fresh = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), fresh)
    return fresh.replace(anchors=Anchors(jnp.float32(0.3), jnp.float32(-0.2)))


def verdict(adversary):
    judge = jax.jit(functools.partial(gan_gradients.judge, adversary), compiler_options=QUICKLY)
    return judge(opponent(), REAL, FAKE, KEY_B)


@functools.partial(jax.jit, compiler_options=QUICKLY)
def expected(params, fake_BHWC):
    """(value, gradient by the reconstructions) of the tokenizer's loss, (value, gradient by the
    parameters) of the discriminator's, each loss written in one go."""

    def logits(params, image_BHWC):
        seen_BHWC = augment(image_BHWC, KEY_B, ADVERSARY.diffaugment)
        return ADVERSARY.module().apply({"params": params}, seen_BHWC)

    def own(params):
        real, fake = logits(params, REAL), logits(params, fake_BHWC)
        lecam = jnp.mean(jax.nn.relu(real + 0.2) ** 2) + jnp.mean(jax.nn.relu(0.3 - fake) ** 2)
        # An image's logits depend on itself alone, so the sum's gradient is that of each.
        by_pixel = jax.grad(lambda x: jnp.sum(logits(params, x)) / logits(params, x)[0].size)(REAL)
        r1 = jnp.mean(jnp.sum(by_pixel**2, axis=(1, 2, 3)))
        return discriminator_loss("hinge", real, fake) + 0.3 * lecam + 0.25 * r1

    toward = jax.value_and_grad(lambda fake: -jnp.mean(logits(params, fake)))(fake_BHWC)
    return toward, jax.value_and_grad(own)(params)


def test_each_side_gets_the_gradient_of_its_own_loss():
    found = verdict(ADVERSARY)
    (loss, toward), (own_loss, grads) = expected(opponent().state.params, FAKE)
    np.testing.assert_allclose(found.toward, toward, atol=1e-7)
    for a, b in zip(jax.tree.leaves(found.grads), jax.tree.leaves(grads), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    metrics = found.metrics
    np.testing.assert_allclose(metrics["adversarial"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["discriminator/fake"], -loss, rtol=1e-4)
    terms = {"loss": 1.0, "lecam": 0.3, "r1": 0.25}
    total = sum(weight * metrics[f"discriminator/{name}"] for name, weight in terms.items())
    np.testing.assert_allclose(total, own_loss, rtol=1e-4)


def test_neither_side_s_loss_reaches_the_other(monkeypatch):
    """Each loss is made constant in turn: its own side gets exact zeros, the other what it did."""
    plain = Adversary("patch", 8, 1)
    whole = verdict(plain)
    with monkeypatch.context() as patch:
        patch.setattr(gan_gradients, "generator_loss", lambda kind, fake: 0 * jnp.sum(fake))
        found = verdict(plain)
    assert np.all(found.toward == 0) and np.any(whole.toward != 0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found.grads, whole.grads)
    with monkeypatch.context() as patch:
        patch.setattr(
            gan_gradients, "discriminator_loss", lambda kind, real, fake: 0 * jnp.sum(fake)
        )
        found = verdict(plain)
    assert all(np.all(x == 0) for x in jax.tree.leaves(found.grads))
    assert any(np.any(x != 0) for x in jax.tree.leaves(whole.grads))
    close(found.toward, whole.toward)


@pytest.mark.parametrize("shift, accuracy", [(0.0, 0.5), (3.0, 1.0), (-3.0, 0.0)])
def test_accuracy_is_the_share_that_it_tells_apart(monkeypatch, shift, accuracy):
    class Constant:
        def apply(self, variables, image_BHWC):
            sign = jnp.where(jnp.mean(image_BHWC) == jnp.mean(REAL), 1.0, -1.0)
            return jnp.full((4, 1, 1), shift * sign + 1e-3)

    plain = Adversary("patch", 8, 1)
    monkeypatch.setattr(Adversary, "module", lambda self, dtype: Constant())
    found = gan_gradients.judge(plain, opponent(), jnp.array(REAL), jnp.array(FAKE), KEY_B)
    assert found.metrics["discriminator/accuracy"] == accuracy
