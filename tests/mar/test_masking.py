"""The order of tokens, the mask ratio in training, and how many tokens each step draws."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax.mar.losses import known_count, mask_ratio
from varjax.mar.masking import NEW_TOKEN_WORK, UnmaskingSchedule, draw_orders
from varjax.mar.model import MARConfig
from varjax.sampling.sampler import image_keys

KEY_B = image_keys(0, jnp.arange(2))


@pytest.mark.parametrize("order", ["random", "raster"])
@pytest.mark.parametrize("causal", [False, True])
def test_order_is_a_permutation_that_begins_with_kept_positions(order, causal):
    config = MARConfig(latent_map=(3, 4), order=order, causal=causal)
    order_BL = np.asarray(draw_orders(config, KEY_B))
    np.testing.assert_array_equal(np.sort(order_BL), np.tile(np.arange(12), (2, 1)))
    assert (order_BL[0] == order_BL[1]).all() == (order == "raster")
    keep_BL = jnp.zeros((2, 12), bool).at[:, jnp.array([4, 9])].set(True)
    kept = np.asarray(draw_orders(config, KEY_B, keep_BL))[:, :2]
    assert (np.sort(kept) == [4, 9]).all() == ((order, causal) != ("raster", True))


def test_mask_ratio_is_a_truncated_normal():
    ratio_N = jax.vmap(mask_ratio, (0, None))(jax.random.split(jax.random.key(3), 4000), 0.7)
    assert 0.7 <= ratio_N.min() and ratio_N.max() <= 1
    expected = 1 - 0.25 * 0.3989423 * (1 - np.exp(-0.72)) / 0.3849303
    assert np.mean(ratio_N) == pytest.approx(expected, abs=0.003)
    assert int(known_count(256, jnp.float32(0.7001))) == 76
    assert int(known_count(256, 1.0)) == 0


def test_unmasking_schedule_draws_every_token_once():
    for length, steps in ((256, 64), (256, 256), (16, 5), (9, 9), (4, 1)):
        schedule = UnmaskingSchedule(length, steps)
        assert (np.diff(schedule.known) > 0).all() and schedule.known[-1] == length
        covered = [i for group in schedule.groups() for i in group.steps]
        assert covered == list(range(steps))
        for group in schedule.groups(max_kept=length // 3):
            for i in group.steps:
                assert max(schedule.known[i], length // 3) <= group.known <= length
                assert schedule.known[i + 1] - schedule.known[i] <= group.new
    assert UnmaskingSchedule(256, 64).groups(min_kept=200)[0].steps.start > 30


def work(schedule, edges):
    groups = itertools.pairwise((0, *edges, schedule.steps))
    new = np.diff(schedule.known)
    return sum(
        (b - a) * (NEW_TOKEN_WORK * max(new[a:b]) + schedule.known[b - 1]) for a, b in groups
    )


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_step_groups_minimize_the_work(count):
    schedule = UnmaskingSchedule(length=40, steps=9, group_count=count)
    found = [group.steps.start for group in schedule.groups()][1:]
    ways = itertools.combinations(range(1, 9), count - 1)
    assert work(schedule, found) == min(work(schedule, edges) for edges in ways)


@pytest.mark.parametrize(
    ("length", "steps", "most"),
    [
        (256, 64, 1.06),
        (256, 32, 1.06),
        (256, 16, 1.06),
        (256, 8, 1.17),
        (256, 4, 1.2),
        (16, 8, 1.1),
    ],
)
def test_padding_adds_few_tokens(length, steps, most):
    drawn = sum(len(g.steps) * g.new for g in UnmaskingSchedule(length, steps).groups())
    assert length <= drawn < most * length  # a single loop draws up to 1.5 times as many
