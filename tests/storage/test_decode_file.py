import io
import pickle

import numpy as np
import pytest
from PIL import Image

from varjax.storage.image_files import BrokenImage, decode_file

GRAY_HW = np.linspace(0, 255, 12, dtype=np.uint8).reshape(3, 4)
RGB_HWC = np.stack([GRAY_HW, 255 - GRAY_HW, GRAY_HW // 2], axis=-1)
PLAIN = Image.fromarray(RGB_HWC)


def encoded(picture, format="png", **options):
    buffer = io.BytesIO()
    picture.save(buffer, format, **options)
    return buffer.getvalue()


def test_every_kind_of_image_becomes_rgb():
    def rgb(picture, format="png", **options):
        image_HWC = decode_file(encoded(picture, format, **options), name="x")
        assert image_HWC.dtype == np.uint8 and image_HWC.shape == (3, 4, 3)
        return image_HWC.astype(int)

    gray_HWC = GRAY_HW[..., None].repeat(3, axis=-1).astype(int)
    alpha = Image.fromarray(np.tile(np.array([0, 255], np.uint8), (3, 2)))
    with_alpha, gray_with_alpha = PLAIN.copy(), Image.fromarray(GRAY_HW)
    with_alpha.putalpha(alpha)
    gray_with_alpha.putalpha(alpha)
    palette = PLAIN.quantize(12)
    sixteen = Image.fromarray(GRAY_HW.astype(np.uint16) * 257)
    np.testing.assert_array_equal(rgb(PLAIN), RGB_HWC)
    np.testing.assert_array_equal(rgb(PLAIN, "webp", lossless=True), RGB_HWC)
    np.testing.assert_array_equal(rgb(Image.fromarray(GRAY_HW)), gray_HWC)
    np.testing.assert_array_equal(rgb(palette), RGB_HWC)
    assert np.array_equal(rgb(palette, transparency=bytes([0, 255] * 6)), RGB_HWC)  # alpha dropped
    np.testing.assert_array_equal(
        rgb(palette, "gif", save_all=True, append_images=[PLAIN]), RGB_HWC
    )
    np.testing.assert_array_equal(rgb(with_alpha), RGB_HWC)
    np.testing.assert_array_equal(rgb(gray_with_alpha), gray_HWC)
    assert np.array_equal(rgb(sixteen), gray_HWC)  # scaled; clipping would make it nearly white
    np.testing.assert_array_equal(rgb(sixteen, "tiff"), gray_HWC)
    np.testing.assert_array_equal(rgb(Image.fromarray(GRAY_HW > 100)), 255 * (gray_HWC > 100))
    assert np.abs(rgb(PLAIN.convert("CMYK"), "tiff") - RGB_HWC).max() <= 2
    flat = Image.new("CMYK", (4, 3), (0, 255, 255, 0))
    assert np.abs(rgb(flat, "jpeg", quality=100) - [255, 0, 0]).max() <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(orientation):
    stored_HW = [
        lambda x: x,
        np.fliplr,
        lambda x: np.rot90(x, 2),
        np.flipud,
        np.transpose,
        np.rot90,  # shown after a quarter turn clockwise
        lambda x: np.rot90(x, 2).T,
        lambda x: np.rot90(x, -1),
    ][orientation - 1](GRAY_HW)
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(np.ascontiguousarray(stored_HW)), exif=exif)
    np.testing.assert_array_equal(decode_file(data, 1, "x")[..., 0], GRAY_HW)


def test_gray_and_alpha_are_returned_on_request():
    clear = PLAIN.copy()
    clear.putalpha(77)
    assert np.array_equal(
        decode_file(encoded(PLAIN), 1, "x")[..., 0], np.asarray(PLAIN.convert("L"))
    )
    four_HWC = decode_file(encoded(clear), 4, "x")
    np.testing.assert_array_equal(four_HWC[..., :3], RGB_HWC)
    assert np.all(four_HWC[..., 3] == 77)
    assert np.all(decode_file(encoded(PLAIN), 4, "x")[..., 3] == 255)


def test_broken_files_are_named_with_the_reason(tmp_path):
    whole = encoded(Image.effect_noise((64, 64), 50), "jpeg")
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("not an image")
    (tmp_path / "empty.jpg").write_bytes(b"")
    (tmp_path / "float.tif").write_bytes(encoded(Image.fromarray(np.eye(3, dtype="f4")), "tiff"))
    for name, reason in (
        ("cut.jpg", "truncated"),
        ("text.jpg", "its format is unknown"),
        ("empty.jpg", "it is empty"),
        ("float.tif", "has floats"),
        ("none.jpg", "No such file"),
    ):
        with pytest.raises(BrokenImage, match=reason) as caught:
            decode_file(tmp_path / name)
        assert caught.value.name == str(tmp_path / name) and name in str(caught.value)
    with pytest.raises(BrokenImage, match="directory"):
        decode_file(tmp_path)
    with pytest.raises(BrokenImage, match="record 7 cannot be read"):
        decode_file(b"\x89PNG\r\n\x1a\n but no more", name="record 7")
    copy = pickle.loads(pickle.dumps(caught.value))  # as when a worker process raises it
    assert (copy.name, copy.reason) == (caught.value.name, caught.value.reason)
    assert "\udcff" not in str(BrokenImage("x", "y")) + str(_error(tmp_path / "\udcff.jpg"))


def test_large_images_warn_and_decompression_bombs_are_broken(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 8)
    with pytest.warns(Image.DecompressionBombWarning):
        assert decode_file(encoded(PLAIN), name="x").shape == (3, 4, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 5)
    with pytest.raises(BrokenImage, match="DecompressionBombError"):
        decode_file(encoded(PLAIN), name="x")


def _error(path):
    with pytest.raises(BrokenImage) as caught:
        decode_file(path)
    return caught.value
