"""The named random streams, their fixed numbers, and their keys."""

import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn.rng import ImageStream, InitStream, StepStream, stream_key, stream_keys


def test_stream_numbers_never_change():
    """Fails if a number changes, which would change what a seed draws, or if one is added."""
    numbers = {stream.name: stream.value for stream in ImageStream}
    assert numbers == {
        "ORDER": 0,
        "NOISE": 1,
        "TIMESTEP": 2,
        "DIFFUSION_NOISE": 3,
        "ATTENTION_DROPOUT": 4,
        "DROPOUT": 5,
        "LABEL": 6,
        "LATENT": 7,
        "MASK_RATIO": 8,
        "SCALE_DROPOUT": 101,
        "POSTERIOR": 102,
    }
    assert (InitStream.DISCRIMINATOR, InitStream.CODEBOOK, StepStream.CODEBOOK) == (1, 2, 2**31 - 1)


def test_batch_keys_match_the_keys_of_single_images():
    key_B = jax.vmap(jax.random.key)(jnp.arange(3))
    together = jax.random.key_data(stream_keys(key_B, ImageStream.POSTERIOR))
    for i in range(3):
        alone = stream_key(jax.random.key(i), ImageStream.POSTERIOR)
        np.testing.assert_array_equal(together[i], jax.random.key_data(alone))
        np.testing.assert_array_equal(
            jax.random.key_data(alone),
            jax.random.key_data(jax.random.fold_in(jax.random.key(i), 102)),
        )
