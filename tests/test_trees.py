"""Tests paths, rules and differences of trees."""

import jax
import jax.numpy as jnp
import optax
import pytest

from varjax import trees

PARAMS = {"blocks": {"q": {"kernel": jnp.ones((2, 3))}}, "head": [jnp.ones(1), jnp.ones(2)]}


def test_paths_end_in_the_parameter_even_in_optimizer_states():
    assert list(trees.paths(PARAMS)) == ["blocks/q/kernel", "head/0", "head/1"]
    state = trees.paths(optax.adam(1e-3).init(PARAMS))
    assert {"0/mu/blocks/q/kernel", "0/nu/blocks/q/kernel", "0/count"} <= state.keys()


def test_map_with_path_keeps_the_structure():
    marked = trees.map_with_path(lambda path, leaf: (path, leaf.ndim), PARAMS)
    assert marked["blocks"]["q"]["kernel"] == ("blocks/q/kernel", 2)
    assert marked["head"][1] == ("head/1", 1)


def test_the_first_matching_rule_wins_and_no_match_is_an_error():
    rules = ((r"(^|/)q/kernel$", 1), (r"kernel$", 2))
    assert trees.first_match(rules, "a/q/kernel") == 1
    assert trees.first_match(rules, "a/seq/kernel") == 2
    with pytest.raises(ValueError, match="no rule matches 'bias'"):
        trees.first_match(rules, "bias")


def test_difference_lists_every_problem():
    abstract = jax.eval_shape(lambda: PARAMS)
    assert trees.difference(abstract, PARAMS) == ""
    actual = {
        "blocks": {"q": {"kernel": jnp.ones((3, 2))}},
        "head": [jnp.ones(1, jnp.bfloat16)],
        "extra": jnp.ones(4),
    }
    assert trees.difference(abstract, actual).splitlines() == [
        "missing:    head/1 (2,) float32",
        "unexpected: extra (4,) float32",
        "misshapen:  blocks/q/kernel is (3, 2) float32, expected (2, 3) float32",
        "misshapen:  head/0 is (1,) bfloat16, expected (1,) float32",
    ]
