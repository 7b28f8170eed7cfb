"""Float32 convolutions computed with products in shorter formats."""

import jax
import numpy as np
import pytest

from varjax.nn.compute import float32_convolution

KEYS = jax.random.split(jax.random.key(0))
X_BHWC = jax.random.normal(KEYS[0], (2, 6, 5, 16))
KERNEL = jax.random.normal(KEYS[1], (3, 3, 16, 8))


def convolve(precision, platform):
    return lambda x, kernel: float32_convolution(precision, platform)(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), precision=None
    )


def in_float64():
    x = np.pad(np.asarray(X_BHWC, np.float64), ((0, 0), (1, 1), (1, 1), (0, 0)))
    kernel, (_, H, W, _) = np.asarray(KERNEL, np.float64), X_BHWC.shape
    return sum(x[:, i : i + H, j : j + W] @ kernel[i, j] for i in range(3) for j in range(3))


@pytest.mark.parametrize(
    ("precision", "least", "most"),
    [
        ("bfloat16", 2**-10, 2**-6),
        ("tf32", 2**-13, 2**-10),
        ("bfloat16_3x", 2**-18, 2**-14),
        ("tf32_3x", 0, 2**-19),
        ("highest", 0, 2**-19),
    ],
)
def test_each_precision_is_as_accurate_as_its_bits(precision, least, most):
    exact = in_float64()
    y_BHWC = np.asarray(convolve(precision, "cpu")(X_BHWC, KERNEL), np.float64)
    error = np.abs(y_BHWC - exact).max() / exact.std()
    assert least < error < most


@pytest.mark.parametrize(
    ("precision", "platform", "expected"),
    [
        ("bfloat16_3x", "tpu", ["HIGH"]),
        ("bfloat16", "tpu", ["DEFAULT"]),
        ("highest", "tpu", ["HIGHEST"]),
        ("tf32", "gpu", ["DEFAULT"]),
        ("tf32_3x", "gpu", ["DEFAULT"] * 3),
        ("tf32_3x", "cpu", ["HIGHEST"] * 3),
        ("bfloat16", "gpu", ["HIGHEST"]),
    ],
)
def test_native_precisions_are_used_where_the_platform_has_them(precision, platform, expected):
    equations = jax.make_jaxpr(convolve(precision, platform))(X_BHWC, KERNEL).jaxpr.eqns
    convolutions = [e.params for e in equations if e.primitive.name == "conv_general_dilated"]
    assert [{p.name for p in params["precision"]} for params in convolutions] == [
        {name} for name in expected
    ]
