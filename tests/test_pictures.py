import numpy as np
import pytest
from PIL import Image

from varjax import pictures


def test_a_grid_reads_row_by_row():
    images_NHWC = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(64, 1).repeat(64, 2)
    picture_HWC = pictures.grid(images_NHWC)  # 3 columns, 2 rows, the last place empty
    assert picture_HWC[::64, ::64, 0].tolist() == [[0, 1, 2], [3, 4, 0]]
    assert pictures.grid(images_NHWC, columns=5)[::64, ::64, 0].tolist() == [[0, 1, 2, 3, 4]]


def test_small_images_are_enlarged_and_set_apart():
    picture_HWC = pictures.grid(np.full((1, 8, 8, 1), 255, np.uint8))
    assert np.count_nonzero(picture_HWC) == 64 * 64 and picture_HWC.shape == (65, 65, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_rounded_values(tmp_path, channels):
    images = np.full((2, 2, channels), 0.5)
    pictures.write_png(tmp_path / "a.png", pictures.to_uint8(images))
    with Image.open(tmp_path / "a.png") as picture:
        assert np.all(np.asarray(picture).reshape(2, 2, channels) == 128)
