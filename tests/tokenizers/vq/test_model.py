import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import golden_cases as golden
from tests.helpers.random_params import random_params
from varjax.tokenizers.vq.model import (
    VQConfig,
    VQTokenizer,
    bound_quantizer,
    decode_every_scale,
    make_quantizer,
    quantize_images,
)
from varjax.tokenizers.vq.quantizer import quantizer_loss


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
def test_tokenizer_matches_reference(name):
    config, _ = golden.configs(name)
    params, expected = {"params": golden.tokenizer_params(name)}, golden.outputs(name)
    model = VQTokenizer(config)

    @jax.jit
    def everything(params, image_BHWC):
        f_BhwZ = model.apply(params, image_BHWC, method=VQTokenizer.features)
        quantized = model.apply(params, f_BhwZ, method=lambda m, f: m.quantizer(f))
        quantizer = bound_quantizer(config, params["params"])
        tokens_BL = quantize_images(config, params["params"], image_BHWC).tokens_BL
        f_hats = quantizer.accumulated_scales(tokens_BL)
        input_BlZ = quantizer.teacher_forcing_input(f_hats)
        decoded = decode_every_scale(config, params["params"], f_hats)
        loss = jnp.mean(quantizer_loss(f_BhwZ, quantized.f_hats, 0.25))
        return f_BhwZ, quantized, tokens_BL, input_BlZ, decoded, loss

    found = everything(params, golden.images(name))
    f_BhwZ, quantized, tokens_BL, input_BlZ, decoded_KBHWC, loss = found
    close = functools.partial(np.testing.assert_allclose, rtol=0, atol=2e-4)
    close(f_BhwZ.transpose(0, 3, 1, 2), expected["features"])
    assert np.array_equal(tokens_BL, expected["tokens"])
    assert np.array_equal(quantized.tokens_BL, tokens_BL)
    close(quantized.f_hats[-1].transpose(0, 3, 1, 2), expected["f_hat_final"])
    norms = [np.linalg.norm(f_hat) for f_hat in quantized.f_hats]
    np.testing.assert_allclose(norms, expected["f_hat_norm_per_scale"], rtol=1e-5)
    close(loss, expected["vq_loss"])
    close(input_BlZ, expected["teacher_forcing_input"])
    close(golden.strided(name, decoded_KBHWC[0]), expected["reconstruction_first"])
    close(golden.strided(name, decoded_KBHWC[-1]), expected["reconstruction_final"])


def small_config(**changes) -> VQConfig:
    settings = dict(
        scales=(1, 2, 4), image_channels=1, width=8, channel_mult=(1, 2), blocks=1, groups=4,
        vocab=16, code_channels=4,
    )  # fmt: skip
    return VQConfig(**settings | changes)


@functools.cache
def small(**changes) -> tuple[VQConfig, dict]:
    config = small_config(**changes)
    return config, {"params": random_params(config.init)}


ODD = {"scales": ((1, 3), (2, 3), (3, 5)), "channel_mult": (1, 1, 2), "image_channels": 2}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes", [{}, {"scales": (1, (1, 2), (2, 3)), "channel_mult": (2,)}, ODD]
)
def test_decoding_tokens_matches_the_forward_pass(changes):
    config, params = small(**changes)
    image_BHWC = np.random.default_rng(1).normal(size=(2, *config.image_shape)).astype(np.float32)

    @jax.jit
    def both(params, image_BHWC):
        tokens_BL = quantize_images(config, params["params"], image_BHWC).tokens_BL
        decoded_BHWC = config.decode(params["params"], {"tokens_BL": tokens_BL})
        straight_BHWC, _, _ = VQTokenizer(config).apply(params, image_BHWC)
        return tokens_BL, straight_BHWC, decoded_BHWC * 2 - 1

    tokens_BL, straight_BHWC, decoded_BHWC = both(params, image_BHWC)
    assert tokens_BL.shape == (2, config.pyramid.length)
    assert decoded_BHWC.shape == image_BHWC.shape
    np.testing.assert_allclose(decoded_BHWC, jnp.clip(straight_BHWC, -1, 1), atol=1e-5)


