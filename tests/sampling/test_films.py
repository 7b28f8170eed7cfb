import io
import pathlib

import numpy as np
import pytest
from PIL import Image

from varjax.errors import InputError
from varjax.sampling import films
from varjax.sampling.grid_output import MemoryOutput
from varjax.sampling.outputs import check_out, check_out_holds, open_output
from varjax.storage import image_io
from varjax.storage.captioned_grid import Captions

STEPS_NSHWC = np.random.default_rng(0).integers(0, 256, (4, 3, 64, 64, 3), np.uint8)


def write(name):
    output = open_output(name, np.zeros(4, int), 2, 0, {}, every_step=True)
    output.begin(write=True)
    for part in (range(2, 4), range(2)):  # in any order
        assert not output.has(part)
        output.add(part, STEPS_NSHWC[part.start : part.stop])
        assert output.has(part)
    return output.finish()


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_an_animation_has_a_frame_per_step_and_holds_the_last(suffix):
    assert write(f"film.{suffix}") == f"film.{suffix}: 4 images in 3 frames"
    durations = []
    with Image.open(f"film.{suffix}") as film:
        assert film.n_frames == 3 and film.info["loop"] == 0
        for step in range(3):
            film.seek(step)
            film.load()
            durations.append(film.info["duration"])
            frame = np.asarray(film.convert("RGB")).astype(int)
            expected = image_io.image_grid(STEPS_NSHWC[:, step], columns=2)
            # A GIF has 256 colors per frame, too few for these images of noise; a WebP is exact.
            assert np.abs(frame - expected).mean() < (40 if suffix == "gif" else 1e-9)
    assert durations[-1] > durations[0] == durations[1]


@pytest.mark.parametrize("suffix", ["gif", "webp"])
def test_equal_consecutive_frames_are_merged_and_keep_their_total_duration(suffix):
    """Pillow merges them, which does not change what is shown."""
    steps_NSHWC = STEPS_NSHWC[:1, [0, 0, 1, 2, 2]]
    films.write_film(pathlib.Path(f"film.{suffix}"), steps_NSHWC)
    with Image.open(f"film.{suffix}") as film:
        durations = []
        for frame in range(film.n_frames):
            film.seek(frame)
            film.load()
            durations.append(film.info["duration"])
    step = films.FILM_MILLISECONDS // 5
    assert durations == [2 * step, step, step + films.LAST_MILLISECONDS]


def test_a_strip_has_a_row_per_image_and_a_column_per_step():
    assert write("strip.png") == "strip.png: 4 images, a row each, after each of 3 steps"
    strip_HWC = np.asarray(Image.open("strip.png"))
    assert strip_HWC.shape == (4 * 64, 3 * 64, 3)
    assert np.array_equal(strip_HWC[64:128, 128:], STEPS_NSHWC[1, 2])


def test_outputs_that_cannot_hold_the_steps_are_refused():
    for name in ("x.npz", "x"):
        with pytest.raises(InputError, match=f"out={name} holds finished images; for every step"):
            check_out_holds(name, 1, (8, 8, 1), steps=3)
    with pytest.raises(InputError, match="too large; draw at most"):
        check_out_holds("x.gif", 2730, (256, 256, 3), steps=10)
    with pytest.raises(InputError, match="5,000 images .* draw at most 4,080,"):
        check_out_holds("x.webp", 5000, (64, 64, 1), steps=3, columns=16)
    check_out_holds("x.webp", 4080, (64, 64, 1), steps=3, columns=16)
    check_out_holds("x.gif", 5000, (64, 64, 1), steps=3, columns=16)
    with pytest.raises(InputError, match="1,025 images .* draw at most 1,023,"):
        check_out_holds("x.gif", 1025, (64, 64, 1), steps=3, columns=1)
    check_out_holds("x.png", 1025, (64, 64, 1), steps=3, columns=1)
    check_out("x.webp")
    check_out_holds("x.gif", 8, (8, 8, 1), steps=10)


def test_a_very_tall_animation_has_no_captions_and_a_taller_one_is_refused():
    steps_NSHWC = np.zeros((255, 1, 64, 64, 1), np.uint8)
    captions = Captions(tiles=["a"] * 255)
    data = films.film_bytes("webp", steps_NSHWC, 1, captions)
    with Image.open(io.BytesIO(data)) as film:
        assert film.size == (64, 255 * 64)
    with pytest.raises(InputError, match="16,384x64 pixels; a webp has at most 16,383 on a side"):
        films.film_bytes("webp", np.zeros((256, 1, 64, 64, 1), np.uint8), 1)


def test_an_animation_needs_a_single_process():
    with pytest.raises(InputError, match="a sweep is drawn by one process; start"):
        MemoryOutput().begin(False)
    with pytest.raises(InputError, match="animations and strips need a single process"):
        open_output("x.gif", np.zeros(1, int), 1, 0, {}, every_step=True).begin(write=False)
