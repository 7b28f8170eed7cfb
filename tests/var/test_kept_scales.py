import numpy as np
import pytest

from varjax.errors import InputError
from varjax.tokenizers.vq.pyramid import SCALES_256, SCALES_512, Pyramid
from varjax.var.kept_scales import keep_first_scales, scales_of_size

PYRAMID = Pyramid((1, 2, 4))


def test_the_first_scales_are_kept():
    assert keep_first_scales(PYRAMID, 1).tolist() == [True] + [False] * 20
    assert keep_first_scales(PYRAMID, 2).tolist() == [True] * 5 + [False] * 16


@pytest.mark.parametrize("keep_scales", [0, 3, -1, 1.5, "2", None, True])
def test_at_least_one_scale_is_kept_and_one_is_drawn(keep_scales):
    with pytest.raises(InputError, match=f"keep_scales={keep_scales}: must be .*(1 … 2|at most 2)"):
        keep_first_scales(PYRAMID, keep_scales)
    with pytest.raises(InputError, match="this model has one scale"):
        keep_first_scales(Pyramid((4,)), 1)


def test_how_many_scales_a_small_image_fills():
    pyramid = Pyramid(SCALES_256)
    sizes = [scales_of_size((side, side), (256, 256, 3), pyramid) for side in (8, 32, 64, 128, 255)]
    assert sizes == [1, 4, 7, 9, 9]
    assert scales_of_size((64, 64), (512, 512, 3), Pyramid(SCALES_512)) == 5
    assert scales_of_size((4, 4), (8, 8, 1), PYRAMID) == 2  # at least one is drawn


@pytest.mark.parametrize("size", [(256, 256), (64, 32), (0, 0), (64,), ()])
def test_images_to_upscale_must_be_smaller_and_have_the_same_ratio(size):
    with pytest.raises(InputError, match="upscaling takes .*h below 256 and the same ratio"):
        scales_of_size(size, (256, 256, 3), Pyramid(SCALES_256))


def test_an_image_smaller_than_the_first_scale_is_refused():
    with pytest.raises(InputError, match="7x7 pixels; at least 8 rows"):
        scales_of_size((7, 7), (256, 256, 3), Pyramid(SCALES_256))


def test_kept_tokens_match_the_levels_of_the_pyramid():
    for kept in (1, 2):
        assert np.array_equal(keep_first_scales(PYRAMID, kept), PYRAMID.level_L < kept)
