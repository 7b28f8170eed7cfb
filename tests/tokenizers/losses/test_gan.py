import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.adversarial import QUICKLY
from varjax.config import config_tree
from varjax.tokenizers.kl.model import KLConfig
from varjax.tokenizers.kl.task import KLTask
from varjax.tokenizers.losses import gan
from varjax.tokenizers.losses.diffaugment import diffaugment
from varjax.tokenizers.losses.gan import (
    LECAM_DECAY,
    GANConfig,
    LecamEma,
    adaptive_weight,
    create_discriminator,
    discriminator_loss,
    generator_loss,
    lecam_loss,
    update_discriminator,
)
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.task import VQTask
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan

REAL, FAKE = jnp.array([2.0, 0.5, -1.0, 0.0]), jnp.array([-3.0, 0.5, 0.0, -0.5])
LN2 = np.log(2)


def softplus(x):
    return np.log1p(np.exp(x))


def test_losses_match_values_computed_by_hand():
    assert generator_loss("hinge", FAKE) == 0.75
    # The terms are 0, 0.5, 2, 1 for real and 0, 1.5, 1, 0.5 for fake.
    assert discriminator_loss("hinge", REAL, FAKE) == (3.5 / 4 + 3 / 4) / 2
    expected = (softplus(3) + softplus(-0.5) + LN2 + softplus(0.5)) / 4
    np.testing.assert_allclose(generator_loss("non_saturating", FAKE), expected, rtol=1e-6)
    real = softplus(-2) + softplus(-0.5) + softplus(1) + LN2
    fake = softplus(-3) + softplus(0.5) + LN2 + softplus(-0.5)
    found = discriminator_loss("non_saturating", REAL, FAKE)
    np.testing.assert_allclose(found, (real + fake) / 8, rtol=1e-6)
    # Real logits exceed -0.5 by 2.5, 1, 0, 0.5; fake ones are below 1.5 by 4.5, 1, 1.5, 2.
    ema = LecamEma(jnp.float32(1.5), jnp.float32(-0.5))
    found = lecam_loss(REAL, FAKE, ema)
    np.testing.assert_allclose(found, 7.5 / 4 + (20.25 + 1 + 2.25 + 4) / 4, rtol=1e-6)


@pytest.mark.parametrize(
    ("adversarial", "expected"),
    [
        (0.5, 5 / (0.5 + 1e-4)),  # the ratio of norms, with the reference's epsilon
        (1e-3, 5 / (1e-3 + 1e-4)),
        (5e-4 - 1e-4 + 1e-7, 5 / (5e-4 + 1e-7)),  # just below the bound
        (5e-4 - 1e-4 - 1e-7, 1e4),  # just above the bound
        (0.0, 1e4),
    ],
)
def test_adaptive_weight_is_a_bounded_ratio_of_norms(adversarial, expected):
    three_four = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    found = adaptive_weight(three_four, jnp.full((2, 2), adversarial / 2))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert adaptive_weight(jnp.zeros(3), three_four) == 0


@pytest.mark.parametrize("adversarial", [1e3, 2.0, 0.1, 1e-3])
def test_bound_of_the_adaptive_weight_matches_ldm(adversarial):
    """LDM sums all losses but the adversarial one over an image's values; here they are means."""
    task = KLTask(KLConfig(image_size=256))
    values, mean_grad = 256 * 256 * 3, jnp.array([0.03, 0.04])
    ldm = np.clip(values * 0.05 / (adversarial + 1e-4), 0, 1e4)
    found = adaptive_weight(mean_grad, jnp.array([adversarial]), task.max_adaptive_weight)
    np.testing.assert_allclose(found, ldm / values, rtol=1e-5)
    assert (ldm == 1e4) == (adversarial < 1)
    assert VQTask(VQConfig()).max_adaptive_weight == 1e4


def test_adversarial_weight_ramps_up_from_its_start():
    config, plan = GANConfig(start=0.2, ramp=0.1), Plan(steps=100)

    def share(config, step, start, plan=plan):
        return float(config.ramp_factor(jnp.int32(max(step - start, 0)), jnp.int32(step), plan))

    rising = [share(config, step, 20) for step in (0, 19, 20, 24, 29, 30, 99)]
    np.testing.assert_allclose(rising, [0, 0, 0.1, 0.5, 1, 1, 1], rtol=1e-6)
    at_once = dataclasses.replace(config, start=0.0, ramp=0.0)
    assert [share(at_once, step, 0) for step in (0, 1)] == [1, 1]
    # A fork's plan is ten times as long, so `start` is step 200, but the ramp continues.
    assert share(config, 50, 20, Plan(steps=1000)) == pytest.approx(0.31)


