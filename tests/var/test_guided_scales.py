"""VAR's guidance: the scales that it is limited to, custom rules, and guides."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import runs
from tests.var.test_sample import QUANTIZER
from varjax.checkpoints.class_names import known_class_names
from varjax.errors import InputError
from varjax.nn.compute import ComputeConfig
from varjax.runtime import flops
from varjax.sampling.filters import filter_top_k_top_p
from varjax.sampling.sampler import image_keys
from varjax.var.model import VARConfig
from varjax.var.network import VARModels, bind_network, guided_by, var_sampling_bytes
from varjax.var.pipeline import VARPipeline
from varjax.var.sample import (
    VAROptions,
    choose_tokens,
    gumbel_noise,
    sample_scales,
)

VAR = VARConfig(depth=1, width=16, heads=2, classes=10, scales=(1, 2, 4), vocab=32, code_channels=4)
COMPUTE = ComputeConfig(attention_impl="xla")
LABEL_B = np.array([3, 1], np.int32)


@functools.cache
def params():
    """Draws parameters as if trained: none is 0, and the logits depend on the class."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(VAR.init, jax.random.key(0))
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), x.dtype), shapes)


def logits_of(network):
    """Returns the logits of all scales if each scale's likeliest tokens are chosen."""
    found = []

    def choose(logits_BlV, k):
        found.append(logits_BlV)
        token_Bl = jnp.argmax(logits_BlV, axis=-1)
        return token_Bl, QUANTIZER.look_up(token_Bl)

    sample_scales(network, choose, QUANTIZER, len(LABEL_B))
    return jnp.concatenate(found, axis=1)


@pytest.mark.slow
def test_skipping_the_second_stream_where_guidance_is_off_changes_nothing():
    network = functools.partial(bind_network, VAR)

    @jax.jit
    def run(params, scale_K):
        no_class_B = np.full_like(LABEL_B, VAR.classes)
        alone, no_class = (
            network(params, label_B, None, COMPUTE) for label_B in (LABEL_B, no_class_B)
        )
        return {
            "all": logits_of(network(params, LABEL_B, scale_K, COMPUTE)),
            "two": logits_of(network(params, LABEL_B, scale_K, COMPUTE, 2)),
            "none": logits_of(network(params, LABEL_B, scale_K, COMPUTE, 0)),
            "alone": logits_of(alone),
            "models": logits_of(guided_by(alone, no_class, scale_K)),
            "two of models": logits_of(guided_by(alone, no_class, scale_K, 2)),
        }

    on = run(params(), jnp.array([1.0, 3.0, 2.0]))
    off_at_the_end = run(params(), jnp.array([1.0, 3.0, 1.0]))
    for found in (on, off_at_the_end):
        # A separate "no class" model with its own cache guides like the second stream.
        np.testing.assert_allclose(found["models"], found["all"], atol=1e-5)
        np.testing.assert_allclose(found["two of models"], found["two"], atol=1e-5)
        np.testing.assert_allclose(found["none"], found["alone"], atol=1e-6)
    np.testing.assert_allclose(off_at_the_end["two"], off_at_the_end["all"], atol=1e-5)
    assert np.abs(on["two"][:, 5:] - on["all"][:, 5:]).max() > 0.1
    assert np.abs(on["all"][:, 1:5] - on["alone"][:, 1:5]).max() > 0.1

    work = {
        guided: flops.count(
            lambda p, guided=guided: logits_of(
                network(p, LABEL_B, np.ones(3, np.float32), COMPUTE, guided)
            ),
            params(),
        )
        for guided in (0, 2, 3)
    }
    assert work[0] < 0.6 * work[3] and work[2] < 0.75 * work[3]


def test_a_custom_rule_can_reproduce_the_built_in_one():
    options = VAROptions(top_k=5, top_p=0.9).check()
    logits_BlV = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 32)) * 3, jnp.float32)
    key_B = image_keys(0, jnp.arange(2))

    def rule(logits_BlV, k, key_B):
        kept_BlV = filter_top_k_top_p(logits_BlV, 5, 0.9)
        return jnp.argmax(kept_BlV + gumbel_noise(key_B, kept_BlV), axis=-1)

    for k in (0, 1):
        built_in = choose_tokens(QUANTIZER, logits_BlV, k, key_B, options)
        own = choose_tokens(QUANTIZER, logits_BlV, k, key_B, options, rule)
        for found, expected in zip(own, built_in, strict=True):
            np.testing.assert_array_equal(found, expected)
    with pytest.raises(InputError, match=r"shape \(2, 4, 1\) at scale 1; needed is .* = \(2, 4\)"):
        choose_tokens(
            QUANTIZER, logits_BlV, 1, key_B, options, lambda *given: rule(*given)[..., None]
        )


