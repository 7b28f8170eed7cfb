import jax
import jax.numpy as jnp
import numpy as np
import pytest

from varjax.tokenizers.losses.diffaugment import AUGMENTATIONS, diffaugment

ALL = ("color", "translation", "cutout")
IMAGE_BHWC = np.random.default_rng(0).uniform(-1, 1, (6, 24, 16, 3)).astype(np.float32)
KEY_B = jax.vmap(lambda i: jax.random.fold_in(jax.random.key(3), i))(jnp.arange(6))


@jax.jit
def everything(image_BHWC, key_B):
    return diffaugment(image_BHWC, key_B, ALL)


def test_augmentations_depend_only_on_the_key_of_each_image():
    seen_BHWC = everything(IMAGE_BHWC, KEY_B)
    np.testing.assert_array_equal(everything(IMAGE_BHWC[::-1], KEY_B[::-1]), seen_BHWC[::-1])
    other_BHWC = everything(IMAGE_BHWC, jnp.roll(KEY_B, 1))
    assert all(np.any(a != b) for a, b in zip(seen_BHWC, other_BHWC, strict=True))
    np.testing.assert_array_equal(diffaugment(IMAGE_BHWC, KEY_B, ()), IMAGE_BHWC)


def test_gradients_match_finite_differences():
    """Every augmentation is affine in the image, so differences are exact for any step size."""
    rng = np.random.default_rng(1)
    step_BHWC, weight_BHWC = rng.normal(size=(2, *IMAGE_BHWC.shape)).astype(np.float32)

    def total(image_BHWC):
        return jnp.sum(weight_BHWC * everything(image_BHWC, KEY_B))

    slope = jnp.sum(jax.grad(total)(IMAGE_BHWC) * step_BHWC)
    expected = total(IMAGE_BHWC + step_BHWC) - total(IMAGE_BHWC)
    np.testing.assert_allclose(slope, expected, rtol=1e-3)
    assert abs(expected) > 1


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_each_augmentation_does_what_its_name_says(name):
    changed_BHWC = jax.jit(diffaugment, static_argnums=2)(IMAGE_BHWC, KEY_B, (name,))
    for image_HWC, changed_HWC in zip(IMAGE_BHWC, np.asarray(changed_BHWC), strict=True):
        if name == "color":  # one affine function maps the gray values of all pixels
            gray_HW, found_HW = image_HWC.mean(-1), changed_HWC.mean(-1)
            slope, offset = np.polyfit(gray_HW.ravel(), found_HW.ravel(), 1)
            np.testing.assert_allclose(found_HW, slope * gray_HW + offset, atol=1e-5)
            assert 0.5 <= slope <= 1.5 and abs(offset) <= 0.75
        elif name == "cutout":
            gone_HW = np.all(changed_HWC == 0, axis=-1)
            np.testing.assert_array_equal(changed_HWC[~gone_HW], image_HWC[~gone_HW])
            rows, columns = gone_HW.any(1), gone_HW.any(0)
            np.testing.assert_array_equal(gone_HW, rows[:, None] & columns[None])
            assert 1 <= rows.sum() <= 5 and 1 <= columns.sum() <= 3
        else:
            moved = [
                (dy, dx)
                for dy in range(-3, 4)
                for dx in range(-2, 3)
                if np.array_equal(shifted(image_HWC, dy, dx), changed_HWC)
            ]
            assert len(moved) == 1


def shifted(image_HWC, dy, dx):
    """Shifts an image by slicing a zero-padded copy."""
    padded = np.pad(image_HWC, ((3, 3), (2, 2), (0, 0)))
    H, W, _ = image_HWC.shape
    return padded[3 - dy : 3 - dy + H, 2 - dx : 2 - dx + W]