@pytest.mark.slow
def test_discriminator_trains_from_its_start_with_its_own_schedule():
    optimizer = AdamW(base_lr=0.1, warmup=0.0, schedule="lin00", end=0.0, weight_decay=0.1)
    config = GANConfig("patch", 8, 1, start=0.5, optimizer=optimizer)
    plan = Plan(steps=6, batch_size=256)
    discriminator = jax.jit(lambda key: create_discriminator(config, (8, 8, 1), key))(
        jax.random.key(0)
    )
    grads = jax.tree.map(jnp.ones_like, discriminator.train_state.params)
    logit_means = LecamEma(jnp.float32(2), jnp.float32(-1))

    @jax.jit
    def update(discriminator, step):
        return update_discriminator(config, discriminator, grads, logit_means, step, plan)

    after, metrics = update(discriminator, jnp.int32(2))
    jax.tree.map(np.testing.assert_array_equal, after, discriminator)
    assert metrics["lr"] == 0
    for step, lr in ((3, 0.1), (4, 0.05), (5, 0.0)):
        after, metrics = update(after, jnp.int32(step))
        np.testing.assert_allclose(metrics["lr"], lr, atol=1e-8)
    assert after.train_state.step == 3
    np.testing.assert_allclose(after.lecam_ema.real, 2 * (1 - LECAM_DECAY**3), rtol=1e-3)
    np.testing.assert_allclose(after.lecam_ema.fake, -(1 - LECAM_DECAY**3), rtol=1e-3)
    moved = jax.tree.map(
        lambda a, b: np.any(a != b), after.train_state.params, discriminator.train_state.params
    )
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("width", 12, "a multiple of 8"),
        ("layers", 0, "1 or more"),
        ("weight", 0.0, "task.gan=none"),
        ("start", 1.0, "a fraction of the run, at least 0 and below 1"),
        ("ramp", -0.1, "a fraction"),
        ("r1", -1.0, "0 .off. or more"),
        ("lecam", -1.0, "0 .off. or more"),
    ],
)
def test_invalid_settings_are_refused(field, value, message):
    with pytest.raises(ValueError, match=f"gan.{field}={value}: must be .*{message}"):
        GANConfig(**{field: value})


def test_images_too_small_for_the_discriminator_are_refused():
    GANConfig("patch", layers=3).check((24, 32, 3))
    with pytest.raises(ValueError, match="'patch': it needs 24 pixels a side.*fewer"):
        GANConfig("patch", layers=3).check((23, 32, 3))
    with pytest.raises(ValueError, match="'style': it needs 4"):
        GANConfig("style").check((3, 32, 3))


def test_config_survives_a_round_trip_through_json():
    config = GANConfig("style", diffaugment=("color", "cutout"), optimizer=AdamW(base_lr=1.0))
    assert config_tree.from_dict(GANConfig, config_tree.to_dict(config)) == config


CONFIG = GANConfig("patch", 8, 1, r1=0.5, lecam=0.3, diffaugment=("translation",))
REAL_BHWC, FAKE_BHWC = np.random.default_rng(0).uniform(-1, 1, (2, 4, 8, 8, 1)).astype(np.float32)
KEY_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(4))


@functools.cache
def discriminator():
    """Makes a state with some logits above 1, and LeCam averages within the range of logits."""
    init = functools.partial(create_discriminator, CONFIG, (8, 8, 1))
    fresh, rng = jax.eval_shape(init, jax.random.key(0)), np.random.default_rng(1)
    fresh = jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), fresh)
    return fresh.replace(lecam_ema=LecamEma(jnp.float32(0.3), jnp.float32(-0.2)))


def gradients(config):
    jitted = jax.jit(functools.partial(gan.gan_gradients, config), compiler_options=QUICKLY)
    return jitted(discriminator(), REAL_BHWC, FAKE_BHWC, KEY_B)