def test_options_by_scale_apply_at_their_scale():
    logits_BlV = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 32)), jnp.float32)
    key_B = image_keys(0, jnp.arange(2))

    def tokens(k, **options):
        return choose_tokens(QUANTIZER, logits_BlV, k, key_B, VAROptions(**options))[0]

    likeliest = jnp.argmax(logits_BlV, axis=-1)
    draws = dict(top_k=0, top_p=0.0)
    by_scale = dict(top_k=(1, 0, 0), top_p=(0.0, 0.0, 1e-6), temperature=(1.0, 0.0, 5.0))
    np.testing.assert_array_equal(tokens(0, **by_scale), likeliest)  # top_k of 1
    np.testing.assert_array_equal(tokens(1, **by_scale), likeliest)  # temperature of 0
    np.testing.assert_array_equal(tokens(2, **by_scale), likeliest)  # the smallest top_p
    assert not np.array_equal(tokens(1, **draws), likeliest)
    np.testing.assert_array_equal(tokens(1, **draws), tokens(1, **draws, temperature=1.0))


def pipeline(config=VAR, tokenizer_seed=0, **changes):
    tokenizer = dataclasses.replace(runs.TOKENIZER, vocab=32, **changes)
    rng = np.random.default_rng(tokenizer_seed)
    shapes = jax.eval_shape(tokenizer.init, jax.random.key(0))
    weights = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), shapes)
    return VARPipeline(tokenizer, config, {"tokenizer": weights, "var": params()}, VAROptions())


def test_incompatible_guides_are_refused():
    model, other = pipeline(), dataclasses.replace(VAR, classes=9)
    for guide, message in (
        (pipeline(other), "classes: guide 9, model 10"),
        (pipeline(dataclasses.replace(VAR, scales=(1, 4)), scales=(1, 4)), "scales: guide"),
        (pipeline(tokenizer_seed=1), "tokenizer has different weights"),
        (3, "guide is a int; it must be a VARPipeline"),
    ):
        with pytest.raises(InputError, match=message):
            model.with_guide(guide)


@pytest.mark.parametrize("role", ["guide", "refiner"])
def test_guides_and_refiners_with_other_class_names_are_refused(role):
    model, other = pipeline(), pipeline()
    refine = functools.partial(model.with_refiner, draft_scales=1)
    join = model.with_guide if role == "guide" else refine
    model.labels = known_class_names(["cat", "dog", *"cdefghij"])
    join(other)  # its classes have no names
    other.labels = known_class_names(["dog", "cat", *"cdefghij"])
    with pytest.raises(InputError, match=f"label 0 is 'dog' for the {role}, but 'cat' for this"):
        join(other)
    other.labels = model.labels
    join(other)


def test_a_guided_model_has_another_identity_and_needs_more_memory():
    model = pipeline()
    guided = model.with_guide(model)
    assert guided.identity() != model.identity() and guided.guide == VAR
    assert guided.params.keys() == {"tokenizer", "var", "guide"}
    on, off = (guided.options(guidance=guidance) for guidance in (2, 1))
    assert guided.sampling_bytes(8, on) > guided.sampling_bytes(8, off)
    assert guided.sampling_bytes(8, off) > model.sampling_bytes(8, off)  # the guide's weights
    with pytest.raises(InputError, match="smooth: not with `choose`"):
        model.sample([1], choose=lambda *_: None, smooth=True)
    with pytest.raises(InputError, match="choose=3: must be a function"):
        model.sample([1], choose=3)


def test_settings_that_change_no_weight_are_part_of_the_identity():
    other = dataclasses.replace(VAR, gate_init=0.5)
    model, strange = pipeline(), pipeline(other)
    models = [model, strange, pipeline(phi_ratio=0.25), pipeline(groups=2)]
    models += [model.with_guide(weak) for weak in (model, strange)]
    models += [model.with_refiner(small, 1) for small in (model, strange)]
    identities = [each.identity() for each in models]
    assert len({identity["model_config"] for identity in identities}) == len(models)
    assert len({identity["weights"] for identity in identities}) == 3  # alone, guided, refined
    assert pipeline().identity() == model.identity()


def test_memory_estimate_drops_the_cache_of_a_stream_that_ends():
    var = VARConfig.preset("d16")
    tokenizer = dataclasses.replace(runs.TOKENIZER, scales=var.scales)
    models = VARModels(tokenizer, var, COMPUTE)
    needed = [var_sampling_bytes(models, 32, guided) for guided in (None, 9, 5, 0)]
    assert needed == sorted(needed, reverse=True) and needed[0] > 1.9 * needed[-1]
    with_guide = var_sampling_bytes(dataclasses.replace(models, guide=VAR), 32)
    assert needed[-1] < with_guide < needed[0]


def test_only_the_joined_model_uses_device_memory_and_only_when_it_draws():
    parts = pipeline(), pipeline()
    before = jax.live_arrays()  # kept alive, so that new arrays cannot reuse their ids
    known = {id(array) for array in before}

    def new_bytes():
        return sum(array.nbytes for array in jax.live_arrays() if id(array) not in known)

    guided = parts[0].with_guide(parts[1])
    assert guided.weights.nbytes > parts[0].weights.nbytes
    assert new_bytes() == 0
    guided.weights.compile(lambda params, _, x_B: x_B)(None, np.zeros(1, np.float32))
    assert new_bytes() == guided.weights.nbytes
