import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax.checkpoints.weights import abstract_params
from varjax.tokenizers.kl.model import (
    KLConfig,
    KLTokenizer,
    kl_divergence,
    sample_posterior,
    split_moments,
)

SMALL = dict(
    image_size=(8, 12), image_channels=2, width=8, channel_mult=(1, 2), blocks=1, groups=4,
    latent_channels=3,
)  # fmt: skip


def small_config(**changes) -> KLConfig:
    return KLConfig(**SMALL | changes)


@functools.cache
def small() -> tuple[KLConfig, dict]:
    config = small_config()
    return config, jax.jit(config.init)(jax.random.key(0))


def test_defaults_match_the_released_model():
    params = abstract_params(KLConfig())
    sizes = {name: sum(x.size for x in jax.tree.leaves(part)) for name, part in params.items()}
    assert sizes.pop("latent_std") == 1 and sum(sizes.values()) == 66_456_019
    assert KLConfig().latent_shape == (16, 16, 16)
    assert KLConfig((64, 48)).latent_shape == (4, 3, 16)
    assert KLConfig((64, 48)).image_shape == (64, 48, 3)


@pytest.mark.slow
def test_encode_and_decode_match_the_forward_pass():
    config, params = small()
    images_BHWC = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 2), np.uint8)
    latents = jax.jit(config.encode)(params, images_BHWC)
    spec = {name: (2, *array.shape) for name, array in config.latent_spec.items()}
    assert {name: x.shape for name, x in latents.items()} == spec
    x_BHWC = images_BHWC.astype(np.float32) / 127.5 - 1
    y_BHWC, found = jax.jit(KLTokenizer(config).apply)({"params": params}, x_BHWC)
    for name in spec:
        np.testing.assert_allclose(latents[name], found[name], atol=1e-5)
    decoded_BHWC = jax.jit(config.decode)(params, {"mean_BhwZ": latents["mean_BhwZ"]})
    np.testing.assert_allclose(decoded_BHWC, (np.clip(y_BHWC, -1, 1) + 1) / 2, atol=1e-5)
    assert np.std(decoded_BHWC) > 0.01


@pytest.mark.slow
def test_every_parameter_but_latent_std_has_a_gradient():
    config, params = small()

    @jax.jit
    @jax.grad
    def grads(params):
        noise_BhwZ = jax.random.normal(jax.random.key(1), (2, *config.latent_shape))
        x_BHWC = jax.random.normal(jax.random.key(2), (2, *config.image_shape))
        y_BHWC, latents = KLTokenizer(config).apply({"params": params}, x_BHWC, noise_BhwZ)
        return jnp.mean(jnp.square(y_BHWC - x_BHWC)) + jnp.mean(kl_divergence(latents))

    found = grads(params)
    assert found.pop("latent_std") == 0
    assert all(np.any(g != 0) for g in jax.tree.leaves(found))


def test_kl_divergence_matches_an_estimate_from_samples():
    """The estimate is the mean of log posterior(z) - log normal(z)."""
    mean_BhwZ, std_BhwZ = np.float32([[[[0.5, -1.0]]]]), np.float32([[[[0.3, 2.0]]]])
    latents = {"mean_BhwZ": jnp.asarray(mean_BhwZ), "std_BhwZ": jnp.asarray(std_BhwZ)}
    noise_BhwZ = np.random.default_rng(0).standard_normal((200_000, 1, 1, 2), np.float32)
    z_BhwZ = np.asarray(sample_posterior(latents, jnp.asarray(noise_BhwZ)))
    ratio_B = np.sum(z_BhwZ**2 / 2 - noise_BhwZ**2 / 2 - np.log(std_BhwZ), axis=(1, 2, 3))
    np.testing.assert_allclose(kl_divergence(latents), [ratio_B.mean()], rtol=0.01)
    normal = {"mean_BhwZ": jnp.zeros((1, 2, 2, 3)), "std_BhwZ": jnp.ones((1, 2, 2, 3))}
    assert kl_divergence(normal) == 0


def test_log_variances_are_clipped():
    moments_BhwC = jnp.array([[[[5.0, -5.0, -1000.0, 1000.0]]]])
    latents = split_moments(moments_BhwC)
    np.testing.assert_array_equal(latents["mean_BhwZ"].ravel(), [5, -5])
    np.testing.assert_allclose(latents["std_BhwZ"].ravel(), np.exp([-15, 10]), rtol=1e-6)
    assert np.isfinite(kl_divergence(latents)).all()


def test_samples_are_the_mean_plus_scaled_noise():
    latents = {"mean_BhwZ": jnp.full((1, 1, 1, 2), 3.0), "std_BhwZ": jnp.full((1, 1, 1, 2), 0.5)}
    found = sample_posterior(latents, jnp.array([[[[2.0, -4.0]]]]))
    np.testing.assert_array_equal(found.ravel(), [4, 1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_size": 9}, "image_size=9: 2 levels .* multiples of 2"),
        ({"image_size": (8, 0)}, r"image_size=\(8, 0\)"),
        ({"image_size": (8, 7)}, r"image_size=\(8, 7\)"),
        ({"latent_channels": 0}, "latent_channels=0: must be 1 or more"),
        ({"width": 6}, "width=6 is not a multiple of groups=4"),
        ({"groups": 0}, "groups=0"),
        ({"channel_mult": ()}, "channel_mult"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        small_config(**changes)
