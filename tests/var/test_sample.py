import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from tests.helpers import golden_cases as golden
from varjax.nn.compute import ComputeConfig
from varjax.runtime import flops
from varjax.sampling.filters import filter_top_k_top_p
from varjax.sampling.guidance import apply_guidance
from varjax.sampling.sampler import KnownTokens, image_keys
from varjax.tokenizers.vq.model import bound_quantizer, decode_features
from varjax.tokenizers.vq.pyramid import Pyramid
from varjax.tokenizers.vq.quantizer import Quantizer
from varjax.var.kept_scales import keep_at_every_scale
from varjax.var.model import VAR
from varjax.var.network import VARModels
from varjax.var.sample import (
    VAROptions,
    choose_tokens,
    gumbel_noise,
    gumbel_softmax_weights,
    sample_scales,
    sample_tokens,
)

FUNCTIONS = golden.weights.outputs("functions")
LOGITS_BlV = jnp.asarray(FUNCTIONS["filter.logits"])[None]
GREEDY = VAROptions(top_k=1, top_p=0.0)


def random_quantizer():
    quantizer = Quantizer(Pyramid((1, 2, 4)), 32, 4, num_phi=1, phi_ratio=0.5, cosine=False)
    shapes = {"codebook": (32, 4), "phi_kernel": (1, 3, 3, 4, 4), "phi_bias": (1, 4)}
    rng = np.random.default_rng(0)
    params = {n: jnp.asarray(rng.normal(size=s), jnp.float32) for n, s in shapes.items()}
    return quantizer.bind({"params": params})


QUANTIZER = random_quantizer()


@functools.cache
def params(name):
    return {"tokenizer": golden.tokenizer_params(name), "var": golden.var_params(name)}


@functools.cache
def sampler(name):
    """Returns a compiled function (label_B, key_B, options, known) -> (tokens, features)."""
    run = jax.jit(functools.partial(sample_tokens, VARModels(*golden.configs(name))))
    return functools.partial(run, params(name))


@functools.cache
def decoder(name):
    """Returns a function that decodes features into images in the golden files' layout."""
    tokenizer, _ = golden.configs(name)
    params = golden.tokenizer_params(name)
    decode = jax.jit(functools.partial(decode_features, tokenizer))
    return lambda f_hat_BhwZ: golden.strided(name, (decode(params, f_hat_BhwZ) + 1) / 2)


