"""Tests that published values are shown only for the published weights and equal settings."""

import dataclasses

import pytest

from tests.helpers import runs
from varjax.convert.name_maps import RELEASES
from varjax.evaluation import published
from varjax.evaluation.evaluate import print_report
from varjax.evaluation.published import (
    Measurement,
    compare_settings,
    evaluation_options,
    release_name,
    released_sizes,
)
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions
from varjax.metrics.features import INCEPTION
from varjax.storage import files
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions

ADM = "somewhere/VIRTUAL_imagenet256_labeled.npz"


@pytest.fixture
def converted(tmp_path):
    """Returns a function that writes the config.json of weights converted from a release."""

    def write(name, **changes):
        release = RELEASES[name]
        digests = {f"a/{file.name}": file.sha256 for file in release.files.values()}
        config = {"sources": digests, "convert_options": {}} | changes
        files.write_json(tmp_path / name / "config.json", config)
        return str(tmp_path / name)

    return write


def var_d16(location, **changes):
    measurement = Measurement(
        location, VARConfig.preset("d16"), VAROptions(2.5, 900, 0.96), 50, ADM, INCEPTION
    )
    return dataclasses.replace(measurement, **changes)


def mar_b(location, **changes):
    options = MAROptions(guidance=2.9, steps=256)
    measurement = Measurement(
        location, MARConfig.preset("mar_b"), options, 50, "adm_in256_stats.npz", INCEPTION
    )
    return dataclasses.replace(measurement, **changes)


def test_published_weights_with_equal_settings_are_compared(converted):
    result, differences = compare_settings(var_d16(converted("var_d16")))
    assert result is not None and result.metrics == {"fid": 3.55} and not differences
    result, differences = compare_settings(mar_b(converted("mar_b")))
    assert result is not None and not differences
    assert result.metrics == {"fid": 2.31, "inception_score": 281.7}
    unguided = MAROptions(guidance=1.0, temperature=0.95, steps=256)
    result, differences = compare_settings(mar_b(converted("mar_b"), options=unguided))
    assert result is not None and result.metrics == {"fid": 3.48} and not differences


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(options=VAROptions(3.0, 900, 0.96)), "guidance is 3.0, published 2.5"),
        (dict(options=VAROptions(2.5, 0, 0.96)), "top_k is 0, published 900"),
        (dict(options=VAROptions(2.5, 900, 0.9)), "top_p is 0.9, published 0.96"),
        (dict(options=VAROptions(smooth=True)), "smooth is True, published False"),
        (dict(count=5), "5 samples of each class, published 50"),
        (dict(reference="folder:/data/imagenet"), "the reference is folder:/data/imagenet"),
        (dict(reference="x/VIRTUAL_imagenet512.npz"), "published VIRTUAL_imagenet256_labeled.npz"),
        (dict(features="pixels"), "features are pixels, published inception"),
        (dict(companions=("refiner",)), "a refiner took part, published none"),
        (dict(companions=("guide", "refiner")), "a guide and a refiner took part"),
        (dict(accept=0.1), "a classifier kept 0.1 of the samples, published all"),
    ],
)
def test_each_setting_that_differs_is_reported(changes, says, converted):
    result, differences = compare_settings(var_d16(converted("var_d16"), **changes))
    assert result is not None and len(differences) == 1 and says in differences[0]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (MAROptions(guidance=2.9, steps=64), "steps is 64, published 256"),
        (MAROptions(2.9, "constant", 256), "guidance_schedule is constant, published linear"),
        (MAROptions(2.9, "linear", 256, 0.95), "temperature is 0.95, published 1.0"),
        (MAROptions(steps=256, diffusion_steps="50:5"), "diffusion_steps is 50:5, published 100"),
        (MAROptions(steps=256, clip_denoised=3.0), "clip_denoised is 3.0, published 0.0"),
        (MAROptions(guidance=3.2, steps=256), "guidance is 3.2, published 2.9"),
    ],
)
def test_each_mar_option_that_differs_is_reported(options, says, converted):
    _, differences = compare_settings(mar_b(converted("mar_b"), options=options))
    assert differences == [says]


