"""Tests `varjax evaluate-tokenizer`: metrics, pictures and what is refused."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from tests.helpers import runs
from tests.helpers.tiles import tiles
from varjax.checkpoints.weights import WeightsDir
from varjax.config import config_tree
from varjax.data.sources import Folder, dataset_of_command
from varjax.data.sources.digits import Digits
from varjax.errors import InputError
from varjax.evaluation import tokenizer as command
from varjax.evaluation import train_classifier
from varjax.metrics.features import FeatureExtractor, classifier_network, pixel_network
from varjax.metrics.fid import Moments, frechet_distance
from varjax.models import read_tokenizer
from varjax.nn.autoencoder import to_model_range
from varjax.nn.compute import EXACT
from varjax.storage import files, image_io
from varjax.storage.captioned_grid import Captions
from varjax.tokenizers import reconstruction_metrics
from varjax.tokenizers.reconstruction_metrics import measure_split
from varjax.tokenizers.vq.model import VQConfig, VQTokenizer, decode_every_scale, quantize_images
from varjax.tokenizers.vq.task import VQTask
from varjax.training.task import TrainState

pytestmark = pytest.mark.slow

CONFIG = VQConfig(
    scales=(1, 2, (3, 4)), image_channels=3, width=8, channel_mult=(1, 1, 1), blocks=1, groups=4,
    vocab=16, code_channels=4,
)  # fmt: skip
IMAGES = np.random.default_rng(0).integers(0, 256, (10, *CONFIG.image_shape), np.uint8)


@dataclasses.dataclass(frozen=True)
class Ten:
    """A loader of ten images, of which number 3 is broken."""

    batch_size: int

    def held_out(self):
        for start in range(0, 10, self.batch_size):
            n = np.arange(start, start + self.batch_size)
            valid_B = (n < 10) & (n != 3)
            images = np.where(valid_B[:, None, None, None], IMAGES[np.minimum(n, 9)], 0)
            yield {"image_BHWC": images, "label_B": n, "valid_B": valid_B}


@pytest.fixture(scope="module", autouse=True)
def promoting():
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote bfloat16
        yield


@pytest.fixture(scope="module")
def params():
    return jax.jit(CONFIG.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def split(promoting, params):
    return measure_split(CONFIG, params, Ten(4), show=(0, 3, 9), worst=2)


def test_metrics_leave_out_broken_images_and_do_not_depend_on_batch_size(split, params):
    other = measure_split(CONFIG, params, Ten(10), show=(0, 3, 9), worst=2)
    a, b = split.summary(), other.summary()
    assert a["images"] == 9 and [x.number for x in split.shown] == [0, 9]  # 3 is broken
    assert [x.number for x in split.worst] == [x.number for x in other.worst]
    assert a.keys() == b.keys() and "ssim" in a and "lpips" not in a
    for name in {n for n in a if not n.startswith("same_in")} - {"worst", "tokenizer"}:
        np.testing.assert_allclose(b[name], a[name], rtol=1e-4, err_msg=name)


def test_metrics_match_a_direct_computation(split, params):
    model = VQTokenizer(CONFIG).bind({"params": params})
    x_BHWC = to_model_range(IMAGES[np.arange(10) != 3])

    @jax.jit
    def by_hand(x_BHWC):
        tokens_BL = quantize_images(CONFIG, params, x_BHWC).tokens_BL
        f_hats = model.quantizer.accumulated_scales(tokens_BL)
        rebuilt, f_BhwZ = decode_every_scale(CONFIG, params, f_hats), model.features(x_BHWC)
        by_halves = dataclasses.replace(EXACT, encoder_precision="bfloat16")
        coarse = VQTokenizer(CONFIG, by_halves).bind({"params": params})
        coarse_BL = coarse.quantizer(coarse.features(x_BHWC)).tokens_BL
        return tokens_BL, rebuilt, f_BhwZ, f_hats, coarse_BL

    tokens_BL, y_KBHWC, f_BhwZ, f_hats, coarse_BL = jax.device_get(by_hand(x_BHWC))
    psnr_KB = -10 * np.log10(np.mean(((y_KBHWC - x_BHWC[None]) / 2) ** 2, axis=(2, 3, 4)))
    report = split.summary()
    np.testing.assert_allclose(report["scale_psnr"], psnr_KB.mean(axis=1), rtol=1e-4)
    np.testing.assert_allclose(report["psnr"], psnr_KB[-1].mean(), rtol=1e-4)
    np.testing.assert_allclose(report["l1"], np.mean(abs(y_KBHWC[-1] - x_BHWC)) / 2, rtol=1e-4)
    rest_K = [np.mean((f_BhwZ - f_hat) ** 2) / np.mean(f_BhwZ**2) for f_hat in f_hats]
    np.testing.assert_allclose(report["scale_rest"], rest_K, rtol=1e-4)
    codes_K = [len(np.unique(tokens_BL[:, s])) for s in CONFIG.pyramid.slices]
    assert report["scale_codes"] == codes_K
    np.testing.assert_allclose(report["scale_usage"], np.array(codes_K) / [9, 16, 16])
    same = np.mean(tokens_BL == coarse_BL)  # which tokens flip depends on what XLA fuses
    assert 0.5 < same < 1
    np.testing.assert_allclose(report["same_in_bfloat16"], same, atol=0.03)
    shares = [report[f"same_in_{precision}"] for precision in ("bfloat16", "tf32", "tf32_3x")]
    assert shares == sorted(shares) and report["same_in_bfloat16_3x"] >= 0.99 < shares[-1]
    lowest = np.argsort(psnr_KB[-1])[:2]
    assert [x.number for x in split.worst] == np.flatnonzero(np.arange(10) != 3)[lowest].tolist()
    shown = split.shown[1].rows
    np.testing.assert_array_equal(shown[0], IMAGES[9])
    assert abs(shown[1:].astype(int) - 127.5 * (y_KBHWC[:, -1] + 1)).max() <= 1


def test_lpips_is_measured_if_its_weights_are_given(monkeypatch, split, params):
    def lpips(params, x_BHWC, y_BHWC):  # the real one takes long to compile
        return params["factor"] * jnp.mean(jnp.abs(x_BHWC - y_BHWC), axis=(1, 2, 3))

    monkeypatch.setattr(reconstruction_metrics, "lpips", lpips)
    report = measure_split(CONFIG, params, Ten(4), {"factor": np.float32(3)}).summary()
    np.testing.assert_allclose(report["lpips"], 6 * split.summary()["l1"], rtol=1e-4)


def test_the_command_writes_a_report_and_pictures(tmp_path, capsys):
    weights = str(runs.tokenizer())
    flags = [f"--weights={weights}", "--data=digits", "--batch_size=64", "--out=out"]
    assert command.main(flags) == 0
    said = capsys.readouterr()
    assert "355 held-out images of digits" in said.out and "4×4" in said.out
    report = files.read_json(tmp_path / "out/evaluation.json")
    held_out = Digits().source("held_out").images_NHWC
    assert report["images"] == 355 and "ssim" not in report  # too small for SSIM's window
    expected = _psnr_of_the_task(weights)
    np.testing.assert_allclose(report["psnr"], expected, atol=0.05)  # the task does not clip
    title = f"{weights} · held-out images of digits"
    scales = Captions(title, rows=["original", "scale 1", "scale 2", "scale 3"])
    names = ["original", "reconstruction", "4 x difference"]
    worst = Captions(f"{title} · the worst", rows=names, columns=["99.9 dB"] * 8)
    for name, captions in (("scales", scales), ("worst", worst)):
        shown = np.asarray(image_io.open_image(f"out/{name}.png"))
        shown = tiles(shown, (8, 8), captions, 8 * len(captions.rows), 8)
        assert any(np.array_equal(shown[0], x[..., 0]) for x in held_out)


def test_another_tokenizers_report_is_not_overwritten(tmp_path, capsys, monkeypatch):
    flags = [f"--weights={runs.tokenizer()}", "--data=digits", "--batch_size=64", "--out=out"]
    assert command.main(flags) == 0
    report = (tmp_path / "out/evaluation.json").read_bytes()
    assert command.main(flags) == 0  # the same request
    monkeypatch.setattr(command, "measure_split", None)
    for change in (f"--weights={runs.untrained_var()}", "--data=random", "--features=pixels"):
        capsys.readouterr()
        assert command.main([*flags, change]) == 1
        assert "made with other settings" in capsys.readouterr().err
    assert (tmp_path / "out/evaluation.json").read_bytes() == report
    files.write_json(tmp_path / "out/evaluation.json", {"psnr": 20.0})  # an older version's
    assert command.main(flags) == 1
    assert "does not say which weights" in capsys.readouterr().err
    (tmp_path / "out/evaluation.json").unlink()
    picture = (tmp_path / "out/worst.png").read_bytes()
    assert command.main(flags) == 1
    assert "out has scales.png and worst.png and no evaluation.json" in capsys.readouterr().err
    assert (tmp_path / "out/worst.png").read_bytes() == picture


def test_a_report_inside_the_folder_of_images_is_refused(tmp_path, capsys):
    """Its pictures would become images of the dataset."""
    for number in range(40):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    flags = [f"--weights={runs.tokenizer()}", f"--data=folder:{tmp_path}"]
    assert command.main([*flags, f"--out={tmp_path}/report"]) == 1
    assert "would be taken for images" in capsys.readouterr().err


def _psnr_of_the_task(weights):
    config, params = read_tokenizer(weights)
    task, loader = VQTask(config), Digits().make(64, 0)
    state, sums = TrainState(None, params, None, None), None  # type: ignore[arg-type]
    step = jax.jit(task.eval_step)
    for batch in loader.held_out():
        part = jax.device_get(step(state, {}, batch))
        sums = part if sums is None else jax.tree.map(np.add, sums, part)
    return task.eval_metrics(sums)["psnr"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"data": "photos:1"}, "give folder:PATH"),
        ({"data": "latents:nowhere"}, "holds latents, but images are needed"),
        ({"weights": "nowhere"}, "nowhere does not exist; give a run's directory"),
        ({"batch_size": "0"}, "batch_size is 0"),
        ({"lpips": "nowhere"}, "8×8 are too small for LPIPS"),
        ({"features": "nowhere"}, "the directory of a classifier, which does not exist"),
        ({"features": "pixels", "inception": "anywhere"}, "needs no weights of Inception"),
    ],
)
def test_invalid_flags_are_refused_at_once(flags, message, capsys, tmp_path):
    flags = {"weights": str(runs.tokenizer()), "data": "digits"} | flags
    assert command.main([f"--{name}={value}" for name, value in flags.items()]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "evaluation").exists()


def test_a_run_that_held_out_other_images_is_reported(capsys):
    def said(text, **changes):
        trained = Folder("images", held_out=0.02)
        config = {"data": {"_type": "Folder"} | config_tree.to_dict(trained) | changes}
        data = dataset_of_command(text, 32, crop="center")
        command.say_other_splits(WeightsDir(pathlib.Path("run"), config), data)
        return capsys.readouterr().err

    assert "run was trained with held_out=0.02, so some of the images" in said("folder:images")
    assert not said("folder:images,held_out=0.02,unconditional=true")
    assert not said("folder:others") and not said("folder:images", _type="TFDS")
    command.say_other_splits(WeightsDir(pathlib.Path("converted"), {}), Digits())
    assert not capsys.readouterr().err


def test_the_default_output_folder_is_named_after_the_weights(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(command, "evaluate_tokenizer", lambda **given: asked.append(given["out"]))
    monkeypatch.setattr(command, "report_table", str)
    for out in ([], ["--out=mine"]):
        assert command.main(["--weights=runs/digits_tokenizer/", "--data=digits", *out]) == 0
    assert asked == ["evaluation/digits_tokenizer", "mine"]


def test_a_split_without_valid_images_is_refused(params):
    class Broken(Ten):
        def held_out(self):
            for batch in super().held_out():
                yield batch | {"valid_B": np.zeros(self.batch_size, bool)}

    with pytest.raises(ValueError, match="there is no image to measure"):
        measure_split(CONFIG, params, Broken(4))


def test_reconstruction_fid_is_measured_against_the_same_images(tmp_path, monkeypatch, capsys):
    arguments = [f"--weights={runs.tokenizer()}", "--data=digits", "--batch_size=64"]
    assert command.main([*arguments, f"--out={tmp_path}", "--features=pixels"]) == 0
    report = files.read_json(tmp_path / "evaluation.json")
    config, params = read_tokenizer(runs.tokenizer())
    images = Digits().source("held_out").images_NHWC
    rebuilt = jax.jit(lambda x: config.decode(params, config.encode(params, x)))(images)
    rebuilt = np.rint(np.asarray(rebuilt) * 255).astype(np.uint8)
    extract = FeatureExtractor(pixel_network())
    moments = [Moments.of(extract(x)["pool_ND"]) for x in (rebuilt, images)]
    found = report["reconstructions"]
    np.testing.assert_allclose(found["fid"], frechet_distance(*moments), rtol=1e-4)
    assert {"precision", "recall", "kid"} < found.keys()
    assert "held-out images, cropped alike;\nfeatures: pixels\n" in capsys.readouterr().out
    assert report["features"] == "pixels"


def test_a_classifier_measures_the_label_accuracy_of_reconstructions(tmp_path, capsys):
    classifier, data = str(tmp_path / "classifier"), Digits().source("held_out")
    training = ["--data=digits", "--steps=60", "--batch_size=64", f"--out={classifier}"]
    assert train_classifier.main(training) == 0
    network = classifier_network(classifier)
    pairs = command.FeaturePairs(network, classes=10)
    for part in (slice(0, 200), slice(200, None)):  # perfect reconstructions
        images_NHWC = data.images_NHWC[part]
        pairs.add(images_NHWC, images_NHWC, data.labels_N[part])
    logits_NV = FeatureExtractor(network)(data.images_NHWC)["logits_NV"]
    found = pairs.measure().metrics["label_accuracy"]
    assert found == (logits_NV.argmax(axis=1) == data.labels_N).mean() > 0.8

    arguments = [f"--weights={runs.tokenizer()}", "--data=digits", f"--features={classifier}"]
    assert command.main([*arguments, f"--out={tmp_path}"]) == 0
    out = capsys.readouterr().out
    assert "label accuracy" in out and "features: penultimate layer of a ConvNet" in out
    assert "samples each" not in out  # the classes of held-out images need not be balanced


def test_a_nan_reconstruction_is_refused_with_the_image_number(params):
    bad = jax.tree.map(lambda x: x, params)
    bad["decoder"]["conv_out"]["bias"] = np.full_like(bad["decoder"]["conv_out"]["bias"], np.nan)
    with pytest.raises(InputError, match="image 0 .from 0., and 3 of the 3 images .* psnr.* not f"):
        measure_split(CONFIG, bad, Ten(4))
