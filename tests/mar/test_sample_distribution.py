"""MAR's samples with an exact network, against the distribution of that network.

The exact network is that of normal tokens with variance 1, whose mean depends on the class and the
known tokens. Their noise and the variance β of each step have closed forms, so the loop samples
them exactly with any number of denoising steps.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from varjax.mar.heads import DiffusionHead
from varjax.mar.masking import draw_orders
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions, make_setup, sample_masked
from varjax.nn.diffusion import NoiseSchedule
from varjax.nn.rng import ImageStream, stream_keys
from varjax.sampling.sampler import KnownTokens, image_keys

pytestmark = pytest.mark.slow

CONFIG = MARConfig(
    width=2, encoder_depth=1, decoder_depth=1, encoder_heads=1, decoder_heads=1,
    head=DiffusionHead(channels=1, depth=1, width=2), classes=2, latent_map=(2, 2), buffer_size=1,
)  # fmt: skip
IMAGES, TOKENS = 2500, 4
CLASS_MEANS, KNOWN_WEIGHT = np.array([1.5, -2.0, 0.5], np.float32), 0.5  # the last is for no class
# KNOWN_WEIGHT multiplies the mean of the known tokens. Each of the four steps draws one token.
# Linear guidance grows with the fraction known after a step; at least one counts as masked.
LINEAR_FRACTIONS = (1 / 4, 2 / 4, 3 / 4, 3 / 4)


def exact_hidden(label_B, guided):
    """Replaces the transformer by a function whose z is the mean of a token, for each stream."""
    labels = [label_B, jnp.full_like(label_B, CONFIG.classes)] if guided else [label_B]

    def hidden(token_BnZ, position_Bn, known_Bn):
        known_Bn1 = known_Bn[..., None].astype(jnp.float32)
        count_B1 = jnp.maximum(jnp.sum(known_Bn1, axis=1), 1)
        known_mean_B1 = jnp.sum(token_BnZ * known_Bn1, axis=1) / count_B1
        means = (jnp.asarray(CLASS_MEANS)[x_B][:, None] for x_B in labels)
        means = (class_B1 + KNOWN_WEIGHT * known_mean_B1 for class_B1 in means)
        return [jnp.broadcast_to(z_B1[:, None], (len(z_B1), TOKENS, 1)) for z_B1 in means]

    return hidden


def exact_denoiser(mean_N1):
    """Replaces the head's network by the exact noise in x_t, and +1, which selects variance β."""
    alpha_bar_T = jnp.asarray(NoiseSchedule().alpha_bar_J, jnp.float32)

    def denoise(xt_N1, t_1):
        alpha_bar_11 = alpha_bar_T[t_1][:, None]
        noise_N1 = jnp.sqrt(1 - alpha_bar_11) * (xt_N1 - jnp.sqrt(alpha_bar_11) * mean_N1)
        return jnp.concatenate([noise_N1, jnp.ones_like(noise_N1)], axis=-1)

    return denoise


def residuals(options, fractions):
    """Samples tokens and subtracts their target mean; returns (images, steps)."""
    # With jax 0.12, seed 0 draws an equal pair, which is common among 10,000 float32 numbers.
    key_B, label_B = image_keys(1, jnp.arange(IMAGES)), jnp.arange(IMAGES) % 2
    order_BL = draw_orders(CONFIG, key_B)
    setup = make_setup(CONFIG, options.check())

    @jax.jit
    def sample(label_B, key_B, setup):
        noise_key_B, head = stream_keys(key_B, ImageStream.NOISE), CONFIG.head

        def draw(z, position_Bm, number):
            noise = functools.partial(head.sampling_noise, noise_key_B, position_Bm)
            return head.draw([exact_denoiser], z, noise, setup.draw_settings(number))

        hidden = exact_hidden(label_B, setup.guided)
        shape = IMAGES, TOKENS
        nothing = KnownTokens(jnp.zeros((*shape, 1)), jnp.zeros(shape, bool))
        return sample_masked(hidden, draw, nothing, order_BL, setup.groups)

    token_BL = np.asarray(sample(label_B, key_B, setup))[..., 0]
    drawn_BS = np.take_along_axis(token_BL, np.asarray(order_BL), axis=1)
    found = []
    for step, fraction in enumerate(fractions):
        scale = 1 + (options.guidance - 1) * fraction
        class_B = CLASS_MEANS[np.asarray(label_B)]
        mean_B = CLASS_MEANS[2] + scale * (class_B - CLASS_MEANS[2])
        if step:  # both streams of guidance see the same known tokens
            mean_B = mean_B + KNOWN_WEIGHT * drawn_BS[:, :step].mean(axis=1)
        # x_T is drawn from N(0, 1), without the signal that the noise schedule leaves in it.
        left = NoiseSchedule().alpha_bar_J[setup.noise_schedules[step].timestep_J[-1]]
        found.append(drawn_BS[:, step] - (1 - left) * mean_B)
    return np.stack(found, axis=1)


@pytest.mark.parametrize(
    ("options", "fractions"),
    [
        (dict(guidance=1.0), LINEAR_FRACTIONS),
        (dict(guidance=1.0, temperature=0.9), LINEAR_FRACTIONS),
        (dict(guidance=3.0, guidance_schedule="linear"), LINEAR_FRACTIONS),
        (dict(guidance=3.0, guidance_schedule="constant"), (1,) * 4),
        (dict(guidance=3.0, diffusion_steps="12:3"), LINEAR_FRACTIONS),
    ],
    ids=["plain", "temperature", "linear", "constant", "DiSA"],
)
def test_moments_and_quantiles_match_target(options, fractions):
    options = MAROptions(**{"steps": TOKENS, "diffusion_steps": "20"} | options)
    residual_BS = residuals(options, fractions)
    draws, variance = residual_BS.size, cooled_variance(options)
    assert draws == 10_000
    # Four standard errors, for each step and for all steps together.
    np.testing.assert_allclose(residual_BS.mean(axis=0), 0, atol=4 / IMAGES**0.5)
    np.testing.assert_allclose(residual_BS.var(axis=0), variance, rtol=4 * (2 / IMAGES) ** 0.5)
    assert abs(residual_BS.mean()) < 4 / draws**0.5
    assert residual_BS.var() == pytest.approx(variance, rel=4 * (2 / draws) ** 0.5)
    for p in (0.01, 0.1, 0.25, 0.5, 0.75, 0.9, 0.99):
        expected = stats.norm.ppf(p)
        error = (p * (1 - p) / draws) ** 0.5 / stats.norm.pdf(expected)
        found = np.quantile(residual_BS, p) / variance**0.5
        assert found == pytest.approx(expected, abs=4 * error), p
    # All draws are different, and those of an image are uncorrelated.
    assert len(np.unique(residual_BS)) == draws
    correlation_SS = np.corrcoef(residual_BS.T) - np.eye(TOKENS)
    assert np.abs(correlation_SS).max() < 4.5 / IMAGES**0.5


def cooled_variance(options):
    """Returns the variance of tokens, which a temperature below 1 reduces in each step."""
    schedule, variance = NoiseSchedule(int(options.diffusion_steps.partition(":")[0])), 1.0
    if options.temperature == 1:
        return variance
    for j in reversed(range(20)):
        added = options.temperature**2 * schedule.beta_J[j] if j else 0
        variance = (1 - schedule.beta_J[j]) * variance + added
    return variance
