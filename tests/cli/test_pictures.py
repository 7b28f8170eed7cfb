"""Tests commands that write pictures, on a fake model: vary, upscale, --paste, --every_step."""

import json
import pathlib

import numpy as np
import pytest
from PIL import Image

from tests.helpers.fake_sampler import FakeSampler
from tests.helpers.tiles import tiles
from varjax import models
from varjax.cli import edit, pictures, sample, upscale, vary
from varjax.errors import InputError
from varjax.metrics.classifier import LoadedClassifier
from varjax.sampling import rejection
from varjax.storage import image_io
from varjax.storage.captioned_grid import Captions
from varjax.storage.picture_text import read_picture_text

COMMANDS = {"vary": vary.vary_image, "upscale": upscale.upscale_image, "edit": edit.edit_image}
SHAPE = (64, 96, 3)


class FakeVAR(FakeSampler):
    """Records its arguments; the gray level of each result is the number of its image."""

    def vary(
        self,
        images_BHWC,
        keep_scales,
        labels=None,
        seed=0,
        *,
        index=None,
        every_step=False,
        **options,
    ):
        self.asked = images_BHWC, keep_scales, np.asarray(labels).tolist(), seed, options
        return self._steps(index, every_step)

    def edit(self, images_BHWC, keep, labels=None, seed=0, *, index, every_step=False, **options):
        return self._steps(index, every_step)

    upscale = vary

    def steps(self, options):
        return 3

    def sample(self, labels, seed=0, *, index=None, every_step=False, **options):
        return self._steps(index, every_step)

    def _steps(self, index, every_step):
        images_BHWC = self._images(np.asarray(index))
        steps = [images_BHWC + 10 * step / 255 for step in range(3)]
        return np.stack(steps) if every_step else images_BHWC


@pytest.fixture
def model(monkeypatch):
    found = FakeVAR(image_shape=SHAPE)

    def load(weights, dtype, **companions):
        found.companions = companions
        return found

    for module in (pictures, sample):
        monkeypatch.setattr(module, "load", load)
        monkeypatch.setattr(module, "use_compilation_cache", lambda: None)
    monkeypatch.setattr(pictures, "open_model", lambda weights: weights)
    monkeypatch.setattr(pictures, "family_of", lambda weights: models.FAMILIES[0])
    pixels = np.random.default_rng(0).integers(0, 256, (*SHAPE[:2], 3), np.uint8)
    Image.fromarray(pixels).save("photo.png")
    Image.fromarray(pixels[:17, :24]).save("small.png")
    return found


STEPS = ("step 1", "step 2", "step 3")
SHOWN = {"vary": ["original"], "upscale": ["the picture"], "edit": ["original", "redrawn parts"]}


def run(command, *flags):
    """Runs a command that draws two images at a time, and returns the tiles of its picture."""
    COMMANDS[command](["--weights=fake", "--batch_size=2", "--out=x.png", *flags])
    count = next(int(flag[8:]) for flag in flags if flag.startswith("--count="))
    return result_tiles(np.asarray(Image.open("x.png")), command, count, *flags)


def result_tiles(picture_HWC, command, count, *flags):
    """Cuts the tiles out of a picture or frame with the captions of this command."""
    given = dict(flag[2:].split("=") for flag in flags)
    words = ["guidance 2.5", *(f"{n} {given[n]}" for n in ("guide", "refiner") if n in given)]
    title = f"{command}: fake · {' · '.join(words)} · seed {given.get('seed', 0)}"
    names = SHOWN[command] + [f"result {number + 1}" for number in range(count)]
    captions = Captions(f"{title} · {given.get('label', 'no class')}", tiles=names)
    return tiles(picture_HWC, SHAPE[:2], captions, len(names))


def assert_results(tiles, values=None):
    values = range(len(tiles)) if values is None else values
    assert [np.unique(tile).tolist() for tile in tiles] == [[n] for n in values]


