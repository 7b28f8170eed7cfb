"""MAR's guidance: the steps and timesteps that it is limited to, custom rules, and guides."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.mar.test_sample import CATEGORICAL, CAUSAL, KEY_B, LABEL_B, TINY, params, tiny
from varjax.errors import InputError
from varjax.mar.denoising_schedule import denoising_schedules, denoising_steps
from varjax.mar.heads import DiffusionHead, DrawSettings
from varjax.mar.masking import UnmaskingSchedule
from varjax.mar.pipeline import MARPipeline
from varjax.mar.sample import MAROptions, check_sampling, make_setup, sample_mar_tokens

FEW = dict(diffusion_steps="3", clip_denoised=2.0, guidance_schedule="constant")


def test_step_groups_are_split_where_guidance_starts_and_ends():
    schedule = UnmaskingSchedule(length=64, steps=16, group_count=2)
    assert [g.steps for g in schedule.groups()] == [range(8), range(8, 16)]
    found = [g.steps for g in schedule.groups(guided=(3, 10))]
    assert found == [range(3), range(3, 8), range(8, 10), range(10, 16)]
    setup = make_setup(
        TINY, MAROptions(guidance=3.0, guidance_from=1, guidance_to=3, **FEW, steps=4)
    )
    assert setup.guided == (1, 3)
    assert make_setup(TINY, MAROptions(guidance=1.0, **FEW, steps=4)).guided == (0, 0)
    guidance = [setup.draw_settings(step).guidance for step in range(4)]
    np.testing.assert_allclose(guidance, [1, 3, 3, 1])


def test_equal_guidance_intervals_share_a_compilation():
    made = [
        make_setup(TINY, check_sampling(TINY, MAROptions(guidance=g, **FEW, steps=4)))
        for g in ((1, 2, 3, 1), (1, 5, 6.5, 1), (1, 2, 3, 4))
    ]
    first, second, other = (jax.tree.structure(setup) for setup in made)
    assert first == second != other


def sampled(config, setup, guide=None):
    sample = functools.partial(sample_mar_tokens, config)
    compiled = jax.jit(
        lambda p, setup: sample(
            p, LABEL_B, KEY_B, setup, guide=None if guide is None else (guide, p)
        ),
        compiler_options={"xla_backend_optimization_level": 0},
    )
    return np.asarray(compiled(params(config), setup))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "interval"),
    [(CATEGORICAL, (1, 2)), (CATEGORICAL | CAUSAL, (1, 3))],
    ids=["masked", "causal"],
)
def test_skipping_the_second_stream_where_guidance_is_off_changes_nothing(changes, interval):
    config, (start, stop) = tiny(changes), interval
    options = MAROptions(guidance=3.0, guidance_from=start, guidance_to=stop, **FEW, steps=2)
    setup = make_setup(config, check_sampling(config, options), None, 1)
    assert setup.guided == interval
    everywhere = setup.replace(guided=(0, setup.schedule.steps))
    without = sampled(config, setup)
    np.testing.assert_array_equal(without, sampled(config, everywhere))
    # A model that is its own guide samples as without guidance.
    unguided = make_setup(config, check_sampling(config, options.replace(guidance=1.0)), None, 1)
    alone = sampled(config, unguided)
    np.testing.assert_array_equal(sampled(config, setup, config), alone)
    assert (without != alone).any()


def test_guidance_is_limited_to_its_interval_of_timesteps():
    """The denoiser predicts its z, so a sample shows which z guided which timesteps."""
    head = DiffusionHead(channels=1)
    z = [jnp.ones((2, 3, 1)), jnp.zeros((2, 3, 1))]
    denoising = denoising_steps(denoising_schedules("4", 1), 0)

    def network(z_NC):
        return lambda xt_NZ, t_1: jnp.concatenate([z_NC, 0 * z_NC], axis=-1)

    def draw(z, timesteps, networks=(network,)):
        settings = DrawSettings(0, 3.0, timesteps, 1.0, denoising, 0.0)
        noise = lambda j: jnp.full((2, 3, 1), 0.1) * (j + 1)  # noqa: E731
        return np.asarray(head.draw(networks, z, noise, settings))

    everywhere, nowhere = draw(z, None), draw(z[:1], None)
    np.testing.assert_allclose(draw(z, (0, 1000)), everywhere, rtol=1e-5)
    two = network, lambda z_NC: network(z_NC[:, :1])  # a guide's z may have another width
    guided = draw([z[0], jnp.zeros((2, 3, 5))], None, two)
    np.testing.assert_allclose(guided, everywhere, rtol=1e-5)
    np.testing.assert_allclose(draw(z, (1, 1)), nowhere, rtol=1e-5)
    low, high = draw(z, (0, 500)), draw(z, (500, 1000))
    for part in (low, high):
        assert np.abs(part - everywhere).min() > 1e-3 and np.abs(part - nowhere).min() > 1e-3


@pytest.mark.slow
def test_a_custom_rule_draws_the_tokens_with_and_without_guidance():
    options = MAROptions(guidance=3.0, guidance_from=1, **FEW, steps=2)
    setup, asked = make_setup(TINY, check_sampling(TINY, options), None, 2), []

    def rule(networks, z, noise, settings):
        asked.append((len(networks), len(z)))
        return TINY.head.draw(networks, z, noise, settings)

    def token_shape(choose):
        sample = functools.partial(sample_mar_tokens, TINY, choose=choose)
        return jax.eval_shape(sample, params(TINY), LABEL_B, KEY_B, setup).shape

    assert token_shape(rule) == token_shape(None)
    assert asked == [(1, 1), (1, 2)]  # without guidance, and with it
    with pytest.raises(InputError, match="choose returned tokens of shape .*; needed is"):
        token_shape(lambda *given: rule(*given)[..., None])


def test_incompatible_guides_are_refused_and_others_change_the_identity():
    model, codes, raster = (
        MARPipeline(None, config, {"tokenizer": {}, "mar": params(config)})
        for config in (TINY, tiny(CATEGORICAL), dataclasses.replace(TINY, order="raster"))
    )
    with pytest.raises(InputError, match="tokens: guide .*, model"):
        model.with_guide(codes)
    with pytest.raises(InputError, match="order: guide raster, model random"):
        model.with_guide(raster)
    with pytest.raises(InputError, match="options of a diffusion head"):
        codes.options(steps=4, guidance_timestep_to=500)
    with pytest.raises(InputError, match="guidance has 3 numbers: give one, or 4"):
        model.options(steps=4, guidance=[1, 2, 3])
    model.loader = lambda location: model
    guided, options = model.with_guide("weak"), model.options(steps=4, guidance=2)
    assert guided.loader is model.loader
    assert guided.identity() != model.identity()
    other = dataclasses.replace(TINY, encoder_heads=1)
    other = MARPipeline(None, other, {"tokenizer": {}, "mar": params(TINY)})
    assert other.identity()["weights"] == model.identity()["weights"]
    guides = [model, model.with_guide(other), guided, other]
    assert len({each.identity()["model_config"] for each in guides}) == len(guides)
    assert guided.sampling_bytes(8, options) > model.sampling_bytes(
        8, model.options(steps=4, guidance=1)
    )
