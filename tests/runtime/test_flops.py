import jax
import jax.numpy as jnp
import pytest

from varjax.runtime import flops

A = jax.ShapeDtypeStruct((3, 4, 5), jnp.float32)
B = jax.ShapeDtypeStruct((3, 5, 7), jnp.float32)


def test_matrix_products_count_twice_their_multiply_adds():
    assert flops.count(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), A, B) == 2 * 3 * 4 * 5 * 7


def test_a_scan_counts_each_iteration_and_jit_adds_nothing():
    def function(a, b):
        return jax.lax.scan(lambda c, _: (c, jax.jit(jnp.matmul)(a, b)), 0, None, length=6)[1]

    assert flops.count(function, A, B) == 6 * 2 * 3 * 4 * 5 * 7


def test_convolutions_count_every_output_and_tap():
    image = jax.ShapeDtypeStruct((2, 8, 8, 3), jnp.float32)
    kernel = jax.ShapeDtypeStruct((3, 3, 3, 10), jnp.float32)

    def function(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    assert flops.count(function, image, kernel) == 2 * (2 * 4 * 4 * 10) * (3 * 3 * 3)


def test_gradients_cost_twice_the_forward_pass():
    image, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((2, 2, 3, 10))

    def convolve(image, kernel):
        return jax.lax.conv_general_dilated(
            image, kernel, (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    for function, x, y in ((jnp.matmul, A, B), (convolve, image, kernel)):
        loss = lambda x, y, function=function: jnp.sum(function(x, y) ** 2)  # noqa: E731
        forward = flops.count(function, x, y)
        assert flops.count(jax.grad(loss, argnums=(0, 1)), x, y) == 3 * forward


def test_a_cond_counts_its_most_expensive_branch():
    def function(on, a, b):
        return jax.lax.cond(on, lambda: a @ b @ b.mT @ b, lambda: a @ b)

    assert flops.count(function, True, A, B) == 3 * 2 * 3 * 4 * 5 * 7


def test_a_loop_of_unknown_length_with_products_is_refused():
    def products(n, a, b):
        return jax.lax.fori_loop(0, n, lambda i, c: c + a @ b, jnp.zeros((3, 4, 7)))

    assert flops.count(lambda a, b: products(6, a, b), A, B) == 6 * 2 * 3 * 4 * 5 * 7
    with pytest.raises(flops.UnknownIterations):
        flops.count(products, 6, A, B)
    assert flops.count(lambda n: jax.lax.fori_loop(0, n, lambda i, c: c + i, 0), 6) == 0