@pytest.mark.slow
def test_straight_through_gradient_reaches_the_encoder_but_not_the_quantizer():
    config, params = small()

    def pixel_loss(params, image_BHWC):
        y_BHWC, _, _ = VQTokenizer(config).bind(params)(image_BHWC)
        return jnp.mean(jnp.square(y_BHWC - image_BHWC))

    image_BHWC = np.random.default_rng(1).normal(size=(2, *config.image_shape)).astype(np.float32)
    grads = jax.jit(jax.grad(pixel_loss))(params, image_BHWC)["params"]
    assert any(np.any(g != 0) for g in jax.tree.leaves(grads["encoder"]))
    assert all(np.all(g == 0) for g in jax.tree.leaves(grads["quantizer"]))


@pytest.mark.slow
def test_quantizer_loss_trains_codes_and_features_separately():
    config, params = small()
    f_BhwZ = jax.random.normal(jax.random.key(1), (2, 4, 4, 4))
    params = params["params"]["quantizer"]

    @jax.jit
    def grads(params, f_BhwZ, beta):
        def loss(params, f_BhwZ):
            f_hats = make_quantizer(config).bind({"params": params})(f_BhwZ).f_hats
            return jnp.sum(quantizer_loss(f_BhwZ, f_hats, beta))

        return jax.grad(loss, (0, 1))(params, f_BhwZ)

    to_codes, to_features = grads(params, f_BhwZ, 0.0)
    assert jnp.any(to_codes["codebook"] != 0) and jnp.all(to_features == 0)
    to_codes_too, to_features = grads(params, f_BhwZ, 0.25)
    assert jnp.any(to_features != 0)
    np.testing.assert_allclose(to_codes_too["codebook"], to_codes["codebook"], rtol=1e-6)


def test_quantizer_loss_is_a_weighted_mean_over_scales():
    f_BhwZ = jnp.array([1.0, 3.0]).reshape(1, 1, 2, 1)
    f_hats = [jnp.zeros((1, 1, 2, 1)), jnp.full((1, 1, 2, 1), 2.0)]
    # The mean squared errors are 5 and 1, each weighted by 1 + β.
    np.testing.assert_allclose(quantizer_loss(f_BhwZ, f_hats, 0.5), [1.5 * (5 + 1) / 2])


def test_nearest_codes_by_distance_and_by_cosine():
    codebook_VZ = jnp.array([[10.0, 0.0], [0.0, 1.0], [0.6, 0.6]])
    z_BlZ = jnp.array([[[2.0, 0.1], [0.1, 3.0], [-0.1, -0.2]]])
    phi_params = {"phi_kernel": jnp.zeros((1, 3, 3, 2, 2)), "phi_bias": jnp.zeros((1, 2))}
    for cosine, expected in ((False, [2, 1, 2]), (True, [0, 1, 0])):
        config = VQConfig((1,), vocab=3, code_channels=2, num_phi=1, cosine_codes=cosine)
        quantizer = make_quantizer(config).bind({"params": {"codebook": codebook_VZ} | phi_params})
        assert quantizer.nearest_codes(z_BlZ).tolist() == [expected], cosine


def test_a_zero_code_has_a_cosine_of_zero():
    """The reference's F.normalize divides by at least 1e-12, so a zero code stays zero."""
    codebook_VZ = jnp.array([[0.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    z_BlZ = jnp.array([[[0.1, 3.0], [5.0, 0.1], [-1.0, -1.0]]])
    params = {"codebook": codebook_VZ, "phi_bias": jnp.zeros((1, 2))}
    params["phi_kernel"] = jnp.zeros((1, 3, 3, 2, 2))
    config = VQConfig((1,), vocab=3, code_channels=2, num_phi=1, cosine_codes=True)
    quantizer = make_quantizer(config).bind({"params": params})
    assert quantizer.nearest_codes(z_BlZ).tolist() == [[1, 2, 0]]


@pytest.mark.parametrize(
    "changes, field",
    [
        ({"width": 6}, "groups"),
        ({"phi_ratio": 1.5}, "phi_ratio"),
        ({"channel_mult": ()}, "channel_mult"),
        ({"vocab": 0}, "vocab"),
        ({"num_phi": -1}, "num_phi"),
        ({"scales": (4, 2)}, "scales"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes, field):
    with pytest.raises(ValueError, match=field):
        small(**changes)