@functools.cache
def teacher_forced(name):
    """Returns a function (tokens_BL, label_B, guidance) -> guided logits, without a cache."""
    tokenizer, var = golden.configs(name)

    @jax.jit
    def run(params, tokens_BL, label_B, guidance):
        quantizer = bound_quantizer(tokenizer, params["tokenizer"])
        input_BlZ = quantizer.teacher_forcing_input(quantizer.accumulated_scales(tokens_BL))
        both_2BLV = VAR(var).apply(
            {"params": params["var"]},
            jnp.concatenate([input_BlZ, input_BlZ]),
            jnp.concatenate([label_B, jnp.full_like(label_B, var.classes)]),
        )
        guided = [
            apply_guidance(both_2BLV[:, scale], 1 + (guidance - 1) * var.pyramid.progress(k))
            for k, scale in enumerate(var.pyramid.slices)
        ]
        return jnp.concatenate(guided, axis=1)

    return functools.partial(run, params(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
def test_greedy_generation_matches_reference(name):
    expected, label_B = golden.outputs(name), golden.outputs(name)["label"].astype(np.int32)
    for cfg in ("0", "1.5", "4"):
        guidance = float(cfg) + 1  # the official code subtracts 1
        options = GREEDY.replace(guidance=guidance)
        tokens_BL, f_hats = sampler(name)(label_B, image_keys(0, jnp.arange(2)), options)
        assert np.array_equal(tokens_BL, expected[f"generate.cfg{cfg}.tokens"])
        np.testing.assert_allclose(
            decoder(name)(f_hats[-1]), expected[f"generate.cfg{cfg}.image"], atol=2e-4
        )
        # Teacher-forced logits match, too, so they agree with the cached ones.
        guided_BLV = teacher_forced(name)(tokens_BL, label_B, jnp.float32(guidance))
        np.testing.assert_allclose(guided_BLV, expected[f"generate.cfg{cfg}.logits"], atol=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
@pytest.mark.parametrize("mode", ["inpaint", "outpaint"])
def test_edits_match_reference_and_keep_known_tokens(name, mode):
    _, var = golden.configs(name)
    expected = golden.outputs(name)
    tokens_BL = expected["tokens"].astype(np.int32)
    keep_Bhw = np.stack([expected[f"edit.{mode}.keep_mask"] > 0.5] * 2)
    known = KnownTokens(jnp.asarray(tokens_BL), keep_at_every_scale(var.pyramid, keep_Bhw))
    label_B = expected["label"].astype(np.int32)
    found_BL, f_hats = sampler(name)(
        label_B, image_keys(0, jnp.arange(2)), GREEDY.replace(guidance=2.5), known
    )
    keep_BL = np.asarray(known.keep_BL)
    assert np.array_equal(np.asarray(found_BL)[keep_BL], tokens_BL[keep_BL])
    assert np.array_equal(np.asarray(found_BL)[~keep_BL], expected[f"edit.{mode}.tokens"][~keep_BL])
    np.testing.assert_allclose(decoder(name)(f_hats[-1]), expected[f"edit.{mode}.image"], atol=2e-4)


@pytest.mark.parametrize("name", [n for n in FUNCTIONS if n.startswith("filter.k")])
def test_filters_match_reference(name):
    top_k, top_p = name.removeprefix("filter.k").split(".p")
    kept_lV = filter_top_k_top_p(LOGITS_BlV, int(top_k), float(top_p))[0] > -jnp.inf
    # Of equal logits, the reference may drop some, depending on its sort; here they all stay.
    least_l1 = np.where(FUNCTIONS[name], LOGITS_BlV[0], np.inf).min(axis=-1, keepdims=True)
    assert np.array_equal(kept_lV, LOGITS_BlV[0] >= least_l1)


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.7), (5, 0.0), (9, 0.85), (1, 0.5), (3, 1.0)])
@pytest.mark.parametrize("values", [3, 12, 10**6])
def test_filters_match_sorting_even_with_equal_logits(values, top_k, top_p):
    rng = np.random.default_rng(values)
    logits_lV = (rng.integers(-values, values, (40, 50)) / values * 6).astype(np.float32)
    kept_lV = filter_top_k_top_p(jnp.asarray(logits_lV)[None], top_k, top_p)[0] > -jnp.inf
    for logits_V, kept_V in zip(logits_lV.astype(np.float64), np.asarray(kept_lV), strict=True):
        kth = np.sort(logits_V)[-(top_k or 50)]
        p_V = np.where(logits_V >= kth, np.exp(logits_V), 0)
        p_V /= p_V.sum()
        below_V = np.array([p_V[logits_V < x].sum() for x in logits_V])
        # Top-p drops a code if it, its equals and all less likely codes add up to at most 1 - p.
        through_V = np.array([p_V[logits_V <= x].sum() for x in logits_V])
        expected_V = logits_V >= kth
        if top_p:
            expected_V &= (through_V > 1 - top_p) | (logits_V == logits_V.max())
        clear_V = abs(through_V - (1 - top_p)) > 1e-6  # otherwise rounding decides
        assert np.array_equal(kept_V[clear_V], expected_V[clear_V]), (below_V, through_V)


@pytest.mark.parametrize("k", [0, 4, 9])
def test_smooth_weights_match_reference(k):
    weights = gumbel_softmax_weights(LOGITS_BlV[0], jnp.asarray(FUNCTIONS["smooth.gumbel"]), k / 9)
    np.testing.assert_allclose(weights, FUNCTIONS[f"smooth.probs.si{k}"], atol=2e-6)


