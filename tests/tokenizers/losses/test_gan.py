import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax.core import config_tree
from varjax.tokenizers.losses.gan import (
    LECAM_DECAY,
    Adversary,
    Anchors,
    balance,
    discriminator_loss,
    generator_loss,
    lecam_loss,
    start_opponent,
    update_opponent,
)
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan

REAL, FAKE = jnp.array([2.0, 0.5, -1.0, 0.0]), jnp.array([-3.0, 0.5, 0.0, -0.5])
LN2 = np.log(2)


def softplus(x):
    return np.log1p(np.exp(x))


def test_losses_equal_what_is_computed_by_hand():
    assert generator_loss("hinge", FAKE) == 0.75
    # real: 0, 0.5, 2, 1; fake: 0, 1.5, 1, 0.5
    assert discriminator_loss("hinge", REAL, FAKE) == (3.5 / 4 + 3 / 4) / 2
    expected = (softplus(3) + softplus(-0.5) + LN2 + softplus(0.5)) / 4
    np.testing.assert_allclose(generator_loss("non_saturating", FAKE), expected, rtol=1e-6)
    real = softplus(-2) + softplus(-0.5) + softplus(1) + LN2
    fake = softplus(-3) + softplus(0.5) + LN2 + softplus(-0.5)
    found = discriminator_loss("non_saturating", REAL, FAKE)
    np.testing.assert_allclose(found, (real + fake) / 8, rtol=1e-6)
    # real above -0.5 by 2.5, 1, -, 0.5; fake below 1.5 by 4.5, 1, 1.5, 2
    anchors = Anchors(jnp.float32(1.5), jnp.float32(-0.5))
    found = lecam_loss(REAL, FAKE, anchors)
    np.testing.assert_allclose(found, 7.5 / 4 + (20.25 + 1 + 2.25 + 4) / 4, rtol=1e-6)


def test_balance_divides_norms_and_is_bounded():
    three_four = jnp.array([[3.0, 0.0], [0.0, 4.0]])
    found = balance(three_four, jnp.full((2, 2), 0.25))
    np.testing.assert_allclose(found, 5 / (0.5 + 1e-4), rtol=1e-6)
    assert balance(three_four, jnp.zeros(3)) == 1e4
    assert balance(jnp.zeros(3), three_four) == 0


def test_the_adversary_starts_and_rises_as_told():
    adversary, plan = Adversary(start=0.2, ramp=0.1), Plan(steps=100)
    share = [float(adversary.share(jnp.int32(step), plan)) for step in (0, 19, 20, 24, 29, 30, 99)]
    np.testing.assert_allclose(share, [0, 0, 0.1, 0.5, 1, 1, 1], rtol=1e-6)
    at_once = dataclasses.replace(adversary, start=0.0, ramp=0.0)
    assert [at_once.share(jnp.int32(step), plan) for step in (0, 1)] == [1, 1]


def test_the_discriminator_rests_until_its_start_and_then_has_its_own_schedule():
    optimizer = AdamW(base_lr=0.1, warmup=0.0, schedule="lin00", end=0.0, weight_decay=0.1)
    adversary = Adversary("patch", 8, 1, start=0.5, optimizer=optimizer)
    plan = Plan(steps=6, batch_size=256)
    opponent = jax.jit(lambda key: start_opponent(adversary, (8, 8, 1), plan, key))(
        jax.random.key(0)
    )
    grads = jax.tree.map(jnp.ones_like, opponent.state.params)
    said = Anchors(jnp.float32(2), jnp.float32(-1))

    @jax.jit
    def update(opponent, step):
        return update_opponent(adversary, opponent, grads, said, step, plan)

    after, metrics = update(opponent, jnp.int32(2))
    jax.tree.map(np.testing.assert_array_equal, after, opponent)
    assert metrics["lr"] == 0
    for step, lr in ((3, 0.1), (4, 0.05), (5, 0.0)):
        after, metrics = update(after, jnp.int32(step))
        np.testing.assert_allclose(metrics["lr"], lr, atol=1e-8)
    assert after.state.step == 3
    np.testing.assert_allclose(after.anchors.real, 2 * (1 - LECAM_DECAY**3), rtol=1e-3)
    np.testing.assert_allclose(after.anchors.fake, -(1 - LECAM_DECAY**3), rtol=1e-3)
    moved = jax.tree.map(lambda a, b: np.any(a != b), after.state.params, opponent.state.params)
    assert all(jax.tree.leaves(moved))


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("width", 12, "a multiple of 8"),
        ("layers", 0, "1 or more"),
        ("weight", 0.0, "task.adversary=none"),
        ("start", 1.0, "a fraction of the run, at least 0 and below 1"),
        ("ramp", -0.1, "a fraction"),
        ("r1", -1.0, "0 .off. or more"),
        ("lecam", -1.0, "0 .off. or more"),
    ],
)
def test_what_cannot_work_is_refused(field, value, message):
    with pytest.raises(ValueError, match=f"adversary.{field}={value}: must be .*{message}"):
        Adversary(**{field: value})


def test_images_too_small_for_it_are_refused():
    Adversary("patch", layers=3).check((24, 32, 3))
    with pytest.raises(ValueError, match="'patch': it needs 24 pixels a side.*fewer"):
        Adversary("patch", layers=3).check((23, 32, 3))
    with pytest.raises(ValueError, match="'style': it needs 4"):
        Adversary("style").check((3, 32, 3))


def test_settings_go_to_json_and_back():
    adversary = Adversary("style", diffaugment=("color", "cutout"), optimizer=AdamW(base_lr=1.0))
    assert config_tree.from_dict(Adversary, config_tree.to_dict(adversary)) == adversary
