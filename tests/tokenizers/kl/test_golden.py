"""The KL tokenizer against the official AutoencoderKL with the same weights."""

import jax
import numpy as np
import pytest

from tests.helpers import golden_kl as golden
from varjax.nn.autoencoder import to_unit_range
from varjax.tokenizers.kl.model import KLTokenizer, kl_divergence


def assert_close(found, expected):
    """Checks values to within 1e-4 of the largest one, because single values may be near 0."""
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * np.abs(expected).max())


@pytest.mark.slow
def test_posterior_and_decoded_mode_match_reference():
    config, params, expected = golden.config(), golden.params(), golden.outputs()
    images_BHWC = (golden.image() + 1) / 2

    @jax.jit
    def everything(params, images_BHWC):
        latents = config.encode(params, images_BHWC)
        model = KLTokenizer(config).bind({"params": params})
        y_BHWC = model.decode(latents["mean_BhwZ"])
        return latents, kl_divergence(latents), y_BHWC, config.decode(params, latents)

    latents, kl_B, y_BHWC, decoded_BHWC = everything(params, images_BHWC)
    assert_close(latents["mean_BhwZ"], expected["mean"])
    assert_close(latents["std_BhwZ"], expected["std"])
    assert_close(kl_B, expected["kl"])
    assert_close(y_BHWC, expected["decoded"])
    assert np.abs(expected["decoded"]).max() > 1  # so that the next line tests clipping
    assert_close(decoded_BHWC, to_unit_range(np.clip(expected["decoded"], -1, 1)))
