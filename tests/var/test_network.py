"""Collaborative decoding (CoDe), in which two networks draw an image together."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import varjax
from tests.helpers import golden_cases as golden
from tests.helpers import runs
from varjax.convert import apply_map
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.mar.pipeline import MARPipeline
from varjax.nn.compute import EXACT
from varjax.sampling.sampler import image_keys
from varjax.tokenizers.vq.model import bound_quantizer, decode_features
from varjax.var.model import VARConfig
from varjax.var.network import (
    Refiner,
    VARModels,
    bind_network,
    collaborative_decoding,
    guided_by,
    var_sampling_bytes,
)
from varjax.var.pipeline import VARPipeline
from varjax.var.sample import VAROptions, choose_tokens, sample_scales, sample_tokens

CASE = golden.weights.case("code_eight")
TOKENIZER, VAR = golden.configs("base")
LABEL_B, KEY_B = jnp.array([4, 9]), image_keys(0, jnp.arange(2))
K = len(VAR.pyramid)


@functools.cache
def params(name="base"):
    return {"tokenizer": golden.tokenizer_params(name), "var": golden.var_params(name)}


@pytest.mark.slow
def test_greedy_collaborative_decoding_matches_reference():
    tokenizer, drafter = golden.configs("ten_scales")
    sizes = {"depth": CASE["depth"], "width": CASE["embed_dim"], "heads": CASE["num_heads"]}
    small = dataclasses.replace(drafter, **sizes)
    weights = apply_map.from_official(small, golden.weights.state_dict("code_eight", "var"))
    refiner, expected = Refiner(small, CASE["draft_scales"]), golden.outputs("code_eight")
    models = VARModels(tokenizer, drafter, refiner=refiner)
    sample = jax.jit(functools.partial(sample_tokens, models))
    options = VAROptions(guidance=CASE["cfg"] + 1, top_k=1, top_p=0.0)
    all_params = {**params("ten_scales"), "refiner": weights}
    token_BL, f_hats = sample(all_params, jnp.array(CASE["labels"]), KEY_B, options)
    np.testing.assert_array_equal(token_BL, expected["tokens"])
    image_BHWC = (decode_features(tokenizer, all_params["tokenizer"], f_hats[-1]) + 1) / 2
    image_BCHW = golden.strided("ten_scales", image_BHWC)
    np.testing.assert_allclose(image_BCHW, expected["image"], atol=2e-4)


def draw(network, quantizer):
    """Returns the logits of every scale, and the features, of two drawn images."""
    logits = []

    def choose(logits_BlV, k):
        logits.append(logits_BlV)
        return choose_tokens(quantizer, logits_BlV, k, KEY_B, VAROptions())

    _, f_hats = sample_scales(network, choose, quantizer, 2)
    return jnp.concatenate(logits, axis=1), f_hats[-1]


@pytest.mark.slow
def test_a_model_that_is_its_own_refiner_draws_as_it_does_alone():
    # Guidance ends after, together with, and before the drafted scales.
    scale_K, guided = [1.0, 2.0, 1.0, 1.0], 2

    def bound(params, guided, scales=None):
        return bind_network(VAR, params["var"], LABEL_B, scale_K, EXACT, guided, scales)

    @jax.jit
    def run(params):
        quantizer = bound_quantizer(TOKENIZER, params["tokenizer"])
        whole = draw(bound(params, guided), quantizer)
        parts = []
        for N in range(1, K):
            drafter = bound(params, min(guided, N), scales=N)
            small = bound(params, guided if guided > N else 0)
            parts.append(draw(collaborative_decoding(drafter, small, N), quantizer))
        return whole, parts

    whole, parts = run(params())
    for logits_BLV, f_hat_BhwZ in parts:
        np.testing.assert_allclose(logits_BLV, whole[0], atol=1e-4)
        np.testing.assert_allclose(f_hat_BhwZ, whole[1], atol=1e-5)


@pytest.mark.slow
def test_the_first_pass_of_the_refiner_fills_its_cache():
    rng = np.random.default_rng(0)
    inputs = [rng.normal(size=(2, n, VAR.code_channels)) for n in VAR.pyramid.lengths[1:3]]
    inputs = [jnp.asarray(x, jnp.float32) for x in inputs]

    @jax.jit
    def run(params):
        def bound(scales=None):
            return bind_network(VAR, params["var"], LABEL_B, None, EXACT, scales=scales)

        network, cache = bound(scales=3), None
        for k, input_BlZ in enumerate([None, *inputs]):
            logits_BlV, cache = network(input_BlZ, k, cache)
        at_once = bound()(jnp.concatenate(inputs, axis=1), 2, None)
        joined, state = collaborative_decoding(bound(scales=2), bound(), 2), None
        for k, input_BlZ in enumerate([None, *inputs[:1]]):
            _, state = joined(input_BlZ, k, state)
        return (logits_BlV, cache), at_once, state, joined(inputs[1], 2, state)

    (logits_BlV, cache), (filled_BlV, filled), (drafted, draft_cache), handed = run(params())
    stop = VAR.pyramid.slices[2].stop
    np.testing.assert_allclose(filled_BlV, logits_BlV, atol=1e-4)
    for name in ("keys_SBLC", "values_SBLC"):
        found = getattr(filled, name)[:, :, :stop]
        np.testing.assert_allclose(found, getattr(cache, name), atol=1e-5)
    # The drafter's cache has room for its own scales only, and it hands over only inputs.
    assert draft_cache.keys_SBLC.shape[2] == VAR.pyramid.slices[1].stop
    np.testing.assert_array_equal(drafted[0], inputs[0])
    np.testing.assert_array_equal(handed[0], filled_BlV)
    assert handed[1].keys_SBLC.shape[2] == VAR.pyramid.length


def test_each_network_is_called_only_at_its_own_scales():
    calls = []

    def network(name):
        def predict(input_BlZ, k, cache):
            calls.append((name, k, None if input_BlZ is None else input_BlZ.shape[1], cache))
            return jnp.ones((2, VAR.pyramid.lengths[k], 5)), f"{name} {k}"

        return predict

    joined, state = collaborative_decoding(network("large"), network("small"), 2), None
    joined = guided_by(joined, network("guide"), np.full(K, 2.0), guided=1)
    for k, length in enumerate(VAR.pyramid.lengths):
        _, state = joined(jnp.ones((2, length, 3)) if k else None, k, state)
    assert [call for call in calls if call[0] == "large"] == [
        ("large", 0, None, None), ("large", 1, 4, "large 0"),
    ]  # fmt: skip
    assert [call for call in calls if call[0] == "small"] == [
        ("small", 2, 4 + 9, None), ("small", 3, 16, "small 2"),
    ]  # fmt: skip
    assert [call for call in calls if call[0] == "guide"] == [("guide", 0, None, None)]


def test_a_refiner_needs_less_memory_than_the_model_alone():
    large, small = VARConfig.preset("d30"), VARConfig.preset("d16")
    tokenizer = dataclasses.replace(TOKENIZER, scales=large.scales)
    alone, *refined = (
        var_sampling_bytes(VARModels(tokenizer, large, EXACT, refiner=refiner), 64)
        for refiner in (None, *(Refiner(small, scales) for scales in (9, 8, 6)))
    )
    assert sorted(refined, reverse=True) == refined and refined[0] < alone
    # The refiner draws the last scales, so both need at least what it needs alone.
    assert refined[-1] >= var_sampling_bytes(VARModels(tokenizer, small, EXACT), 64)


@functools.cache
def model(name="base"):
    return VARPipeline(*golden.configs(name), params(name))


def test_incompatible_refiners_are_refused_before_compilation():
    other_classes = dataclasses.replace(VAR, classes=3)
    other_scales = dataclasses.replace(VAR, scales=(1, 2, 4))
    other_codes = jax.tree.map(lambda x: x + 1, params()["tokenizer"])
    loaded = []

    def named(location):
        loaded.append(location)
        return model()

    large = VARPipeline(TOKENIZER, VAR, params())
    for refiner, draft_scales, problem in (
        (model(), 0, "draft_scales=0: must be 1 or more, a whole number up to 3"),
        ("var_d16", 4, "draft_scales=4: must be at most 3"),
        (model(), 1.5, "draft_scales=1.5: must be 1 or more, a whole number"),
        ("var_d16", 1, "refiner=var_d16: give a model that was loaded with varjax.load"),
        (VARPipeline(TOKENIZER, other_classes, params()), 1, "classes: refiner 3, model 10"),
        (VARPipeline(TOKENIZER, other_scales, params()), 1, r"scales: refiner \(1, 2, 4\), model"),
        (VARPipeline(TOKENIZER, VAR, params() | {"tokenizer": other_codes}), 1,
         "refiner's tokenizer has different weights"),
        (MARPipeline(None, runs.MAR, {"mar": {}, "tokenizer": {}}), 1, "refiner is a MARPipeline"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=problem):
            large.with_refiner(refiner, draft_scales)
    large.loader = named
    assert large.with_refiner("small", 2).loader is named and loaded == ["small"]
    with pytest.raises(InputError, match="draft_scales=8: a refiner draws .* none is given"):
        varjax.load("nowhere", draft_scales=8)


@pytest.mark.slow
def test_a_loaded_model_edits_with_a_refiner_and_identifies_it():
    alone = varjax.load(runs.var())
    joined = alone.with_refiner(str(runs.var()), draft_scales=2)
    assert joined.refiner == Refiner(runs.VAR, 2)
    assert joined.params.keys() == {"tokenizer", "var", "refiner"}
    images_BHWC, keep = Digits().source("held_out").images_NHWC[:3], np.zeros((4, 4), bool)
    edits = [m.edit(images_BHWC, keep, [1, 2, 3], seed=1) for m in (alone, joined)]
    np.testing.assert_allclose(edits[1], edits[0], atol=1e-5)
    identities = [m.identity() for m in (alone, joined, alone.with_refiner(alone, 1))]
    assert [identity.get("draft_scales") for identity in identities] == [None, 2, 1]
    assert identities[0]["weights"] != identities[1]["weights"] == identities[2]["weights"]
    both = joined.with_guide(alone)
    assert both.refiner == joined.refiner and both.guide == runs.VAR
    with pytest.raises(
        InputError, match="refiner=var_d16: models of the family mar take no refiner"
    ):
        varjax.load(runs.mar(), refiner="var_d16")
