import errno
import io
import os
import pathlib
import socket
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers.hostile_images import POSTSCRIPT, encoded, png, tiff
from varjax.data.array_record import ImageEncoding
from varjax.errors import InputError, StorageError
from varjax.metrics.image_sets import open_image_set
from varjax.storage import image_files, image_io, untrusted
from varjax.storage.image_files import (
    BrokenImage,
    decode_file,
    decode_picture,
    picture_array,
    read_file,
)

PLAIN = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))


@pytest.fixture
def failing_open(monkeypatch):
    """Returns a function (errno, times) that makes the next opens in the test's folder fail."""
    left, whole = [], os.open

    def open_or_fail(path, *arguments, **options):
        if left and str(path).startswith(os.getcwd()):
            raise OSError(left.pop(), "made to fail", path)
        return whole(path, *arguments, **options)

    monkeypatch.setattr(os, "open", open_or_fail)
    return lambda code, times: left.extend([code] * times)


READERS = {
    "data": decode_file,
    "prepare": lambda path: ImageEncoding(size=4).encode_file(str(path)),
    "prompts and masks": lambda path: image_io.read_image(path, (8, 8, 3)),
    "samples": lambda path: next(open_image_set(path.parent).parts([range(1)])),
}


@pytest.mark.parametrize("read", READERS.values(), ids=READERS)
def test_machine_errors_are_retried_and_do_not_make_the_image_broken(tmp_path, failing_open, read):
    path = tmp_path / "a.png"
    PLAIN.save(path)
    for code in (errno.EIO, errno.EMFILE, errno.ESTALE, errno.ENOMEM, errno.EHOSTDOWN):
        failing_open(code, 1)
        read(path)  # the second attempt succeeds
        failing_open(code, 2)
        with pytest.raises(StorageError, match=r"a.png cannot be read now") as caught:
            read(path)
        assert not isinstance(caught.value, BrokenImage)
    failing_open(errno.EPROTO, 1)  # not in MACHINE_ERRNOS
    with pytest.raises(StorageError, match="made to fail"):
        read(path)


def test_a_lack_of_memory_does_not_make_the_image_broken(monkeypatch):
    failures, data = [], encoded(PLAIN, "png")

    def fail(self):
        failures.append(self)
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    monkeypatch.setattr(image_files, "_memory_is_left", lambda: False)
    with pytest.raises(StorageError, match="x.png cannot be read now: Cannot allocate memory"):
        decode_file(data, name="x.png")
    assert len(failures) == 2
    monkeypatch.setattr(image_files, "_memory_is_left", lambda: True)  # so the image is at fault
    with pytest.raises(BrokenImage, match="more memory than an image of its size"):
        decode_file(data, name="x.png")


def test_special_files_are_broken_and_do_not_block(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "zeros.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    monkeypatch.chdir(tmp_path)  # the addresses of sockets have a length limit
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket.png")
    for name, reason in (
        ("pipe.png", "not a regular file"),
        ("zeros.png", "not a regular file"),
        ("loop.png", "symbolic links"),
        ("socket.png", "No such device or address"),
        ("none.png", "No such file"),
        (".", "directory"),
    ):
        with pytest.raises(BrokenImage, match=reason):
            read_file(tmp_path / name)
    with pytest.raises(InputError, match="at most 255"):
        read_file(tmp_path / ("x" * 300))


def test_postscript_is_never_run_whatever_its_suffix(tmp_path, monkeypatch):
    def run(*arguments, **options):
        raise AssertionError(f"executed {arguments}")

    monkeypatch.setattr(subprocess, "Popen", run)
    path = tmp_path / "cat.jpg"
    path.write_bytes(POSTSCRIPT)
    with pytest.raises(AssertionError, match="executed"):  # by Pillow, if it may choose any format
        with Image.open(path) as picture:
            picture.load()
    for read in READERS.values():
        with pytest.raises(InputError, match=r"cat.jpg.*(format is unknown|not an image)"):
            read(path)


@pytest.mark.parametrize(
    ("width", "height", "bits", "reason"),
    [
        (13_300, 13_300, 1, "13300x13300 pixels; at most 67,108,864"),
        (8_193, 8_193, 8, "8193x8193 pixels; at most"),
        (1, 8_000, 8, "1x8000 pixels; aspect ratios up to 100"),
        (30_000, 2, 8, "30000x2 pixels; aspect ratios up to"),
    ],
)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_an_excessive_size_is_refused_before_decoding(
    tmp_path, monkeypatch, width, height, bits, reason
):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(width, height, bits))

    def load(self):
        raise AssertionError("decoded")

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", load)
    for read in READERS.values():
        with pytest.raises(InputError, match=rf"bomb.png.*{reason}"):
            read(path)


def test_images_at_the_limits_are_read():
    assert decode_file(png(1, 100, rows=100), name="x").shape == (100, 1, 3)
    assert untrusted.MAX_PIXELS >= 64 * 10**6  # phones take photos of this size


