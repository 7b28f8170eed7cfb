"""Metrics of the posterior in the evaluation report on a KL tokenizer."""

import dataclasses

import jax
import numpy as np
import pytest

from tests.tokenizers.kl.test_model import small_config
from varjax.config import config_tree
from varjax.evaluation import tokenizer as command
from varjax.storage import files
from varjax.tokenizers.kl.model import kl_divergence, sample_posterior
from varjax.tokenizers.reconstruction_metrics import measure_split

CONFIG = small_config(image_size=(12, 16), image_channels=3)
IMAGES = np.random.default_rng(0).integers(0, 256, (7, *CONFIG.image_shape), np.uint8)


@dataclasses.dataclass(frozen=True)
class Seven:
    """A loader of seven images, of which number 3 is invalid."""

    batch_size: int

    def held_out(self):
        for start in range(0, 7, self.batch_size):
            n = np.arange(start, start + self.batch_size)
            images, valid_B = IMAGES[np.minimum(n, 6)], (n < 7) & (n != 3)
            yield {"image_BHWC": images, "label_B": n, "valid_B": valid_B}


@pytest.fixture(scope="module")
def params():
    params = jax.jit(CONFIG.init)(jax.random.key(0))
    return params | {"latent_std": np.float32(2.5)}


@pytest.mark.slow
def test_metrics_match_a_direct_computation_on_valid_images(params):
    report = measure_split(CONFIG, params, Seven(4), show=(0, 6), worst=2).summary()
    valid = IMAGES[np.arange(7) != 3]
    latents = jax.jit(CONFIG.encode)(params, valid)
    np.testing.assert_allclose(report["kl"], np.mean(kl_divergence(latents)), rtol=1e-4)
    np.testing.assert_allclose(report["posterior_std"], np.mean(latents["std_BhwZ"]), rtol=1e-4)
    noise = np.random.default_rng(1).standard_normal((400, *latents["mean_BhwZ"].shape))
    samples = [sample_posterior(latents, x) for x in noise.astype(np.float32)]
    np.testing.assert_allclose(report["latent_std"], np.std(samples), rtol=0.02)
    np.testing.assert_allclose(report["latent_scale"], 1 / report["latent_std"])
    assert report["stored_latent_std"] == 2.5
    decoded = np.asarray(jax.jit(CONFIG.decode)(params, latents))
    squares_B = np.mean((decoded - valid / 255) ** 2, axis=(1, 2, 3))
    np.testing.assert_allclose(report["psnr"], np.mean(-10 * np.log10(squares_B)), rtol=1e-4)
    assert report["images"] == 6 and "ssim" in report and "scales" not in report
    other = measure_split(CONFIG, params, Seven(7), worst=2).summary()
    for name in report.keys() - {"worst", "tokenizer"}:
        np.testing.assert_allclose(other[name], report[name], rtol=1e-4, err_msg=name)


@pytest.mark.slow
def test_evaluate_tokenizer_supports_kl_tokenizers(params, tmp_path, capsys):
    settings = {"sources": {}, "tokenizer": config_tree.to_dict(CONFIG)}
    files.write_json(tmp_path / "config.json", settings)
    files.write_tensors(tmp_path / "tokenizer.safetensors", jax.device_get(params), {})
    flags = [f"--weights={tmp_path}", "--data=random", "--batch_size=64", "--out=out"]
    assert command.main(flags) == 0
    said = capsys.readouterr().out
    report = files.read_json("out/evaluation.json")
    assert f"latent_scale      {1 / report['latent_std']:.4f}" in said
    assert "psnr" in said and "stored_latent_std 2.5000" in said
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "evaluation.json",
        "scales.png",
        "worst.png",
    ]
