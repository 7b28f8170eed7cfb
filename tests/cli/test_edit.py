import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import varjax
from tests.helpers import runs
from tests.helpers.tiles import tiles
from varjax.cli.edit import edit_image
from varjax.data.sources import Digits
from varjax.sampling.edit_masks import box_mask, mask_tokens, read_mask
from varjax.sampling.sampler import KnownTokens, image_keys
from varjax.storage import image_io
from varjax.storage.captioned_grid import Captions
from varjax.var.kept_scales import keep_at_every_scale
from varjax.var.network import VARModels
from varjax.var.sample import VAROptions, sample_tokens

pytestmark = pytest.mark.slow

IMAGE_HWC = Digits().source("held_out").images_NHWC[3]


@pytest.fixture
def photo(tmp_path):
    """Writes a photo whose size and aspect ratio are not the model's."""
    picture = Image.fromarray(IMAGE_HWC[..., 0]).resize((48, 40)).convert("RGB")
    picture.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def edit(photo, *flags):
    request = [f"--weights={runs.var()}", f"--image={photo}", "--out=edit.png", *flags]
    edit_image(request)
    return np.asarray(Image.open("edit.png")).astype(int)


def shown_tiles(picture_HWC, guidance, results):
    """Returns the tiles of an edit's picture, without their enlargement."""
    title = f"edit: {'/'.join(runs.var().parts[-2:])} · guidance {guidance} · seed 0 · no class"
    names = ["original", "redrawn parts", *(f"result {i + 1}" for i in range(results))]
    return tiles(picture_HWC, (8, 8), Captions(title, tiles=names), len(names))


def redrawn(path, image_size):
    return mask_tokens(read_mask(path, image_size, (8, 8)), (4, 4), path)


def test_a_box_is_in_pixels_or_fractions_and_rounded_to_tokens():
    expected_hw = np.zeros((4, 4), bool)
    expected_hw[1:3, 2:] = True
    for text in ("2,4,6,8", "0.25,0.5,0.75,1", "0.3,0.45,0.7,0.9", "2,3,6,8"):
        assert np.array_equal(box_mask(text, (8, 8), (4, 4)), expected_hw), text
    assert box_mask("0,0,1,1", (8, 8), (4, 4)).all()
    assert np.array_equal(np.argwhere(box_mask("4,0,8,4", (8, 4), (2, 1))), [[1, 0]])


@pytest.mark.parametrize(
    "text", ["1,2,3", "a,b,c,d", "4,0,2,8", "0,0,9,8", "-1,0,4,8", "0.5,0,4,8"]
)
def test_an_invalid_box_is_refused(text):
    with pytest.raises(ValueError, match=f"box={text}: give y0,x0,y1,x1"):
        box_mask(text, (8, 8), (4, 4))


def test_white_parts_of_a_mask_are_redrawn(tmp_path):
    mask_HW = np.zeros((40, 48), np.uint8)
    mask_HW[:20] = 255
    Image.fromarray(mask_HW).save(tmp_path / "mask.png")
    white_hw = redrawn(tmp_path / "mask.png", (48, 40))
    assert np.array_equal(white_hw, np.arange(4)[:, None].repeat(4, axis=1) < 2)


def test_transparent_parts_of_a_mask_are_kept(tmp_path, capsys):
    strokes_HWC = np.full((8, 8, 4), 255, np.uint8)
    strokes_HWC[:, 4:, 3] = 0  # like a layer exported from a drawing program
    path = tmp_path / "mask.png"
    Image.fromarray(strokes_HWC).save(path)
    white_hw = redrawn(path, (8, 8))
    assert np.array_equal(white_hw, np.arange(4)[None].repeat(4, axis=0) < 2)
    assert not capsys.readouterr().err
    strokes_HWC[..., 3] = 0
    Image.fromarray(strokes_HWC).save(path)
    with pytest.raises(
        ValueError, match="leaves nothing to draw: paint the parts to redraw in opaque white"
    ):
        redrawn(path, (8, 8))
    strokes_HWC[..., 3] = 255
    Image.fromarray(strokes_HWC).save(path)
    assert redrawn(path, (8, 8)).all()
    assert "mask.png is white everywhere, so the whole image is redrawn" in capsys.readouterr().err