def test_variations_are_shown_after_the_original(model, capsys):
    flags = "--image=photo.png", "--keep_scales=2", "--count=3", "--seed=5", "--label=7"
    original, *results = run(
        "vary",
        *flags,
        "--ema=false",
        "--top_k=9",
        "--guide=weak",
        "--refiner=small",
        "--draft_scales=7",
    )
    np.testing.assert_array_equal(original, image_io.read_image("photo.png", SHAPE))
    assert_results(results)
    images_BHWC, keep_scales, labels, seed, options = model.asked
    np.testing.assert_array_equal(images_BHWC[0], original)
    assert (keep_scales, labels, seed, options["top_k"]) == (2, [7, 7], 5, 9)
    assert model.companions == {
        "ema": False,
        "guide": "weak",
        "refiner": "small",
        "draft_scales": 7,
    }
    assert "original, 3 results with its first 2 scales" in capsys.readouterr().out


def test_only_shown_results_must_be_finite(model):
    flags = "--image=photo.png", "--keep_scales=2", "--count=3"
    model.nan = frozenset({3})  # padding of the last batch, which is not shown
    _, *results = run("vary", *flags)
    assert_results(results)
    model.nan = frozenset({2})
    with pytest.raises(InputError, match=r"image 2 \(label 10, seed 0\) holds NaN .* 1 of the 1"):
        run("vary", *flags)


def test_a_small_picture_is_cropped_to_the_model_s_ratio_and_upscaled(model, capsys):
    _, *results = run("upscale", "--image=small.png", "--count=2", "--refiner=small")
    assert_results(results)
    images_BHWC, keep_scales, labels, *_ = model.asked
    assert images_BHWC.shape == (1, 16, 24, 3) and keep_scales is None and labels == [10, 10]
    assert model.companions == {
        "ema": None,
        "guide": None,
        "refiner": "small",
        "draft_scales": None,
    }
    assert "(24x16 pixels), and 2 results" in capsys.readouterr().out


def test_paste_keeps_the_original_pixels(model):
    original, _, *results = run(
        "edit", "--image=photo.png", "--box=0,0,0.5,1", "--count=2", "--paste=0"
    )
    for number, result in enumerate(results):
        np.testing.assert_array_equal(result[32:], original[32:])
        assert np.unique(result[:32]).tolist() == [number]


def test_every_step_is_a_column_or_a_frame(model):
    flags = ["--weights=fake", "--labels=3,7", "--count=1", "--batch_size=2"]
    assert sample.main([*flags, "--every_step", "--out=x.png"]) == 0
    captions = Captions("fake · guidance 2.5 · seed 0", rows=("3", "7"), columns=STEPS)
    strip = tiles(np.asarray(Image.open("x.png")), SHAPE[:2], captions, 6, 3)
    assert_results(strip, [0, 10, 20, 1, 11, 21])
    assert sample.main([*flags, "--out=x.gif"]) == 0
    with Image.open("x.gif") as film:
        assert film.n_frames == 3


def test_an_animation_shows_the_original_in_each_frame(model):
    flags = ["--weights=fake", "--image=photo.png", "--batch_size=2", "--out=x.webp"]
    original_HWC = image_io.read_image("photo.png", SHAPE)
    for command, own_flags in (
        ("vary", ["--keep_scales=2", "--label=3:0.5+8:0.5"]),
        ("edit", ["--box=0,0,0.5,1", "--paste=0"]),
    ):
        COMMANDS[command]([*flags, *own_flags, "--count=3"])
        with Image.open("x.webp") as film:
            assert film.n_frames == 3
            for step in range(3):
                film.seek(step)
                frame_HWC = np.asarray(film.convert("RGB"))
                shown = result_tiles(frame_HWC, command, 3, *own_flags)
                np.testing.assert_array_equal(shown[0], original_HWC)
                assert [tile[0, 0, 0] for tile in shown[-3:]] == [n + 10 * step for n in range(3)]
                if command == "edit":
                    np.testing.assert_array_equal(shown[-1][32:], original_HWC[32:])
    assert COMMANDS["vary"]([*flags[:-1], "--keep_scales=2", "--every_step", "--out=x.png"]) is None
    names = [f"result {number}" for number in range(1, 5)]  # one row per result, no original
    captions = Captions("vary: fake · guidance 2.5 · seed 0 · no class", rows=names, columns=STEPS)
    strip = tiles(np.asarray(Image.open("x.png")), SHAPE[:2], captions, 12, 3)
    assert_results(strip, [n + step for n in range(4) for step in (0, 10, 20)])