def test_weights_are_recognized_by_file_digests_and_not_by_size(converted, tmp_path):
    def said(location, **changes):
        _, differences = compare_settings(var_d16(location, **changes))
        return differences[0] if differences else ""

    assert not said(converted("var_d16"))
    other = dict.fromkeys(("vae.pth", "var_d16.pth"), "0" * 64)
    assert "was not made from the published files of var_d16" in said(
        converted("var_d16", sources=other)
    )
    # d20 and d16 share only the tokenizer's file.
    assert "was not made from the published files of var_d16" in said(converted("var_d20"))
    options = {"convert_options": {"phi_ratio": 0.25}}
    assert "converted with options other than the defaults: phi_ratio" in said(
        converted("var_d16", **options)
    )
    # Weights fine-tuned by others name their release, whose digests are not published.
    location = converted("var_d16", release="var_d16_cca")
    assert release_name(location, VARConfig.preset("d16")) == "var_d16_cca"
    assert release_name(location, VARConfig.preset("d20")) == "var_d20"
    assert (
        said(location) == "the SHA-256 of the published VAR_d16_CCA.pth of var_d16_cca is not known"
    )
    # A run that was fine-tuned from published weights.
    files.write_json(tmp_path / "run/config.json", {"task": {"_type": "VARTask"}, "steps": 1})
    assert "was not made from the published files" in said(str(tmp_path / "run"))
    # The digests of some published files are unknown.
    _, differences = compare_settings(
        Measurement(
            converted("var_d16"), VARConfig.preset("d36"), VAROptions(), 50,
            "VIRTUAL_imagenet512.npz", INCEPTION,
        )
    )  # fmt: skip
    assert differences == ["the SHA-256 of the published var_d36.pth of var_d36 is not known"]


def test_released_models_are_recognized_by_size_and_mar_takes_256_steps():
    assert released_sizes(VARConfig.preset("d16")) == "var_d16"
    assert released_sizes(VARConfig.preset("d36")) == "var_d36"
    assert released_sizes(MARConfig.preset("mar_l")) == "mar_l"
    assert released_sizes(runs.VAR) is None and released_sizes(runs.MAR) is None
    transformers = RELEASES.keys() - {"kl16", "vae_ch160v4096z32"}
    without = {f"var_d16_code_refiner_{scales}" for scales in (6, 7, 8, 9)}
    assert {n for n, release in RELEASES.items() if release.results} == transformers - without
    official = {name for name in transformers if name.count("_") == 1}
    assert len(official) == 8
    assert all(released_sizes(RELEASES[name].config) == name for name in official)
    assert compare_settings(var_d16("absent", config=runs.VAR)) == (None, [])
    assert evaluation_options(MARConfig.preset("mar_b"), {}) == {"steps": 256}
    assert evaluation_options(MARConfig.preset("mar_b"), {"steps": 64}) == {"steps": 64}
    assert evaluation_options(runs.MAR, {"guidance": 2.0}) == {"guidance": 2.0}
    assert evaluation_options(VARConfig.preset("d16"), {}) == {}


def test_a_report_shows_published_values_or_the_differences(capsys):
    report = {
        "name": "x", "images": 50_000, "reference": ADM, "reference_images": None,
        "metrics": {"fid": 2.5, "inception_score": 280.0}, "left_out": {}, "notices": [],
    }  # fmt: skip
    mar = {"weights": "mar_b", "metrics": {"fid": 2.31, "inception_score": 281.7}}
    print_report(report | {"published": mar | {"differences": []}})
    said = capsys.readouterr().out
    assert "281.70" in said and "2.31" in said and "(mar_b)" in said and "note" not in said
    lines = ["steps is 64, published 256", "5 samples of each class, published 50"]
    print_report(report | {"published": {"weights": "mar_b", "metrics": {}, "differences": lines}})
    said = capsys.readouterr().out
    assert "281.70" not in said and "2.31" not in said
    assert "no published value of mar_b is shown, because these differ:\n  steps is 64" in said
    print_report(report | {"published": None})
    assert "published" not in capsys.readouterr().out
    print_report(report)  # as an earlier version wrote it
    assert published.COUNT == 50
