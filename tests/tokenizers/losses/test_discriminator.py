import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.adversarial import QUICKLY
from varjax.tokenizers.losses.discriminator import (
    PatchDiscriminator,
    StyleDiscriminator,
    blur_downsample,
)


@pytest.mark.parametrize(
    "module, image_shape, logits_shape, sizes",
    [
        # as in taming, whose BatchNorm also has two parameters per channel
        (PatchDiscriminator(), (256, 256, 3), (30, 30), 2_765_633),
        (PatchDiscriminator(layers=1), (8, 12, 1), (2, 4), None),
        (StyleDiscriminator(), (256, 256, 3), (1, 1), None),
        (StyleDiscriminator(width=8), (37, 64, 2), (1, 1), None),
        (StyleDiscriminator(width=8), (4, 4, 1), (1, 1), None),
    ],
)
def test_logit_shapes_and_parameter_counts(module, image_shape, logits_shape, sizes):
    image_BHWC = jax.ShapeDtypeStruct((2, *image_shape), jnp.float32)
    params = jax.eval_shape(module.init, jax.random.key(0), image_BHWC)
    assert jax.eval_shape(module.apply, params, image_BHWC).shape == (2, *logits_shape)
    if sizes:
        assert sum(x.size for x in jax.tree.leaves(params)) == sizes


@pytest.mark.slow
@pytest.mark.parametrize(
    "kind", [lambda d: PatchDiscriminator(8, 1, d), lambda d: StyleDiscriminator(4, d)]
)
def test_logits_depend_only_on_their_own_image(kind):
    images = np.random.default_rng(0).uniform(-1, 1, (3, 8, 6, 3)).astype(np.float32)
    params = jax.jit(kind(jnp.float32).init)(jax.random.key(0), images)

    @functools.partial(jax.jit, static_argnums=1, compiler_options=QUICKLY)
    def run(image_BHWC, dtype):
        def second(image_BHWC):
            logits = kind(dtype).apply(params, image_BHWC)
            return jnp.sum(logits[1]), logits

        return jax.grad(second, has_aux=True)(image_BHWC)

    grad_BHWC, logits = run(images, jnp.float32)
    assert np.all(grad_BHWC[np.array([0, 2])] == 0) and np.any(grad_BHWC[1] != 0)
    # Initial logits are small, but differ between images.
    assert np.all(np.abs(logits) < 3) and np.std(logits) > 1e-4
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote
        _, rounded = run(images, jnp.bfloat16)
    assert rounded.dtype == jnp.float32
    np.testing.assert_allclose(rounded, logits, atol=0.05)


@pytest.mark.slow
def test_patch_receptive_field_is_70_pixels():
    """Measures how far gradients reach, without the norms, which mix all positions."""
    module = PatchDiscriminator(8)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 128, 128, 1)))
    params = jax.tree.map(lambda x: jnp.ones(x.shape), shapes)

    def logit(image_BHWC):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flax.linen.GroupNorm.__call__", lambda self, x: x)
            return module.apply(params, image_BHWC)[0, 6, 6]

    grad_HW = jax.jit(jax.grad(logit))(jnp.ones((1, 128, 128, 1)))[0, ..., 0]
    assert [np.ptp(np.nonzero(grad_HW)[axis]) + 1 for axis in (0, 1)] == [70, 70]


@pytest.mark.slow
def test_blur_downsample_keeps_flat_images_and_removes_stripes():
    for shape in ((1, 8, 6, 2), (1, 7, 5, 2)):
        blur_downsampled = blur_downsample(jnp.full(shape, 0.5))
        assert blur_downsampled.shape == (1, shape[1] // 2, shape[2] // 2, 2)
        np.testing.assert_allclose(blur_downsampled, 0.5, rtol=1e-6)
    stripes_BHWC = jnp.tile(jnp.array([1.0, -1.0]), 8)[None, None, :, None] * jnp.ones(
        (1, 16, 1, 1)
    )
    np.testing.assert_allclose(blur_downsample(stripes_BHWC)[:, :, 1:-1], 0, atol=1e-6)