@pytest.mark.slow
def test_draws_follow_the_filtered_distribution():
    logits_BlV = LOGITS_BlV[:, :1]
    kept_BlV = filter_top_k_top_p(logits_BlV, 20, 0.8)
    draws = 20_000
    noise = gumbel_noise(image_keys(0, jnp.arange(draws)), kept_BlV)
    tokens = jnp.argmax(jnp.broadcast_to(kept_BlV, noise.shape) + noise, axis=-1)
    counts = np.bincount(np.asarray(tokens).ravel(), minlength=64)
    probability = np.asarray(jax.nn.softmax(kept_BlV[0, 0]), np.float64)
    support = probability > 0
    assert counts[~support].sum() == 0
    expected = draws * probability[support] / probability[support].sum()
    assert scipy.stats.chisquare(counts[support], expected).pvalue > 1e-3


def fake_network(label_B):
    """Returns a network without parameters; logits depend on label, scale and every input."""
    weights_ZV = np.random.default_rng(1).normal(size=(QUANTIZER.code_channels, QUANTIZER.vocab))

    def predict(input_BlZ, k, cache):
        number_B11 = jnp.asarray(label_B, jnp.float32)[:, None, None] + k + 1
        logits_BlV = jnp.sin(
            number_B11 * jnp.arange(QUANTIZER.vocab, dtype=jnp.float32)[None, None]
        )
        if input_BlZ is not None:
            logits_BlV = logits_BlV + input_BlZ @ jnp.asarray(weights_ZV, jnp.float32)
        return logits_BlV, cache

    return predict


def test_each_scale_sees_the_sum_of_all_coarser_ones():
    token_BL = np.random.default_rng(2).integers(0, QUANTIZER.vocab, (2, 21))
    calls = []

    def predict(input_BlZ, k, cache):
        calls.append((input_BlZ, cache))
        return None, f"cache of scale {k}"

    def choose(logits, k):
        token_Bl = jnp.asarray(token_BL[:, QUANTIZER.pyramid.slices[k]])
        return token_Bl, QUANTIZER.look_up(token_Bl)

    drawn_BL, drawn_f_hats = sample_scales(predict, choose, QUANTIZER, batch=2)
    f_hats = QUANTIZER.accumulated_scales(jnp.asarray(token_BL))
    np.testing.assert_array_equal(drawn_BL, token_BL)
    np.testing.assert_allclose(drawn_f_hats, f_hats, atol=1e-6)
    inputs, caches = zip(*calls, strict=True)
    assert caches == (None, "cache of scale 0", "cache of scale 1")
    assert inputs[0] is None
    for k in range(2):
        np.testing.assert_allclose(
            inputs[k + 1], QUANTIZER.next_input(f_hats[k], k), atol=1e-6, err_msg=f"scale {k + 1}"
        )


def test_known_tokens_are_kept_and_their_codes_added():
    rng = np.random.default_rng(3)
    known_BL, keep_BL = rng.integers(0, QUANTIZER.vocab, (2, 21)), rng.random((2, 21)) < 0.5

    def choose(logits, k):
        token_Bl = jnp.full((2, QUANTIZER.pyramid.lengths[k]), 7)
        return token_Bl, QUANTIZER.look_up(token_Bl)

    known = KnownTokens(jnp.asarray(known_BL), jnp.asarray(keep_BL))
    network = fake_network(np.array([0, 1]))
    drawn_BL, f_hats = sample_scales(network, choose, QUANTIZER, 2, known)
    expected_BL = np.where(keep_BL, known_BL, 7)
    np.testing.assert_array_equal(drawn_BL, expected_BL)
    expected_BhwZ = QUANTIZER.accumulated_scales(jnp.asarray(expected_BL))[-1]
    np.testing.assert_allclose(f_hats[-1], expected_BhwZ, atol=1e-6)


