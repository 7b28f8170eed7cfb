"""Tests the tokens that the page shows against the tokenizer and the transformer."""

import dataclasses

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import runs
from varjax.demo import inside
from varjax.demo.__main__ import open_demo_model
from varjax.demo.inside import ALTERNATIVES, code_colors, likeliest_codes, look_inside
from varjax.errors import InputError
from varjax.storage.image_files import to_uint8

IMAGE_HWC = np.random.default_rng(0).integers(256, size=(8, 8, 1), dtype=np.uint8)


@pytest.fixture(scope="module")
def model():
    return open_demo_model(str(runs.untrained_var()))


def test_reconstructions_are_shown_after_each_scale(model):
    found = look_inside(model, IMAGE_HWC)
    assert [*found.images] == ["original", *(f"after scale {k}" for k in (1, 2, 3))]
    tokens_BL = model.sampler.encode(IMAGE_HWC[None])
    assert np.array_equal(found.tokens_BL, tokens_BL)
    last_HWC = to_uint8(np.asarray(model.sampler.decode(tokens_BL)))[0]
    assert np.array_equal(found.images["after scale 3"], last_HWC)
    error_HW = np.abs(IMAGE_HWC.astype(float) - last_HWC)[..., 0] / 255
    psnr = -10 * np.log10((error_HW**2).mean())
    assert found.summary == f"PSNR {psnr:.1f} dB; largest error {error_HW.max():.3f} of 1"
    assert len(found.maps) == 1 + 3 + 1


def test_lpips_is_measured_if_there_are_weights(model, monkeypatch):
    def lpips(params, x_BHWC, y_BHWC):  # the real one takes long to compile
        return params * jnp.abs(x_BHWC - y_BHWC).mean(axis=(1, 2, 3))

    monkeypatch.setattr(inside, "lpips", lpips)
    found = look_inside(dataclasses.replace(model, lpips=jnp.float32(3)), IMAGE_HWC)
    error = np.abs(IMAGE_HWC.astype(float) - found.images["after scale 3"]).mean() / 255
    assert f" dB; LPIPS {3 * 2 * error:.3f}; largest error" in found.summary
    with pytest.raises(InputError, match="8×8 are too small for LPIPS"):
        open_demo_model(str(runs.untrained_var()), lpips={})


def test_each_of_the_likeliest_codes_replaces_one_token(model):
    tokens_BL = np.asarray(model.sampler.encode(IMAGE_HWC[None]))
    found, about = likeliest_codes(model, tokens_BL, 3, scale=2, position=(0.3, 0.99))
    place = 1 + 4 + 1 * 4 + 3
    logits_V = np.asarray(model.sampler.logits(tokens_BL, [3]))[0, place]
    best = np.argsort(-logits_V)[:ALTERNATIVES]
    assert [int(name.split()[1].rstrip(":")) for name in found] == best.tolist()
    assert about.startswith(
        f"Scale 3, row 2, column 4: the picture has code {tokens_BL[0, place]},"
    )
    changed_BL = tokens_BL.repeat(ALTERNATIVES, axis=0)
    changed_BL[:, place] = best
    expected = to_uint8(np.asarray(model.sampler.decode(changed_BL)))
    assert np.array_equal([*found.values()], expected)


def test_a_scale_that_does_not_exist_is_refused(model):
    with pytest.raises(InputError, match="scale 4: allowed are 1 … 3"):
        likeliest_codes(model, np.zeros((1, 21), np.int32), 3, 3, (0, 0))


def test_equal_codes_have_equal_colors_and_adjacent_codes_do_not():
    colors_HWC = code_colors(np.array([[1, 2], [2, 1]]))
    first, second = colors_HWC[0, 0], colors_HWC[0, -1]
    assert np.array_equal(first, colors_HWC[-1, -1]) and np.array_equal(second, colors_HWC[-1, 0])
    assert np.abs(first.astype(int) - second).max() > 100


@pytest.mark.slow
def test_the_posterior_mean_and_a_sample_of_latents_are_shown():
    found = look_inside(open_demo_model(str(runs.mar())), IMAGE_HWC)
    assert [*found.images] == ["original", "posterior mean", "posterior sample"]
    mean_HWC, sample_HWC = [*found.images.values()][1:]
    assert not np.array_equal(mean_HWC, sample_HWC) and found.tokens_BL is None


def test_single_scale_codes_are_shown_with_their_decoded_image():
    model = open_demo_model(str(runs.untrained_mar_over_codes()))
    found = look_inside(model, IMAGE_HWC)
    assert [*found.images] == ["original", "from its codes"] and found.tokens_BL is None
    codes_BL = np.asarray(model.sampler.encode(IMAGE_HWC[None]))
    result_HWC = to_uint8(np.asarray(model.sampler.decode(codes_BL)))[0]
    assert np.array_equal(found.images["from its codes"], result_HWC)
    assert np.array_equal(found.maps["tokens"], code_colors(codes_BL.reshape(4, 4)))
