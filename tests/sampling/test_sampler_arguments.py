"""Tests the checks of what Python users give a sampler: labels, seeds, numbers, options."""

import dataclasses
import functools
import math
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax.errors import InputError
from varjax.mar.sample import MAROptions
from varjax.sampling.pipeline import (
    check_rule,
    checked_edit,
    checked_keys,
    checked_labels,
    checked_tokens,
)
from varjax.sampling.sampler import image_keys
from varjax.var.sample import VAROptions


@pytest.mark.parametrize(
    "labels", [[3, 10], (3, 10), np.array([3, 10], np.uint8), jnp.array([3, 10]), [3.0, 10.0]]
)
def test_labels_may_be_whole_numbers_of_any_type(labels):
    found_B = checked_labels(labels, 10)
    assert found_B.tolist() == [3, 10] and found_B.dtype == jnp.int32
    assert checked_labels(7, 10).tolist() == [7]


@pytest.mark.parametrize(
    "labels",
    [
        ["cat"], "cat", "3", [b"3"], [True, False], np.array([True]), [3.5], [math.nan], [math.inf],
        [-1], [11], [2**40], [2**70], [], (), np.zeros((0,), int), [None], None, [[1], [2, 3]],
        [[1, 2]], {1: 2}, object(),
    ],
)  # fmt: skip
def test_invalid_labels_are_refused(labels):
    with pytest.raises(InputError, match="labels.*(allowed are 0 … 9|shape)"):
        checked_labels(labels, 10)


def test_mixes_of_classes_become_weights_that_sum_to_one():
    expected = np.zeros((3, 11), np.float32)
    expected[0, [2, 7]], expected[1, 3], expected[2, [0, 10]] = [0.25, 0.75], 1, 0.5
    labels = ["2:0.5+7:1.5", 3, {0: 1, 10: 1}]
    found_BN = checked_labels(labels, 10)
    assert found_BN.dtype == jnp.float32 and np.array_equal(found_BN, expected)
    text = np.array(["2:1+7:3", "3:1", "10:2+0:2"])  # as a SamplingJob holds them
    assert np.array_equal(checked_labels(text, 10, 3), expected)
    with pytest.raises(InputError, match="3 labels; expected 2"):
        checked_labels(labels, 10, 2)


@pytest.mark.parametrize(
    "label",
    ["2:0.5+", "2:", ":1", "2:0.5+11:1", "-1:1", "2:0", "2:-1", "2:nan", "2:inf", "a:1", {}]
    + [{2: 0}, {11: 1}, {2: math.nan}, {"a": 1}, {2: None}, {3.7: 1}],
)  # fmt: skip
def test_an_invalid_mix_is_refused(label):
    with pytest.raises(
        InputError, match="label .*give a class, or CLASS:WEIGHT.*allowed are 0 … 9"
    ):
        checked_labels([1, label], 10)


@pytest.mark.parametrize("label", [5.9, math.nan, True, None, -1, 11])
def test_an_invalid_class_is_refused_next_to_a_mix(label):
    with pytest.raises(InputError, match=f"label {label}: give a class"):
        checked_labels([{1: 1}, label], 10)


def test_each_image_needs_one_label():
    with pytest.raises(InputError, match="labels have shape .2,.; expected .3,."):
        checked_labels([1, 2], 10, 3)


def test_keys_do_not_depend_on_the_types_of_seed_and_index():
    expected = jax.random.key_data(image_keys(5, jnp.arange(3)))
    for seed in (5, np.int64(5), np.uint8(5), 5.0, jnp.int32(5)):
        for index in (None, range(3), [0, 1, 2], np.arange(3, dtype=np.uint8), jnp.arange(3)):
            found = jax.random.key_data(checked_keys(seed, index, 3))
            np.testing.assert_array_equal(found, expected)
    last = [jax.random.key_data(checked_keys(0, [i], 1)).tolist() for i in (0, 2**31, 2**32 - 1)]
    assert len({str(key) for key in last}) == 3


@pytest.mark.parametrize("seed", [-1, 2**32, 2**64, 0.5, math.nan, "0", None, True, [0]])
def test_a_seed_that_jax_would_truncate_is_refused(seed):
    with pytest.raises(InputError, match="seed=.*: must be (0 or more|at most 42949)"):
        checked_keys(seed, None, 1)


@pytest.mark.parametrize("index", [[-1], [2**32], [0.5], [True], ["0"], [], [[0]], [0, 1]])
def test_invalid_image_numbers_are_refused(index):
    with pytest.raises(InputError, match="index .*(allowed are 0|shape|expected 1)"):
        checked_keys(0, index, 1)


def test_an_edit_without_images_is_refused():
    edit = functools.partial(checked_edit, labels=None, seed=0, classes=10)
    with pytest.raises(InputError, match="0 images and 0 of index"):
        edit(images=0, index=None)
    with pytest.raises(InputError, match="index .-1.: allowed"):
        edit(images=1, index=[-1])


def test_tokens_are_integers_below_the_vocabulary_size():
    assert checked_tokens([[0, 15]], (2,), 16).dtype == jnp.int32
    for tokens, message in (
        ([[0.0, 1.5]], "tokens are float64; give integers"),
        ([[math.nan, 0]], "give integers"),
        ([[0, 16]], "outside of 0 … 15"),
        ([[-1, 0]], "outside of 0 … 15"),
        ([0, 1], r"shape \(2,\); expected \(B, 2\)"),
        (np.zeros((0, 2), int), r"shape \(0, 2\)"),
        (3, r"shape \(\)"),
    ):
        with pytest.raises(InputError, match=message):
            checked_tokens(tokens, (2,), 16)


def test_a_rule_is_a_hashable_function():
    @dataclasses.dataclass
    class Rule:  # defines equality by value, and therefore has no hash
        def __call__(self, *given):
            return None

    with pytest.raises(InputError, match="choose=.*Rule.* has no hash.*give a function"):
        check_rule(Rule())
    with pytest.raises(InputError, match="choose=3: must be a function"):
        check_rule(3)
    check_rule(None, smooth=True)
    check_rule(lambda *given: None, smooth=False)


NUMBERS = [math.nan, math.inf, -1, 1e39, "1", True, [1]]


@pytest.mark.parametrize("options", [VAROptions(), MAROptions()])
def test_every_option_refuses_values_of_another_type_or_range(options):
    """Includes numbers that would overflow int32 or float32: top_k=5e9, or guidance=1e39."""
    hints = typing.get_type_hints(type(options))
    for field in dataclasses.fields(options):
        wrong = {"bool": ["no", 2], "str": ["x", "1", "2:²", ""], "int": [*NUMBERS, 5_000_000_000]}
        kind = type(getattr(options, field.name)).__name__
        numbers = wrong.get(kind, NUMBERS)
        if typing.get_args(hints[field.name]) and kind != "str":  # a number or a list of numbers
            numbers = [x for x in numbers if x != [1]] + [[], ["1"], [[1]], [-1]]
        for value in numbers:
            with pytest.raises(InputError, match=rf"{field.name}(\[0\])?(=| has [01] numbers)"):
                dataclasses.replace(options, **{field.name: value}).check()
    found = dataclasses.replace(options, guidance=np.float32(2)).check()
    assert type(found.guidance) is float and hash(found) is not None