@pytest.mark.slow
def test_an_image_depends_only_on_its_index_seed_and_label():
    options = VAROptions(top_k=20, top_p=0.9)

    @jax.jit
    def draw(label_B, key_B):
        choose = functools.partial(choose_tokens, QUANTIZER, key_B=key_B, options=options)
        return sample_scales(fake_network(label_B), choose, QUANTIZER, len(key_B))[0]

    label_B = np.array([3, 1, 4, 1], np.int32)
    together = draw(label_B, image_keys(7, jnp.arange(4)))
    for i in range(4):
        alone = draw(label_B[i : i + 1], image_keys(7, jnp.array([i])))
        assert np.array_equal(alone[0], together[i])
    assert not np.array_equal(together[1], together[3])  # the same label, but another index
    assert not np.array_equal(draw(label_B, image_keys(8, jnp.arange(4))), together)


@pytest.mark.slow
def test_new_seeds_labels_and_options_do_not_recompile():
    run, key_B = sampler("base"), image_keys(0, jnp.arange(1))
    first, _ = run(np.array([1], np.int32), key_B, VAROptions(guidance=2.5, top_k=5, top_p=0.5))
    compiled = run.func._cache_size()
    key_B = image_keys(1, jnp.arange(1))
    second, _ = run(np.array([2], np.int32), key_B, VAROptions(guidance=1.0, top_k=0, top_p=0.9))
    assert run.func._cache_size() == compiled and not np.array_equal(first, second)


@pytest.mark.slow
def test_one_stream_without_guidance_matches_guidance_of_1():
    tokenizer, var = golden.configs("base")
    options, compute = (
        VAROptions(guidance=1.0, top_k=20, top_p=0.9),
        ComputeConfig(attention_impl="xla"),
    )
    label_B, key_B = np.array([3, 1], np.int32), image_keys(7, jnp.arange(2))
    models, args = VARModels(tokenizer, var, compute), (params("base"), label_B, key_B, options)
    (one, _), (two, _) = (
        jax.jit(functools.partial(sample_tokens, models, guided=guided))(*args)
        for guided in (0, None)
    )
    assert np.array_equal(one, two)
    work = [
        flops.count(lambda p, g=g: sample_tokens(models, p, *args[1:], guided=g), args[0])
        for g in (0, None)
    ]
    assert work[0] < 0.6 * work[1]


@pytest.mark.slow
def test_smooth_sampling_mixes_codes_except_those_of_known_tokens():
    options = VAROptions(smooth=True, top_k=0, top_p=0.0)

    @jax.jit
    def draw(key_B, known=None):
        choose = functools.partial(choose_tokens, QUANTIZER, key_B=key_B, options=options)
        return sample_scales(fake_network(np.array([1])), choose, QUANTIZER, 1, known)

    key_B = image_keys(0, jnp.arange(1))
    token_BL, f_hats = draw(key_B)
    hard_BhwZ = QUANTIZER.accumulated_scales(token_BL)[-1]
    assert jnp.max(jnp.abs(hard_BhwZ - f_hats[-1])) > 1e-2
    known = KnownTokens(token_BL, jnp.ones_like(token_BL, bool))
    _, kept_f_hats = draw(key_B, known)
    np.testing.assert_allclose(kept_f_hats[-1], hard_BhwZ, atol=1e-5)


@pytest.mark.parametrize(
    "bad", [{"top_k": -1}, {"top_p": 1.5}, {"guidance": -1.0}, {"guidance": 0.0}, {"top_k": 1.5}]
)
def test_options_out_of_range_are_refused(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        dataclasses.replace(VAROptions(), **bad).check()


def test_edit_masks_always_keep_a_scale_of_a_single_token():
    keep_BL = keep_at_every_scale(Pyramid((1, 2, 4)), np.eye(4, dtype=bool)[None])
    assert keep_BL[0, 0] and keep_BL[0, 5] and not keep_BL[0, 6]
    assert not keep_BL[0, 1:5].any()  # at most half of their area is kept
