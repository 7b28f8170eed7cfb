"""Tests that users' numbers of any type are converted, or refused if JAX would change them."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax.config.numbers import finite_number, seed_number, true_or_false, whole_number
from varjax.errors import InputError


@pytest.mark.parametrize("value", [3, 3.0, np.int64(3), np.uint8(3), np.float32(3), jnp.int32(3)])
def test_a_whole_number_of_any_type_becomes_a_python_int(value):
    found = whole_number("n", value, 1)
    assert found == 3 and type(found) is int
    found = finite_number("x", value, 0)
    assert found == 3 and type(found) is float


def test_the_error_for_too_large_numbers_states_the_maximum():
    for value in (2**31, 2.0**70, 10**400, np.uint64(2**63)):
        with pytest.raises(InputError, match="n=.*: must be at most 2147483647"):
            whole_number("n", value, 1, allowed="1 or more")


@pytest.mark.parametrize(
    "value",
    [0, -1, 2.5, math.nan, math.inf, "3", b"3", None, True, [3], np.array([3]), {}],
)
def test_invalid_whole_numbers_are_refused_with_name_and_value(value):
    with pytest.raises(
        InputError, match="n=.*: must be 1 or more, a whole number up to 2147483647"
    ):
        whole_number("n", value, 1)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e39, 1e-50, -1, "1", True, None])
def test_numbers_that_float32_cannot_hold_are_refused(value):
    with pytest.raises(InputError, match="x=.*: must be a finite number, 0 or more"):
        finite_number("x", value, 0)


def test_bounds_of_floats_are_inclusive():
    assert [finite_number("x", x, 0, 1) for x in (0, 1)] == [0, 1]
    with pytest.raises(InputError):
        finite_number("x", np.nextafter(1, 2), 0, 1)


def test_strings_are_not_booleans():
    assert true_or_false("b", np.True_) is True and true_or_false("b", 0) is False
    for value in ("no", "False", 2, None, [1]):
        with pytest.raises(InputError, match="b=.*: must be True or False"):
            true_or_false("b", value)


def test_every_allowed_seed_has_a_different_key():
    """JAX truncates larger seeds to 32 bits, so they would draw the images of other seeds."""
    seeds = [0, 1, 2**31 - 1, 2**31, 2**32 - 1]
    keys = {tuple(jax.random.key_data(jax.random.key(seed_number("s", s))).tolist()) for s in seeds}
    assert len(keys) == len(seeds)
    for seed in (-1, 2**32, 2**64, 0.5, True, "1", None):
        with pytest.raises(InputError, match="seed=.*: must be (0 or more|at most 4294967295)"):
            seed_number("seed", seed)
