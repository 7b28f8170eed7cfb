import jax.numpy as jnp
import numpy as np
import pytest

import varjax
from tests.helpers import runs
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.nn import resize

pytestmark = pytest.mark.slow

IMAGES = Digits().source("held_out").images_NHWC[:3]


@pytest.fixture(scope="module")
def model():
    return varjax.load(str(runs.var()))


def test_loading_a_run_gives_its_configs_weights_and_options(model):
    assert model.var == runs.VAR and model.tokenizer == runs.TOKENIZER
    assert model.sampling == varjax.VAROptions(guidance=1.5, top_k=7)
    assert model.config == {"tokenizer": runs.TOKENIZER, "var": runs.VAR}
    assert model.params.keys() == {"tokenizer", "var"}


def test_uint8_and_float_images_give_the_same_tokens(model):
    tokens_BL = model.encode(IMAGES)
    assert tokens_BL.shape == (3, 21) and tokens_BL.dtype == np.int32
    assert np.array_equal(model.encode(IMAGES / np.float32(255)), tokens_BL)


def test_decoding_every_scale_ends_with_the_image(model):
    tokens_BL = model.encode(IMAGES)
    every = model.decode(tokens_BL, every_scale=True)
    assert every.shape == (3, 3, 8, 8, 1)
    np.testing.assert_allclose(every[-1], model.decode(tokens_BL), atol=1e-6)


def test_logits_of_coarse_scales_do_not_depend_on_fine_tokens(model):
    tokens_BL = np.array(model.encode(IMAGES))
    before = model.logits(tokens_BL, [1, 2, 3])
    tokens_BL[:, 5:] = (tokens_BL[:, 5:] + 1) % 16
    after = model.logits(tokens_BL, [1, 2, 3])
    assert before.shape == (3, 21, 16)
    assert np.array_equal(before, after)  # the last scale's tokens are predicted, not read
    tokens_BL[:, 1:5] = (tokens_BL[:, 1:5] + 1) % 16
    assert not np.array_equal(model.logits(tokens_BL, [1, 2, 3])[:, 5:], before[:, 5:])


def test_samples_depend_on_seed_and_index(model):
    images = model.sample([1, 2, 3], seed=5)
    assert images.shape == (3, 8, 8, 1) and 0 <= images.min() and images.max() <= 1
    again = model.sample([3], seed=5, index=[2])
    np.testing.assert_allclose(again[0], images[2], atol=1e-5)
    assert not np.allclose(model.sample([1, 2, 3], seed=6), images)


def test_equal_options_of_any_number_type_share_a_compilation(model):
    images = model.sample([1, 2, 3], seed=5, guidance=2.0, top_k=5)
    scales = len(model.var.pyramid)
    compiled = model._compiled_sampler(scales, None, False).__wrapped__._cache_size()
    for given in ({"guidance": 2, "top_k": 5.0}, {"guidance": np.float32(2), "top_k": np.int64(5)}):
        np.testing.assert_array_equal(model.sample([1, 2, 3], seed=5, **given), images)
    model.sample([1, 2, 3], seed=6, guidance=3, top_k=7)
    assert model._compiled_sampler(scales, None, False).__wrapped__._cache_size() == compiled
    with pytest.raises(ValueError, match="top_k=5.5: must be a whole number"):
        model.sample([1], top_k=5.5)


def test_edits_change_only_what_is_not_kept(model):
    keep = np.zeros((4, 4), bool)
    np.testing.assert_allclose(
        model.edit(IMAGES, ~keep), model.decode(model.encode(IMAGES)), atol=1e-5
    )
    # Only the single token of the first scale is kept.
    assert not np.allclose(model.edit(IMAGES, keep), model.edit(IMAGES, ~keep))


def test_one_image_with_several_indices_gives_variations(model):
    keep = np.zeros((4, 4), bool)
    varied = model.edit(IMAGES[:1], keep, index=[0, 1, 7])
    assert varied.shape == (3, 8, 8, 1) and not np.allclose(varied[0], varied[1])
    again = model.edit(IMAGES[:1].repeat(3, axis=0), keep, index=[2, 7, 3])
    np.testing.assert_allclose(again[1], varied[2], atol=1e-5)