@functools.partial(jax.jit, compiler_options=QUICKLY)
def expected(params, fake_BHWC):
    """Differentiates both losses, each written as a single function.

    Returns:
        (value, gradient with respect to the reconstructions) of the tokenizer's loss, and (value,
        gradient with respect to the parameters) of the discriminator's.
    """

    def logits(params, image_BHWC):
        seen_BHWC = diffaugment(image_BHWC, KEY_B, CONFIG.diffaugment)
        return CONFIG.discriminator().apply({"params": params}, seen_BHWC)

    def own(params):
        real, fake = logits(params, REAL_BHWC), logits(params, fake_BHWC)
        lecam = jnp.mean(jax.nn.relu(real + 0.2) ** 2) + jnp.mean(jax.nn.relu(0.3 - fake) ** 2)
        # Logits depend only on their own image, so the sum's gradient is that of each.
        by_pixel = jax.grad(lambda x: jnp.sum(logits(params, x)) / logits(params, x)[0].size)(
            REAL_BHWC
        )
        r1 = jnp.mean(jnp.sum(by_pixel**2, axis=(1, 2, 3)))
        return discriminator_loss("hinge", real, fake) + 0.3 * lecam + 0.25 * r1

    by_image = jax.value_and_grad(lambda fake: -jnp.mean(logits(params, fake)))(fake_BHWC)
    return by_image, jax.value_and_grad(own)(params)


@pytest.mark.slow
def test_each_network_gets_the_gradient_of_its_own_loss():
    found = gradients(CONFIG)
    (loss, by_image), (own_loss, grads) = expected(discriminator().train_state.params, FAKE_BHWC)
    np.testing.assert_allclose(found.image_grad_BHWC, by_image, atol=1e-7)
    for a, b in zip(
        jax.tree.leaves(found.discriminator_grads), jax.tree.leaves(grads), strict=True
    ):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    metrics = found.metrics
    np.testing.assert_allclose(metrics["adversarial"], loss, rtol=1e-4)
    np.testing.assert_allclose(metrics["discriminator/fake"], -loss, rtol=1e-4)
    terms = {"loss": 1.0, "lecam": 0.3, "r1": 0.25}
    total = sum(weight * metrics[f"discriminator/{name}"] for name, weight in terms.items())
    np.testing.assert_allclose(total, own_loss, rtol=1e-4)


@pytest.mark.slow
def test_neither_loss_reaches_the_other_network(monkeypatch):
    """Makes each loss constant in turn: its network's gradient is 0, the other's stays the same."""
    plain = GANConfig("patch", 8, 1)
    whole = gradients(plain)
    with monkeypatch.context() as patch:
        patch.setattr(gan, "generator_loss", lambda kind, fake: 0 * jnp.sum(fake))
        found = gradients(plain)
    assert np.all(found.image_grad_BHWC == 0) and np.any(whole.image_grad_BHWC != 0)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, found.discriminator_grads, whole.discriminator_grads)
    with monkeypatch.context() as patch:
        patch.setattr(gan, "discriminator_loss", lambda kind, real, fake: 0 * jnp.sum(fake))
        found = gradients(plain)
    assert all(np.all(x == 0) for x in jax.tree.leaves(found.discriminator_grads))
    assert any(np.any(x != 0) for x in jax.tree.leaves(whole.discriminator_grads))
    close(found.image_grad_BHWC, whole.image_grad_BHWC)


@pytest.mark.parametrize("shift, accuracy", [(0.0, 0.5), (3.0, 1.0), (-3.0, 0.0)])
def test_accuracy_is_the_fraction_of_correctly_classified_images(monkeypatch, shift, accuracy):
    class Constant:
        def apply(self, variables, image_BHWC):
            sign = jnp.where(jnp.mean(image_BHWC) == jnp.mean(REAL_BHWC), 1.0, -1.0)
            return jnp.full((4, 1, 1), shift * sign + 1e-3)

    plain, state = GANConfig("patch", 8, 1), discriminator()
    monkeypatch.setattr(GANConfig, "discriminator", lambda self, dtype: Constant())
    found = gan.gan_gradients(plain, state, jnp.array(REAL_BHWC), jnp.array(FAKE_BHWC), KEY_B)
    assert found.metrics["discriminator/accuracy"] == accuracy
