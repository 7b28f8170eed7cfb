import numpy as np
import pytest

from varjax.errors import InputError
from varjax.sampling.paste import paste

IMAGE_BHWC = np.random.default_rng(0).integers(0, 256, (1, 8, 12, 3), np.uint8)
RESULTS_BHWC = np.random.default_rng(1).random((2, 8, 12, 3), np.float32)
REDRAW_hw = np.array([[False, True, True], [False, False, True]])  # a token is 4x4 pixels


def test_kept_pixels_are_original_and_results_fade_in_from_the_border():
    pasted_BHWC = paste(IMAGE_BHWC, RESULTS_BHWC, REDRAW_hw, blend=1)
    inside_HW = REDRAW_hw.repeat(4, axis=0).repeat(4, axis=1)
    original_BHWC = np.broadcast_to(IMAGE_BHWC / np.float32(255), RESULTS_BHWC.shape)
    assert np.array_equal(pasted_BHWC[:, ~inside_HW], original_BHWC[:, ~inside_HW])
    # A pixel next to a kept one is an even blend; pixels further inside are the result.
    np.testing.assert_allclose(
        pasted_BHWC[:, 0, 4], (original_BHWC[:, 0, 4] + RESULTS_BHWC[:, 0, 4]) / 2, atol=1e-6
    )
    assert np.array_equal(pasted_BHWC[:, 0, 5:], RESULTS_BHWC[:, 0, 5:])
    assert np.array_equal(
        paste(IMAGE_BHWC, RESULTS_BHWC, REDRAW_hw, 0)[:, inside_HW], RESULTS_BHWC[:, inside_HW]
    )


def test_results_may_be_uint8_or_contain_nan():
    results_BHWC = np.concatenate([255 - IMAGE_BHWC] * 2)
    expected = paste(IMAGE_BHWC, results_BHWC / np.float32(255), REDRAW_hw)
    np.testing.assert_array_equal(paste(IMAGE_BHWC, results_BHWC, REDRAW_hw), expected)
    assert np.isnan(paste(IMAGE_BHWC, RESULTS_BHWC * np.nan, REDRAW_hw)[:, 0, 5:]).all()


def test_gray_mask_values_blend_result_and_original():
    weight_HW = np.full((8, 12), 0.25, np.float32)
    expected = 0.25 * RESULTS_BHWC + 0.75 * (IMAGE_BHWC / np.float32(255))
    np.testing.assert_allclose(paste(IMAGE_BHWC, RESULTS_BHWC, weight_HW), expected, atol=1e-6)


def test_a_mask_of_the_whole_image_has_no_border():
    assert np.array_equal(paste(IMAGE_BHWC, RESULTS_BHWC, np.ones((2, 3))), RESULTS_BHWC)


def test_each_result_may_have_its_own_image_and_mask():
    images, masks = np.concatenate([IMAGE_BHWC] * 2), np.stack([REDRAW_hw, ~REDRAW_hw])
    pasted_BHWC = paste(images, RESULTS_BHWC, masks)
    for i in range(2):
        alone = paste(IMAGE_BHWC, RESULTS_BHWC[i : i + 1], masks[i])
        assert np.array_equal(pasted_BHWC[i : i + 1], alone)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"redraw": np.ones((3, 3))}, r"redraw has shape \(3, 3\); needed is \(h, w\)"),
        ({"redraw": np.full((2, 3), 1.5)}, r"numbers outside of \[0, 1\]"),
        ({"redraw": np.full((2, 3), np.nan)}, r"numbers outside of \[0, 1\]"),
        ({"images_BHWC": IMAGE_BHWC[:, :4]}, r"images have shape \(1, 4, 12, 3\)"),
        ({"images_BHWC": IMAGE_BHWC.astype(int)}, "images are int64; give uint8 or floats"),
        ({"results_BHWC": 255 * RESULTS_BHWC}, "results range from .* to 255; give uint8, or"),
        ({"blend": -1}, "blend=-1: must be 0 or more"),
    ],
)
def test_invalid_arguments_are_refused(changes, message):
    arguments = {"images_BHWC": IMAGE_BHWC, "results_BHWC": RESULTS_BHWC, "redraw": REDRAW_hw}
    with pytest.raises(InputError, match=message):
        paste(**(arguments | changes))