def test_load_accepts_dtype_and_devices(model):
    half = varjax.load(runs.var(), dtype="bfloat16", devices=model.devices[:1])
    assert half.compute == varjax.ComputeConfig("bfloat16") and half.devices == model.devices[:1]
    tokens_BL = model.encode(IMAGES)
    a, b = (np.asarray(m.logits(tokens_BL, [1, 2, 3])) for m in (model, half))
    assert 0 < np.abs(a - b).max() < 0.1
    np.testing.assert_array_equal(half.encode(IMAGES), tokens_BL)  # always in float32
    a, b = (np.asarray(m.decode(tokens_BL)) for m in (model, half))
    assert 0 < np.abs(a - b).max() < 0.1 and b.dtype == np.float32
    for arguments, message in (
        ({"dtype": "fp16"}, "auto, float32, bfloat16"),
        ({"dtype": "float32", "compute": varjax.ComputeConfig()}, "within compute"),
        ({"devices": []}, "devices is empty"),
    ):
        with pytest.raises(ValueError, match=message):
            varjax.load(runs.var(), **arguments)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda m: m.sample([11]), "11.*0 … 9"),
        (lambda m: m.sample([[1]]), "shape"),
        (lambda m: m.sample([1], top_p=2.0), "top_p"),
        (lambda m: m.encode(IMAGES[:, :4]), r"\(B, \*\(8, 8, 1\)\)"),
        (lambda m: m.encode(IMAGES.astype(int)), "int"),
        (lambda m: m.decode(np.zeros((1, 20), int)), r"\(B, 21\)"),
        (lambda m: m.decode(np.full((1, 21), 16)), "0 … 15"),
        (lambda m: m.edit(IMAGES, np.ones((2, 2), bool)), r"\(4, 4\)"),
        (lambda m: m.edit(IMAGES, np.ones((4, 4), bool), index=[1]), "3 images and 1 of index"),
        (lambda m: m.edit(IMAGES, np.ones((4, 4), bool), labels=[1, 2, 11]), "11"),
        (lambda m: m.logits(np.zeros((2, 21), int), [1]), r"\(2,\)"),
        (lambda m: m.sample([]), "labels are empty: allowed are 0 … 9"),
        (
            lambda m: m.sample(["cat"]),
            "label 'cat': the model has no class of this name; its classes are 0 … 9",
        ),
        (lambda m: m.sample([1], seed=2**32), "seed=4294967296: must be"),
        (lambda m: m.sample([1, 2], index=[1]), "index has 1 numbers; expected 2"),
        (lambda m: m.edit(IMAGES, np.ones((4, 4), bool), seed=-1), "seed=-1: must be"),
        (lambda m: m.encode(np.full((1, 8, 8, 1), np.nan)), "images hold NaN"),
        (lambda m: m.encode(IMAGES[:0]), "there are no images"),
        (lambda m: m.decode(np.zeros((1, 21))), "tokens are float64; give integers"),
    ],
)
def test_errors_for_bad_input_say_what_is_allowed(model, call, message):
    with pytest.raises(ValueError, match=message):
        call(model)


def test_variations_keep_the_first_scales_and_draw_the_others(model):
    options = {"top_k": 0, "guidance": 1.0}
    varied = model.vary(IMAGES[:1], 2, seed=1, index=range(3), **options)
    assert varied.shape == (3, 8, 8, 1) and not np.allclose(varied[0], varied[1])
    # This rule always draws the last code, so all other codes are kept ones.
    last = lambda logits_BlV, k, keys: jnp.full(logits_BlV.shape[:2], 15)  # noqa: E731
    token_BL = np.array(model.encode(IMAGES[:1]))
    token_BL[:, 5:] = 15
    expected = model.decode(token_BL)
    varied = model.vary(IMAGES[:1], 2, choose=last, guidance=1.0)
    np.testing.assert_allclose(varied, expected, atol=1e-5)
    steps = model.vary(IMAGES[:1], 2, choose=last, guidance=1.0, every_step=True)
    np.testing.assert_allclose(steps[:2], model.decode(token_BL, every_scale=True)[:2], atol=1e-5)
    np.testing.assert_allclose(steps[2], expected, atol=1e-5)
    with pytest.raises(InputError, match="top_k, temperature: not with `choose`"):
        model.vary(IMAGES[:1], 2, choose=last, top_k=0, temperature=1)
    with pytest.raises(InputError, match="keep_scales=3: must be at most 2"):
        model.vary(IMAGES, 3)


def test_upscaling_keeps_the_scales_that_the_small_image_fills(model):
    small_BhwC = IMAGES[:1].reshape(1, 4, 2, 4, 2, 1).mean(axis=(2, 4)).astype(np.uint8)
    upscaled = model.upscale(small_BhwC, seed=1, index=range(2))
    assert upscaled.shape == (2, 8, 8, 1)
    large_BHWC = resize.bicubic(small_BhwC.astype(np.float32) / 255, (8, 8)).clip(0, 1)
    expected = model.vary(large_BHWC, 2, seed=1, index=range(2))
    np.testing.assert_allclose(upscaled, expected, atol=1e-6)
    with pytest.raises(InputError, match="8x8 pixels; upscaling takes"):
        model.upscale(IMAGES)
    for image in (small_BhwC[0, ..., 0], small_BhwC[0]):
        with pytest.raises(InputError, match=r"have shape \(4, 4.*upscaling takes \(B, h, w, 1\)"):
            model.upscale(image)


@pytest.mark.parametrize("smooth", [False, True])
def test_the_last_step_is_the_sample(model, smooth):
    steps = model.sample([1, 2, 3], seed=5, smooth=smooth, every_step=True)
    assert steps.shape == (3, 3, 8, 8, 1)
    images = model.sample([1, 2, 3], seed=5, smooth=smooth)
    np.testing.assert_allclose(steps[-1], images, atol=1e-5)
    assert not np.allclose(steps[0], images)


def test_a_step_listener_gets_every_scale_without_changing_samples(model):
    steps = []
    images = model.sample([1, 2, 3], 5, every_step=lambda *step: steps.append(step))
    assert np.array_equal(images, model.sample([1, 2, 3], 5))
    assert [k for k, _ in steps] == [0, 1, 2]
    assert np.array_equal([x for _, x in steps], model.sample([1, 2, 3], 5, every_step=True))
    others = []
    model.sample([4, 5, 6], 7, guidance=2.0, every_step=lambda *step: others.append(step))
    assert len(others) == 3 and len(steps) == 3
    assert model._compiled_sender(3, None).__wrapped__._cache_size() == 1


def test_a_mix_of_one_class_equals_that_class(model):
    images = model.sample([3, 1], seed=5)
    np.testing.assert_allclose(model.sample(["3:2", {1: 0.1}], seed=5), images, atol=1e-5)
    token_BL = model.encode(IMAGES[:1])
    mixed_BLV, logits_BLV = (model.logits(token_BL, [label]) for label in ("3:1+7:1", 3))
    assert not np.array_equal(mixed_BLV, logits_BLV)
