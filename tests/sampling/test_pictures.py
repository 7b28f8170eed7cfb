import base64

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from varjax.errors import InputError
from varjax.metrics.image_sets import open_image_set
from varjax.sampling.pictures import save, show

IMAGES = np.random.default_rng(0).integers(0, 256, (3, 64, 64, 3), np.uint8)
FLOATS = IMAGES / np.float32(255)


def test_a_grid_shows_the_same_pixels_for_any_array_type():
    picture = show(IMAGES, columns=3)
    expected_HWC = np.concatenate(IMAGES, axis=1)
    np.testing.assert_array_equal(picture, expected_HWC)
    np.testing.assert_array_equal(show(jnp.asarray(FLOATS), columns=3), expected_HWC)
    np.testing.assert_array_equal(show(IMAGES[0]), IMAGES[0])
    assert show(IMAGES[..., :1]).mode == "L"


@pytest.mark.parametrize("name", ["samples.npz", "folder"])
def test_saved_images_and_labels_are_read_by_evaluation(tmp_path, name):
    save(FLOATS, tmp_path / name, labels=[4, 0, 4])
    found = open_image_set(tmp_path / name)
    assert found.shape == IMAGES.shape and found.label_N.tolist() == [4, 0, 4]
    np.testing.assert_array_equal(np.concatenate([x for _, x in found.parts([range(3)])]), IMAGES)


def test_gray_images_become_rgb_in_an_npz(tmp_path):
    save(IMAGES[..., :1], tmp_path / "x.npz")
    found = np.load(tmp_path / "x.npz")["arr_0"]
    np.testing.assert_array_equal(found, IMAGES[..., :1].repeat(3, axis=-1))


def test_an_animation_has_a_frame_for_each_step(tmp_path):
    save(IMAGES[:, None], tmp_path / "x.webp")
    shown = show(jnp.asarray(FLOATS)[:, None])
    assert shown.webp == (tmp_path / "x.webp").read_bytes()
    assert base64.b64encode(shown.webp).decode() in shown._repr_html_()
    film = Image.open(tmp_path / "x.webp")
    assert film.n_frames == 3
    for step, image_HWC in enumerate(IMAGES):
        film.seek(step)
        np.testing.assert_array_equal(film.convert("RGB"), image_HWC)


@pytest.mark.parametrize(
    ("images", "path", "says"),
    [
        (IMAGES[:0], "x.png", "one image or more"),
        (IMAGES[0, 0], "x.png", "needed is"),
        (IMAGES, "x.gif", "steps, N"),
        (IMAGES[None], "x.png", "needed is"),
        (FLOATS * np.nan, "x.png", "NaN"),
        (IMAGES.astype(int), "x.png", "int64"),
        (IMAGES.astype(float), "x.png", "range from 0 to 255"),
        (IMAGES, "x.jpg", "jpg"),
        (IMAGES, "full", "new folder"),
    ],
)
def test_images_or_paths_that_cannot_be_saved_are_refused(tmp_path, images, path, says):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match=says):
        save(images, tmp_path / path)
    assert not (tmp_path / "x.png").exists()


def test_saving_needs_one_label_per_image(tmp_path):
    with pytest.raises(InputError, match=r"\(2,\); expected \(3,\)"):
        save(IMAGES, tmp_path / "x.npz", labels=[1, 2])


@pytest.mark.parametrize(
    ("labels", "names", "stored"),
    [
        ([3.0, 1.0, 10.0], ["0003", "0001", "0010"], [3, 1, 10]),
        (jnp.array([3, 1, 10]), ["0003", "0001", "0010"], [3, 1, 10]),
        ([{3: 0.5, 8: 0.5}, 1, "a/b"], ["3x0.5+8x0.5", "1", "a_b"], ["3:0.5+8:0.5", "1", "a/b"]),
        (["dog", "é" * 150, "3:1+8:2"], ["dog", "é" * 100, "3x1+8x2"], None),
    ],
)
def test_saved_labels_may_be_anything_that_sample_takes(tmp_path, labels, names, stored):
    save(IMAGES, tmp_path / "folder", labels=labels)
    found = sorted(path.relative_to(tmp_path / "folder") for path in tmp_path.rglob("*.png"))
    assert [str(path) for path in found] == [f"{i:06d}_label{x}.png" for i, x in enumerate(names)]
    save(IMAGES, tmp_path / "x.npz", labels=labels)
    with np.load(tmp_path / "x.npz") as file:
        name = "labels" if np.asarray(labels).dtype.kind in "iuf" else "mixes"
        assert file[name].tolist() == (stored or labels)
        assert sorted(file) == ["arr_0", name]


@pytest.mark.parametrize(
    "labels", [[0.5, 1, 2], [None, 1, 2], [True, False, True], [[1], [1, 2], 3]]
)
def test_invalid_labels_are_refused_before_anything_is_written(tmp_path, labels):
    for name in ("folder", "x.npz"):
        with pytest.raises(InputError, match="label"):
            save(IMAGES, tmp_path / name, labels=labels)
    assert not list(tmp_path.iterdir())


def test_invalid_animations_and_columns_are_refused(tmp_path):
    rgba_SNHWC = np.zeros((3, 2, 8, 8, 4), np.uint8)
    for draw in (show, lambda *given: save(given[0], tmp_path / "x.webp", None, *given[1:])):
        with pytest.raises(InputError, match=r"shape \(3, 2, 8, 8, 4\); needed is .* 1 or 3\)"):
            draw(rgba_SNHWC)
        for columns in (-1, 0, 1.5):
            with pytest.raises(InputError, match=f"columns={columns}: must be 1 or more"):
                draw(rgba_SNHWC[..., :3], columns)
        draw(rgba_SNHWC[..., :3], np.int64(2))
    assert show(rgba_SNHWC[0]).mode == "RGBA"
