import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import varjax
from varjax.data.sources import Digits, Folder
from varjax.errors import InputError
from varjax.metrics.fid import Moments, frechet_distance
from varjax.sampling.pictures import save

RNG = np.random.default_rng(0)
REAL = RNG.integers(0, 256, (12, 4, 4, 1), np.uint8)
SAMPLES = RNG.integers(0, 128, (10, 4, 4, 1), np.uint8)


def pixels(images):
    return images.reshape(len(images), -1).repeat(3, axis=1) / (255 * 3**0.5)


def expected():
    return frechet_distance(Moments.of(pixels(SAMPLES)), Moments.of(pixels(REAL)))


@pytest.fixture(scope="module")
def real():
    return varjax.Features(REAL, features="pixels")


def test_fid_in_pixel_features_is_the_frechet_distance_of_pixels(real):
    found = varjax.fid(SAMPLES, REAL, features="pixels")
    assert found == pytest.approx(expected(), rel=1e-4) and found > 0.01
    assert varjax.fid(real, REAL, features="pixels") == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    "given",
    [
        lambda folder: SAMPLES,
        lambda folder: jnp.asarray(SAMPLES / np.float32(255)),
        lambda folder: (SAMPLES[i : i + 4] for i in range(0, 10, 4)),
        lambda folder: [SAMPLES[:3], SAMPLES[3:]],
        lambda folder: folder / "samples.npz",
        lambda folder: str(folder / "samples"),
        lambda folder: varjax.Features(SAMPLES, features="pixels"),
    ],
    ids=["array", "floats", "iterator", "list", "npz", "folder", "features"],
)
def test_fid_takes_arrays_iterables_paths_and_features(tmp_path, real, given):
    for name in ("samples.npz", "samples"):
        save(SAMPLES, tmp_path / name)
    assert varjax.fid(given(tmp_path), real) == pytest.approx(expected(), rel=1e-4)


@pytest.mark.parametrize("form", ["statistics.npz", "real.npz"])
def test_a_reference_may_be_a_file_of_statistics_or_images(tmp_path, monkeypatch, form):
    monkeypatch.setenv("VARJAX_CACHE", str(tmp_path / "cache"))
    moments = Moments.of(pixels(REAL))
    np.savez(tmp_path / "statistics.npz", mu=moments.mean_D, sigma=moments.covariance_DD)
    save(REAL, tmp_path / "real.npz")
    found = varjax.fid(SAMPLES, tmp_path / form, features="pixels")
    assert found == pytest.approx(expected(), rel=1e-4)


def test_evaluate_returns_metrics_that_print_as_a_table(real):
    measured = varjax.evaluate(SAMPLES, real)
    assert measured.metrics["fid"] == pytest.approx(expected(), rel=1e-4)
    assert 0 <= measured.metrics["recall"] <= 1
    assert "FID" in str(measured) and "left out: pixels have no logits" in str(measured)
    assert repr(real) == "Features(12 images, pixels)"


@pytest.mark.parametrize(
    ("samples", "says"),
    [
        (SAMPLES[:1], "1 images; 2 or more"),
        ([], "0 images"),
        (3, "images are a int"),
        (SAMPLES.astype(int), "int64"),
        ([SAMPLES, SAMPLES[:, :2]], "images of one size"),
    ],
)
def test_invalid_images_are_refused(real, samples, says):
    with pytest.raises(InputError, match=says):
        varjax.fid(samples, real)


def test_features_of_different_networks_are_refused(real):
    other = varjax.Features(REAL, features="pixels")
    network = other.extract.network
    other.extract = type("Extractor", (), {"network": type("Network", (), {})()})()
    other.extract.network.identity = network.identity | {"features": "Inception"}
    with pytest.raises(
        InputError, match="reference are features of pixels, the others of Inception"
    ):
        varjax.fid(other, real)


@pytest.mark.parametrize("given", [lambda x: x, lambda x: varjax.Features(x, features="pixels")])
def test_images_of_different_sizes_are_refused(given):
    with pytest.raises(InputError, match=r"of \(4, 2, 1\), the reference of \(4, 4, 1\)"):
        varjax.fid(SAMPLES[:, :, :2], given(REAL), features="pixels")


def test_inception_needs_its_weights():
    with pytest.raises(InputError, match="inception is missing"):
        varjax.fid(SAMPLES, REAL)


def test_a_reference_may_be_a_dataset(tmp_path, monkeypatch):
    monkeypatch.setenv("VARJAX_CACHE", str(tmp_path))
    digits = Digits().source("held_out").images_NHWC
    compared = varjax.fid(digits[:50], "digits", features="pixels", split="held_out")
    assert compared == pytest.approx(varjax.fid(digits[:50], digits, features="pixels"), rel=1e-4)


def test_photographs_of_a_reference_are_cropped_as_requested(tmp_path, monkeypatch):
    monkeypatch.setenv("VARJAX_CACHE", str(tmp_path / "cache"))
    for i, split in enumerate(["train"] * 4 + ["val"]):
        path = tmp_path / f"x/{split}/cat/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RNG.integers(0, 256, (9, 12, 3), np.uint8)).save(path)
    distances = {}
    for name, crop in (("var", "random"), ("adm", "center")):
        data = Folder(str(tmp_path / "x"), 4, channels=1, crop=crop)  # gray, like the samples
        source = data.source("train")
        real = np.stack([data.preprocess(source[i]["image"]) for i in range(4)])
        found = varjax.fid(SAMPLES, f"folder:{tmp_path / 'x'}", features="pixels", crop=name)
        assert found == pytest.approx(varjax.fid(SAMPLES, real, features="pixels"), rel=1e-4)
        distances[name] = found
    assert distances["var"] != distances["adm"]


@pytest.mark.parametrize("measure", [varjax.fid, varjax.evaluate])
@pytest.mark.parametrize("reference", [REAL, "real.npz"], ids=["array", "npz"])
def test_split_and_crop_need_a_dataset(measure, reference):
    save(REAL, "real.npz")
    with pytest.raises(InputError, match="split=train: needs a reference that is a dataset"):
        measure(SAMPLES, reference, features="pixels", split="train")
    with pytest.raises(InputError, match="crop=adm: needs a reference that is a dataset"):
        measure(SAMPLES, reference, features="pixels", crop="adm")
