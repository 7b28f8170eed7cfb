"""Fused nearest upsampling and convolution, against the same in two steps."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax.nn.autoencoder import Upsample
from varjax.nn.compute import ConvFormat
from varjax.nn.upsampling import upsample_and_convolve
from varjax.runtime import flops

KEY_X, KEY_KERNEL, KEY_DY = jax.random.split(jax.random.key(0), 3)


def two_steps(x_BhwC, kernel_33CN):
    x_BHWC = jnp.repeat(jnp.repeat(x_BhwC, 2, axis=1), 2, axis=2)
    layout = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(
        x_BHWC, kernel_33CN, (1, 1), "SAME", dimension_numbers=layout, precision="highest"
    )


@pytest.mark.parametrize("shape", [(2, 7, 5, 3, 4), (1, 1, 1, 8, 8), (3, 4, 8, 16, 5)], ids=str)
def test_output_and_gradients_match_two_steps(shape):
    B, h, w, C, N = shape
    x_BhwC = jax.random.normal(KEY_X, (B, h, w, C))
    kernel_33CN = jax.random.normal(KEY_KERNEL, (3, 3, C, N))
    dy_BHWN = jax.random.normal(KEY_DY, (B, 2 * h, 2 * w, N))
    expected, expected_gradients = jax.vjp(two_steps, x_BhwC, kernel_33CN)
    found, gradients = jax.vjp(upsample_and_convolve, x_BhwC, kernel_33CN)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    for one, other in zip(gradients(dy_BHWN), expected_gradients(dy_BHWN), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-3)


def test_forward_and_one_argument_derivatives_match_two_steps():
    x_BhwC = jax.random.normal(KEY_X, (2, 4, 3, 3))
    kernel_33CN = jax.random.normal(KEY_KERNEL, (3, 3, 3, 4))
    both = x_BhwC, kernel_33CN
    for tangents in (both, (x_BhwC, 0 * kernel_33CN)):
        (_, expected), (_, found) = (
            jax.jvp(function, both, tangents) for function in (two_steps, upsample_and_convolve)
        )
        np.testing.assert_allclose(found, expected, atol=1e-4)
    for argument in (0, 1):
        expected, found = (
            jax.jacfwd(jax.grad(lambda *x, f=function: jnp.sin(f(*x)).sum(), argument), 1)(*both)
            for function in (two_steps, upsample_and_convolve)
        )
        np.testing.assert_allclose(found, expected, atol=1e-3)


def test_the_backward_pass_keeps_only_the_arguments():
    x_BhwC, kernel_33CN = jnp.zeros((2, 8, 8, 3)), jnp.zeros((3, 3, 3, 4))
    _, backward = jax.vjp(upsample_and_convolve, x_BhwC, kernel_33CN)
    kept = [x.shape for x in jax.tree.leaves(backward)]
    assert sorted(kept) == sorted([x_BhwC.shape, kernel_33CN.shape])


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_both_platforms_have_the_same_parameters_and_results(dtype):
    cpu, tpu = (Upsample(ConvFormat(dtype, platform=platform)) for platform in ("cpu", "tpu"))
    x_BhwC = jax.random.normal(KEY_X, (2, 6, 6, 8), dtype)
    params = tpu.init(KEY_KERNEL, x_BhwC)
    assert jax.tree.map(jnp.shape, cpu.init(KEY_KERNEL, x_BhwC)) == jax.tree.map(jnp.shape, params)
    found, expected = (np.asarray(m.apply(params, x_BhwC), np.float32) for m in (cpu, tpu))
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, atol=1e-5 if dtype == jnp.float32 else 2e-2)


def test_fused_upsampling_saves_flop_and_its_gradients_repeat_no_product():
    x_BhwC, kernel_33CN = jnp.zeros((1, 32, 32, 4)), jnp.zeros((3, 3, 4, 4))

    def loss(function):
        return lambda x, kernel: function(x, kernel).sum()

    forward = flops.count(upsample_and_convolve, x_BhwC, kernel_33CN)
    assert 4 / 9 < forward / flops.count(two_steps, x_BhwC, kernel_33CN) < 4 / 9 * 1.1
    both = flops.count(jax.grad(loss(upsample_and_convolve), (0, 1)), x_BhwC, kernel_33CN)
    assert 2.9 < both / forward < 3.2
    for argument in (0, 1):
        one = flops.count(jax.grad(loss(upsample_and_convolve), argument), x_BhwC, kernel_33CN)
        assert 1.9 < one / forward < 2.2
