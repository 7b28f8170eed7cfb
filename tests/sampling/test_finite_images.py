"""Tests that NaN images are reported and not written, and that good images are kept."""

import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers import runs
from tests.helpers.fake_sampler import FakeSampler
from varjax import trees
from varjax.cli import edit, pictures, sample
from varjax.errors import InputError
from varjax.evaluation import __main__ as evaluation
from varjax.mar.pipeline import MARPipeline
from varjax.mar.sample import MAROptions
from varjax.nn.compute import ComputeConfig
from varjax.sampling.outputs import check_finite_images
from varjax.sampling.sampler import image_keys, nan_advice
from varjax.storage import image_io
from varjax.var.sample import VAROptions, choose_tokens

SAMPLE = ["--weights=fake", "--labels=3,7", "--count=4", "--batch_size=2", "--seed=5"]
SAID = "image 5 .label 7, seed 5. holds NaN .* not written. Try top_k=901"


@pytest.fixture
def model(monkeypatch):
    found = FakeSampler(nan=frozenset((5,)))
    monkeypatch.setattr(pictures, "open_model", lambda weights: weights)
    for module in (sample, pictures, evaluation):
        monkeypatch.setattr(module, "load", lambda *_, **__: found)
        monkeypatch.setattr(module, "use_compilation_cache", lambda: None)
    return found


def test_a_folder_keeps_the_good_parts_and_resumes_once_the_model_is_fixed(model, tmp_path):
    first = [f"{i:06d}_label0003.png" for i in range(4)]
    for _ in range(2):  # a second run fails in the same way
        with pytest.raises(InputError, match=SAID):
            sample.draw_samples([*SAMPLE, "--out=images"])
        assert sorted(p.name for p in (tmp_path / "images").iterdir()) == [*first, "request.json"]
    written = (tmp_path / "images" / first[0]).stat().st_mtime_ns
    model.nan = frozenset()
    sample.draw_samples([*SAMPLE, "--out=images"])
    assert len(list((tmp_path / "images").glob("*.png"))) == 8
    assert (tmp_path / "images" / first[0]).stat().st_mtime_ns == written


def test_no_npz_grid_edit_or_report_is_written_from_nan(model, tmp_path, capsys):
    for out in ("a.npz", "a.png"):
        assert sample.main([*SAMPLE, f"--out={out}"]) == 1
        assert "image 5 (label 7, seed 5) holds NaN" in capsys.readouterr().err
        assert not (tmp_path / out).exists()
    Image.new("L", (8, 8)).save("photo.png")
    edited = [
        "--image=photo.png",
        "--box=0,0,4,4",
        "--label=7",
        "--count=6",
        "--seed=5",
        "--batch_size=6",
    ]
    assert edit.main(["--weights=fake", *edited]) == 1
    assert "image 5 (label 7, seed 5) holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "edit.png").exists()
    np.savez("real.npz", arr_0=np.zeros((9, 8, 8, 3), np.uint8))
    measured = ["--reference=real.npz", "--features=pixels", "--cache=cache", "--count=1"]
    assert evaluation.main(["--weights=fake", *measured, "--batch_size=2"]) == 1
    assert "image 5 (label 5, seed 0) holds NaN" in capsys.readouterr().err
    assert not (tmp_path / "report.json").exists()


def test_infinity_is_refused_and_the_first_bad_image_is_named():
    images_BHWC = np.ones((3, 2, 2, 1), np.float32)
    check_finite_images(images_BHWC, range(3), [1, 2, 3], 0, str)
    images_BHWC[1, 0, 1] = np.inf
    images_BHWC[2] = np.nan
    with pytest.raises(InputError, match="image 8 .label 2, seed 4. holds .* as do 2 of the 3"):
        check_finite_images(images_BHWC, [7, 8, 9], [1, 2, 3], 4, str)


def test_nan_is_not_converted_to_uint8():
    with pytest.raises(InputError, match="contain NaN or infinity, which no image file"):
        image_io.to_uint8(np.array([0.5, np.nan]))
    with pytest.raises(InputError, match="which no image file"):
        image_io.image_grid(np.full((1, 2, 2, 1), np.nan, np.float32))


def test_advice_depends_on_weights_dtype_and_model():
    good, bad = {"a": np.ones(2, np.float32), "n": np.int32(1)}, {"b": np.array([1, np.nan])}
    assert trees.nonfinite({"x": good, "y": bad}) == ["y/b"]
    assert "weights themselves hold NaN or infinite numbers (b)" in nan_advice(bad, "bfloat16")
    assert nan_advice(good, jnp.bfloat16).startswith("Try --dtype=float32; or weaker guidance")
    assert "--dtype" not in nan_advice(good, "float32")
    mar = types.SimpleNamespace(params=good, compute=ComputeConfig("float32"), mar=runs.MAR)
    assert "--clip_denoised=3" in MARPipeline.advise_on_nan(mar, MAROptions())
    assert "--clip_denoised" not in MARPipeline.advise_on_nan(mar, MAROptions(clip_denoised=3.0))


@pytest.mark.parametrize("smooth", [False, True])
def test_a_nan_logit_makes_the_code_of_its_token_nan(smooth):
    """An argmax alone would choose some code, and the picture would look like any other."""
    logits_BlV = np.random.default_rng(0).normal(size=(2, 3, 5)).astype(np.float32)
    logits_BlV[1, 2, 4] = np.nan
    quantizer = types.SimpleNamespace(
        pyramid=types.SimpleNamespace(progress=lambda k: 0.5),
        look_up=lambda tokens_Bl: jnp.ones((*tokens_Bl.shape, 4)),
        mix_codes=lambda weights_BlV: weights_BlV[..., :4],
    )
    options = VAROptions(top_k=3, top_p=0.9, smooth=smooth)
    key_B = image_keys(0, np.arange(2))
    _, codes_BlZ = choose_tokens(quantizer, logits_BlV, 0, key_B, options)
    finite_Bl = np.isfinite(codes_BlZ).all(axis=-1)
    assert not finite_Bl[1, 2] and finite_Bl.sum() == 5
