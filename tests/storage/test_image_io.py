import numpy as np
import pytest
from PIL import Image

from varjax.storage import image_io


def test_a_grid_is_filled_row_by_row():
    images_NHWC = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1).repeat(64, 1).repeat(64, 2)
    picture_HWC = image_io.image_grid(images_NHWC)  # 3 columns, 2 rows, the last cell empty
    assert picture_HWC[::64, ::64, 0].tolist() == [[0, 1, 2], [3, 4, 0]]
    assert image_io.image_grid(images_NHWC, columns=5)[::64, ::64, 0].tolist() == [[0, 1, 2, 3, 4]]


def test_small_images_are_enlarged_and_separated():
    picture_HWC = image_io.image_grid(np.full((1, 8, 8, 1), 255, np.uint8))
    assert np.count_nonzero(picture_HWC) == 64 * 64 and picture_HWC.shape == (65, 65, 1)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_holds_the_rounded_values(tmp_path, channels):
    images = np.full((2, 2, channels), 0.5)
    image_io.write_png(tmp_path / "a.png", image_io.to_uint8(images))
    with Image.open(tmp_path / "a.png") as picture:
        assert np.all(np.asarray(picture).reshape(2, 2, channels) == 128)


RAMP_HW = np.linspace(0, 255, 12, dtype=np.uint8).reshape(3, 4)
RGB_HWC = np.stack([RAMP_HW, 255 - RAMP_HW, RAMP_HW // 2], axis=-1)


def test_an_image_of_the_requested_size_is_unchanged(tmp_path):
    Image.fromarray(RGB_HWC).save(tmp_path / "a.png")
    assert np.array_equal(image_io.read_image(tmp_path / "a.png", (3, 4, 3)), RGB_HWC)
    Image.fromarray(RAMP_HW).save(tmp_path / "gray.png")
    gray_HWC = image_io.read_image(tmp_path / "gray.png", (3, 4, 3))
    assert np.array_equal(gray_HWC, RAMP_HW[..., None].repeat(3, axis=-1))


def test_images_of_every_kind_are_read_as_viewers_show_them(tmp_path):
    def read(picture, name="a.png", **options):
        picture.save(tmp_path / name, **options)
        return image_io.read_image(tmp_path / name, (3, 4, 3)).astype(int)

    plain = Image.fromarray(RGB_HWC)
    gray_HWC = RAMP_HW[..., None].repeat(3, axis=-1).astype(int)
    assert np.array_equal(read(Image.fromarray(RAMP_HW.astype(np.uint16) * 257)), gray_HWC)
    assert np.abs(read(plain.convert("CMYK"), "a.tif") - RGB_HWC).max() <= 2
    assert np.array_equal(read(plain.quantize(12)), RGB_HWC)
    clear = plain.convert("RGBA")
    clear.putpixel((1, 0), (9, 9, 9, 0))
    seen_HWC = RGB_HWC.copy()
    seen_HWC[0, 1] = 255
    assert np.array_equal(read(clear), seen_HWC)
    rotated, exif = plain.transpose(Image.Transpose.ROTATE_90), Image.Exif()
    exif[0x0112] = 6  # viewers rotate it clockwise
    assert np.array_equal(read(rotated, exif=exif), RGB_HWC)


def test_the_center_is_cropped_and_the_aspect_ratio_kept():
    columns_HW = np.zeros((20, 60), np.uint8)
    columns_HW[:, 20:40] = 255
    picture = Image.fromarray(columns_HW)
    assert np.all(image_io.resize_and_crop(picture, (20, 20, 1)) == 255)
    small_HWC = image_io.resize_and_crop(picture, (10, 30, 1))
    assert np.all(small_HWC[:, 12:18] > 250) and np.all(small_HWC[:, :8] < 5)
    assert image_io.resize_and_crop(picture, (64, 64, 3)).shape == (64, 64, 3)


def test_files_that_are_not_images_are_named(tmp_path):
    shape = (8, 8, 3)
    (tmp_path / "text.png").write_text("not an image")
    Image.fromarray(RGB_HWC).save(tmp_path / "a.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    Image.fromarray(RAMP_HW.astype(np.float32)).save(tmp_path / "float.tif")
    for name, message in (
        ("none.png", "does not exist"),
        (".", "is a folder"),
        ("text.png", "text.png is not an image"),
        ("cut.png", "cut.png is not an image"),
        ("float.tif", "has floats"),
    ):
        with pytest.raises(ValueError, match=message):
            image_io.read_image(tmp_path / name, shape)
    with pytest.raises(ValueError, match="2 channels"):
        image_io.read_image(tmp_path / "a.png", (8, 8, 2))


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_resized_part_equals_the_crop_of_the_resized_image(mode, monkeypatch):
    rng = np.random.default_rng(0)
    filters = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC
    parts = []
    for i in range(60):
        W, H, width, height = rng.integers(1, 90, 4).tolist()
        if i % 5 == 0:
            width, height = W, H
        pixels = rng.integers(0, 256, (H, W, len(mode)), np.uint8)
        picture = Image.fromarray(pixels[..., 0] if mode == "L" else pixels)
        left, top = int(rng.integers(width)), int(rng.integers(height))
        box = left, top, int(rng.integers(left, width)) + 1, int(rng.integers(top, height)) + 1
        resampling = filters[i % 2]
        whole = np.asarray(picture.resize((width, height), resampling).crop(box))
        found = image_io.resized_part(picture, (width, height), box, resampling)
        np.testing.assert_array_equal(np.asarray(found), whole)
        if mode != "RGBA" and width >= W and height >= H:
            parts.append((picture, (width, height), box, resampling, whole))
    monkeypatch.setattr(image_io, "MAX_RESIZED_PIXELS", 0)
    for *arguments, whole in parts:  # enlarged in two steps, they differ only by rounding
        found = np.asarray(image_io.resized_part(*arguments))
        assert found.shape == whole.shape
        off = np.abs(found.astype(int) - whole)
        assert off.max() <= 1 and off.mean() < 0.01
    assert len(parts) > 10 or mode == "RGBA"


def test_a_thin_image_is_cropped_before_it_is_enlarged(monkeypatch):
    made, whole = [], Image.Image.resize

    def resize(self, size, *arguments, **options):
        made.append(size[0] * size[1])
        return whole(self, size, *arguments, **options)

    ramp_HW = np.linspace(0, 255, 900).astype(np.uint8)[:, None].repeat(9, axis=1)
    picture = Image.fromarray(ramp_HW)
    monkeypatch.setattr(Image.Image, "resize", resize)
    for H, W in ((512, 512), (300, 450)):  # otherwise up to 26 million pixels
        middle_HWC = image_io.resize_and_crop(picture, (H, W, 1))
        assert max(made) <= 512 * 900
        assert 120 <= middle_HWC.min() <= middle_HWC.max() <= 135
    turned_HWC = image_io.resize_and_crop(Image.fromarray(ramp_HW.T.copy()), (512, 512, 1))
    assert max(made) <= 512 * 900 and 120 <= turned_HWC.min() <= turned_HWC.max() <= 135