def test_a_picture_stores_the_command_that_made_it(model):
    run("vary", "--image=photo.png", "--keep_scales=2", "--count=1", "--label=7")
    _, text = read_picture_text("x.png")
    assert text["Command"] == (
        "varjax vary --weights=fake --batch_size=2 --out=x.png --image=photo.png --keep_scales=2 "
        "--count=1 --label=7"
    )
    settings = json.loads(text["Settings"])
    assert (settings["label"], settings["seed"], settings["guidance"]) == (7, 0, 2.5)


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        ("vary", ["--image=photo.png", "--out=x.npz"], "the results are one picture; give FILE.p"),
        ("vary", ["--image=photo.png", "--label=10"], r"labels \[10\]: allowed are 0 … 9"),
        ("vary", ["--image=none.png"], "none.png does not exist"),
        ("vary", ["--image=photo.png", "--label=1,2"], "label=1,2: give one class, or a mix such"),
        ("vary", ["--image=photo.png", "--accept=0.5"], "accept=0.5: varjax sample alone has"),
        ("upscale", ["--image=photo.png"], "96x64 pixels; upscaling takes less than the model's"),
        ("edit", ["--image=photo.png", "--box=0,0,1,1", "--paste=-2"], "paste=-2: give a number"),
    ],
)
def test_invalid_requests_are_refused_before_drawing(command, flags, message, model):
    keep = ["--keep_scales=2"] if command == "vary" else []
    with pytest.raises(InputError, match=message):
        run(command, *keep, *flags)
    assert model.calls == 0


def test_a_model_without_scales_cannot_vary(model, monkeypatch):
    monkeypatch.setattr(pictures, "family_of", lambda weights: models.FAMILIES[1])
    with pytest.raises(InputError, match="only a model .* .VAR. can vary an image"):
        run("vary", "--image=photo.png", "--keep_scales=2")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--every_step", "--out=x.npz"], "for every step, give FILE.gif"),
        (["--out=x.gif", "--accept=0.5", "--classifier=any"], "--accept chooses finished images"),
    ],
)
def test_outputs_that_cannot_show_steps_are_refused(flags, message, model, monkeypatch, capsys):
    classifier = LoadedClassifier(10, {}, lambda images_NHWC: images_NHWC)
    monkeypatch.setattr(rejection, "load_classifier", lambda location: classifier)
    assert sample.main(["--weights=fake", "--labels=3", *flags]) == 1
    assert message in capsys.readouterr().err and model.calls == 0


def test_the_input_picture_is_never_overwritten(model):
    pathlib.Path("link.png").symlink_to("photo.png")
    pathlib.Path("mask.png").write_bytes(pathlib.Path("photo.png").read_bytes())
    for command, flags, out, message in (
        ("edit", ["--box=0,0,0.5,0.5"], "./photo.png", "out=./photo.png is also the image"),
        ("edit", ["--mask=mask.png"], "mask.png", "out=mask.png is also the mask"),
        ("vary", ["--keep_scales=2"], pathlib.Path("photo.png").absolute(), "also the image"),
        ("upscale", [], "link.png", "also the image"),
    ):
        with pytest.raises(InputError, match=message):
            COMMANDS[command](["--weights=fake", "--image=photo.png", f"--out={out}", *flags])
    assert model.calls == 0


@pytest.mark.parametrize("guidance", ["1", "1,1,1"])
def test_a_guide_is_refused_if_guidance_is_off(guidance, model, capsys):
    off = f"--guidance={guidance}"
    with pytest.raises(InputError, match="guide=weak: guidance is 1, which turns the guide off"):
        run("vary", "--image=photo.png", "--keep_scales=2", "--count=1", "--guide=weak", off)
    draw = ["--weights=fake", "--labels=3", "--count=1", "--batch_size=1", "--guide=weak"]
    assert sample.main([*draw, off]) == 1
    assert "guide=weak: guidance is 1" in capsys.readouterr().err and model.calls == 0
    for others in (["--sweep", "guidance=1,2"], ["--guidance=2"]):
        assert sample.main([*draw, *others]) == 0
