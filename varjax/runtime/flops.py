"""Counts the floating-point operations of a JAX function in its jaxpr."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.extend import core


class UnknownIterations(Exception):
    """Means that products are in a loop whose number of iterations is known only when it runs."""


def count(function: Callable, *args: Any) -> int:
    """Counts 2 FLOP per multiply-add of all matmuls and convolutions, and nothing else.

    Of the branches of a condition, the one with the most work counts.

    Args:
        function: function to trace, without running it.
        args: arguments of the function, arrays or ShapeDtypeStructs.

    Raises:
        UnknownIterations: a product is in such a loop.
    """
    return _count_jaxpr(jax.make_jaxpr(function)(*args).jaxpr)


def _count_jaxpr(jaxpr: Any) -> int:
    return sum(_count_equation(equation) for equation in jaxpr.eqns)


def _count_equation(equation: Any) -> int:
    name, params = equation.primitive.name, equation.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = equation.invars[0].aval.shape
        products = math.prod(shape[axis] for axis in contracted)
        return 2 * math.prod(equation.outvars[0].aval.shape) * products
    if name == "conv_general_dilated":
        kernel = equation.invars[1].aval.shape
        taps = math.prod(kernel) // kernel[params["dimension_numbers"].rhs_spec[0]]
        # The gradient of a strided convolution convolves an image with zeros in between.
        zeros = math.prod(params["lhs_dilation"])
        return 2 * math.prod(equation.outvars[0].aval.shape) * taps // zeros
    counts = [_count_jaxpr(jaxpr) for jaxpr in _inner(params)]
    if name == "while" and any(counts):
        raise UnknownIterations
    if name == "cond":
        return max(counts)
    return sum(counts) * (params["length"] if name == "scan" else 1)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    for value in params.values():
        for item in value if isinstance(value, tuple | list) else (value,):
            if isinstance(item, core.ClosedJaxpr):
                yield item.jaxpr
            elif isinstance(item, core.Jaxpr):
                yield item