def test_the_picture_shows_original_mask_and_results(photo, capsys):
    shown = edit(photo, "--box=0,0,4,8", "--count=3", "--batch_size=2", "--guidance=2")
    shown_NHWC = shown_tiles(shown, 2, 3)
    assert (
        "48x40 pixels, resized (shorter side) and center-cropped to 8x8" in capsys.readouterr().out
    )
    original_HWC = image_io.read_image(photo, (8, 8, 3)).astype(int)
    assert np.array_equal(shown_NHWC[0], original_HWC)
    red_HWC = original_HWC[:4] // 2 + [127, 0, 0]
    assert np.array_equal(shown_NHWC[1], np.concatenate([red_HWC, original_HWC[4:]]))
    model, upper = varjax.load(runs.var()), np.arange(4)[:, None].repeat(4, axis=1) < 2
    image_BHWC = image_io.read_image(photo, (8, 8, 1))[None]
    results = model.edit(image_BHWC, ~upper, guidance=2.0, index=range(3))
    results_NHWC = image_io.to_uint8(np.asarray(results)).astype(int)
    for i in range(3):
        assert np.abs(shown_NHWC[2 + i] - results_NHWC[i]).max() <= 1
    assert not np.array_equal(shown_NHWC[2], shown_NHWC[3])


def test_known_tokens_are_kept_and_the_others_vary():
    model = varjax.load(runs.var())
    inside_hw = box_mask("0,0,0.5,1", (8, 8), (4, 4))
    tokens_BL = jnp.broadcast_to(model.encode(IMAGE_HWC[None]), (4, 21))
    known = KnownTokens(
        tokens_BL, keep_at_every_scale(model.var.pyramid, ~inside_hw[None].repeat(4, 0))
    )
    draw = jax.jit(functools.partial(sample_tokens, VARModels(model.tokenizer, model.var)))
    label_B, key_B = jnp.full(4, 3), image_keys(0, jnp.arange(4))
    options = VAROptions(guidance=2.0, top_k=0, top_p=0.0)
    found_BL, _ = draw(model.params, label_B, key_B, options, known)
    keep_BL, found_BL = np.asarray(known.keep_BL), np.asarray(found_BL)
    assert np.array_equal(found_BL[keep_BL], np.asarray(tokens_BL)[keep_BL])
    assert keep_BL[0].sum() == 1 + 2 + 8
    assert not np.array_equal(found_BL[0], found_BL[1])


def test_the_mode_sets_the_redrawn_part_and_its_class(photo, monkeypatch):
    asked = []

    def remember(self, images_BHWC, keep, labels, *_, index, **__):
        asked.append((np.asarray(keep), labels.tolist()))
        return np.repeat(images_BHWC, len(index), axis=0) / 255

    monkeypatch.setattr(varjax.VARPipeline, "edit", remember)
    for mode in (["inpaint"], ["outpaint"], ["class", "--label=7"]):
        edit(photo, "--box=0,0,4,8", "--count=1", "--mode=" + mode[0], *mode[1:])
    (inside, none), (outside, _), (same, seven) = asked
    assert not inside[:2].any() and inside[2:].all()
    assert np.array_equal(outside, ~inside) and np.array_equal(same, inside)
    assert none == [10] and seven == [7]


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "either --box=y0,x0,y1,x1 or --mask"),
        (["--box=0,0,4,4", "--mask=mask.png"], "either"),
        (["--mask=mask.png", "--mode=outpaint"], "needs a --box"),
        (["--box=0,0,4,4", "--mode=class"], "needs --label"),
        (["--box=0,0,4,4", "--label=10"], r"labels \[10\]: allowed are 0 … 9"),
        (["--box=0,0,4,9"], "x1 <= 8 in whole pixels"),
        (["--box=0.1,0.1,0.12,0.9"], "no token; a token has 2x2 pixels"),
        (["--box=0,0,8,8", "--mode=outpaint"], "nothing is left to draw"),
        (["--mask=small.png"], "small.png has 8x8 pixels, but the image has 48x40"),
        (["--mask=black.png"], "to redraw in opaque white"),
        (["--mask=none.png"], "none.png does not exist"),
        (["--box=0,0,4,4", "--image=none.png"], "none.png does not exist"),
        (["--box=0,0,4,4", "--image=text.png"], "not an image"),
        (["--box=0,0,4,4", "--out=edit.npz"], "give FILE.png"),
        (["--box=0,0,4,4", "--count=0"], "count=0"),
        (["--box=0,0,4,4", "--top_p=2"], "top_p"),
    ],
)
def test_invalid_flags_are_refused_before_compiling(photo, tmp_path, flags, message, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it started editing")

    monkeypatch.setattr(varjax.VARPipeline, "edit", never)
    Image.new("L", (8, 8), 255).save(tmp_path / "small.png")
    Image.new("L", (48, 40), 0).save(tmp_path / "black.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(ValueError, match=message):
        edit(photo, *flags)