def test_the_limits_can_be_set(monkeypatch):
    thin, large = png(1, 101, rows=101), png(20, 20, rows=20)
    monkeypatch.setenv("VARJAX_MAX_ASPECT_RATIO", "200")
    assert decode_file(thin, name="x").shape == (101, 1, 3)
    monkeypatch.setenv("VARJAX_MAX_PIXELS", "399")
    with pytest.raises(
        InputError, match="at most 399 in all are allowed, .* or set VARJAX_MAX_PIXELS"
    ):
        decode_file(large, name="x")
    monkeypatch.setenv("VARJAX_MAX_PIXELS", "400")
    assert decode_file(large, name="x").shape == (20, 20, 3)
    monkeypatch.setenv("VARJAX_MAX_PIXELS", "many")
    with pytest.raises(InputError, match="VARJAX_MAX_PIXELS=many: must be a whole") as caught:
        decode_file(large, name="x")
    assert not isinstance(caught.value, BrokenImage)  # a run would skip that


def test_pixels_converted_in_chunks_of_rows_equal_those_of_pillow():
    rng = np.random.default_rng(0)
    picture = Image.fromarray(rng.integers(0, 256, (600, 7, 3), np.uint8))
    for source in (picture, picture.quantize(50), picture.convert("CMYK"), picture.convert("1")):
        for mode in ("L", "RGB", "RGBA"):
            via = source.convert("RGBA") if source.mode == "P" else source
            expected = np.asarray(via.convert(mode)).reshape(600, 7, len(mode))
            np.testing.assert_array_equal(picture_array(source, mode), expected)


def test_values_of_more_than_8_bits_are_scaled_by_the_range_of_the_format():
    def values(data):
        return decode_file(data, 1, "x").ravel()[:2].tolist()

    sixteen = np.full((8, 8), 65535, np.uint16)
    for kind in ("png", "tiff", "jpeg2000"):
        assert values(encoded(Image.fromarray(sixteen), kind)) == [255, 255]
        assert values(encoded(Image.fromarray(sixteen // 2), kind)) == [127, 127]
    assert values(tiff({258: 12}, b"\xff\xf8\x00" * 32)) == [255, 128]  # 4095 and 2048
    assert values(tiff({258: 16}, b"\xff\x0f" * 64)) == [16, 16]
    assert values(b"P5 2 1 4095\n\x0f\xff\x08\x00") == [255, 128]
    for tags, item in (({258: 32}, 4), ({258: 32, 339: 2}, 4), ({258: 16, 339: 2}, 2)):
        with pytest.raises(BrokenImage, match="integers, whose range is unknown; save it with 8"):
            values(tiff(tags, bytes(64 * item)))


def test_chunks_of_rows_are_scaled_alike():
    values_HW = np.arange(18_000, dtype=np.uint16).reshape(600, 30) * 3
    picture = decode_picture(encoded(Image.fromarray(values_HW), "png"), "x")
    expected = np.rint(values_HW / 65535 * 255).astype(np.uint8)
    np.testing.assert_array_equal(np.asarray(picture), expected)


def test_errors_about_names_that_are_not_utf8_can_be_printed(tmp_path):
    with pytest.raises(BrokenImage) as caught:
        read_file(pathlib.Path(os.fsdecode(b"\xff.png")))
    str(caught.value).encode()


@pytest.mark.parametrize("smooth", [True, False])
def test_each_flipped_bit_of_a_png_is_detected_or_changes_nothing(smooth):
    """Pillow alone returns wrong pixels for some flipped bits of a smooth image."""
    y_HWC, x_HWC = np.mgrid[:16, :16][..., None]
    image_HWC = (y_HWC * 10 + x_HWC * 3).astype(np.uint8) if smooth else NOISE_HWC
    file = io.BytesIO()
    Image.fromarray(np.broadcast_to(image_HWC, (16, 16, 3)).copy()).save(file, "PNG")
    content, detected = file.getvalue(), 0
    for bit in range(0, 8 * len(content), 1 if smooth else 13):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        try:
            found = decode_picture(bytes(flipped), "x.png", lambda x: np.asarray(x.convert("RGB")))
        except BrokenImage:
            detected += 1
            continue
        np.testing.assert_array_equal(found, np.broadcast_to(image_HWC, found.shape))
    assert detected > 100


NOISE_HWC = np.random.default_rng(0).integers(0, 256, (16, 16, 1), np.uint8)


def test_pixels_are_uint8_or_floats_that_hardly_exceed_0_to_1():
    sharpened = np.array([-0.2, 0.5, 1.2], np.float32)
    for images in (np.arange(3, dtype=np.uint8), sharpened, jnp.asarray(sharpened, jnp.bfloat16)):
        image_files.check_pixels(images)
    for images, message in (
        (np.arange(3), "x are int64"),
        (sharpened > 0, "x are bool"),
        (sharpened * 255, "x range from -51 to 306; give uint8, or floats"),
        (2 * jnp.asarray(sharpened) - 1, "x range from -1.4 to 1.4"),
        (sharpened * np.nan, "x hold NaN"),
        (sharpened + np.float32(np.inf), "x hold NaN or infinite"),
    ):
        with pytest.raises(InputError, match=message):
            image_files.check_pixels(images, "x")
