"""MAR with causal attention: causality, and the cache against teacher forcing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.mar.test_sample import CATEGORICAL, KEY_B, LABEL_B, params, tiny
from varjax.mar.causal import causal_first, causal_hidden, causal_next
from varjax.mar.masking import draw_orders
from varjax.mar.model import MAR

pytestmark = pytest.mark.slow


def tokens(config):
    shape, rng = (2, config.length, *config.head.token_shape), np.random.default_rng(3)
    numbers = rng.normal(size=shape) if shape[2:] else rng.integers(0, 7, shape)
    return jnp.asarray(numbers.astype(config.head.token_dtype))


@pytest.mark.parametrize("changes", [dict(decoder_width=36), CATEGORICAL, dict(order="raster")])
def test_cache_matches_teacher_forcing(changes):
    config = tiny(changes | dict(causal=True))
    order_BL, token_BL = draw_orders(config, KEY_B), tokens(config)
    apply = functools.partial(MAR(config).apply, {"params": params(config)})

    @jax.jit
    def teacher_forced(token_BL, order_BL):
        class_BC = apply(LABEL_B, method=MAR.class_vectors)
        z_BLC = apply(token_BL, order_BL, class_BC, method=causal_hidden)
        in_order_BLC = jnp.take_along_axis(z_BLC, order_BL[..., None], axis=1)
        return in_order_BLC, apply(order_BL[:, 0], class_BC, method=causal_first)

    @jax.jit
    def step(number, cache):
        position_B, next_B = order_BL[:, number], order_BL[:, number + 1]
        token_B = token_BL[jnp.arange(2), position_B]
        return apply(token_B, position_B, next_B, number, cache, method=causal_next)

    in_order_BLC, (z_BC, cache) = teacher_forced(token_BL, order_BL)
    found = [z_BC]
    for number in range(config.length - 1):
        z_BC, cache = step(np.int32(number), cache)
        found.append(z_BC)
    np.testing.assert_allclose(np.stack(found, axis=1), in_order_BLC, rtol=1e-4, atol=1e-4)


def test_hidden_vectors_depend_only_on_earlier_tokens():
    config = tiny(dict(causal=True))
    order_BL, token_BL = draw_orders(config, KEY_B), tokens(config)
    apply = functools.partial(MAR(config).apply, {"params": params(config)})

    @jax.jit
    @jax.grad
    def gradient(token_BL, position):
        class_BC = apply(LABEL_B, method=MAR.class_vectors)
        z_BLC = apply(token_BL, order_BL, class_BC, method=causal_hidden)
        return jnp.sum(z_BLC[0, position])

    order_L = np.asarray(order_BL)[0]
    for number in (0, 5, 11):
        grad_BLZ = np.asarray(gradient(token_BL, order_L[number]))
        in_order_LZ = grad_BLZ[0, order_L]
        assert not in_order_LZ[number:].any() and not grad_BLZ[1].any()
        assert number == 0 or (in_order_LZ[:number] != 0).all()
