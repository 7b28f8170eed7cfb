"""Holds what the authors of released models report, and checks what may be compared with it."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from varjax.convert.pretrained import RELEASES
from varjax.convert.weights_dir import CONVERT_OPTIONS
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions
from varjax.metrics.features import INCEPTION
from varjax.models import open_model
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions

COUNT = 50  # samples of each class
# ADM's statistics of ImageNet's training set, and MAR's copy of them. Nobody has published their
# digests, so the file is known by its name.
REFERENCE_256 = ("VIRTUAL_imagenet256_labeled.npz", "adm_in256_stats.npz")
REFERENCE_512 = ("VIRTUAL_imagenet512.npz",)
MAR_STEPS = 256  # of all published results, four times as many as samples need to look well


@dataclasses.dataclass(frozen=True)
class PublishedResult:
    """Holds metrics that authors report, and the settings that they were measured with.

    Attributes:
        weights: name of the released model in `varjax.convert.pretrained.RELEASES`.
        metrics: published values by key, as in `varjax.metrics.report.ROWS`.
        options: values of all sampling options.
        references: names of files with the reference's statistics.
    """

    weights: str
    metrics: Mapping[str, float]
    options: VAROptions | MAROptions
    references: tuple[str, ...] = REFERENCE_256


def _var(depth: int, fid: float, references: tuple[str, ...] = REFERENCE_256) -> PublishedResult:
    options = VAROptions(guidance=2.5, top_k=900, top_p=0.96)
    return PublishedResult(f"var_d{depth}", {"fid": fid}, options, references)


def _mar(size: str, guidance: float, temperature: float, **metrics: float) -> PublishedResult:
    options = MAROptions(guidance=guidance, temperature=temperature, steps=MAR_STEPS)
    return PublishedResult(f"mar_{size}", metrics, options)


# VAR: arXiv 2404.02905, its first version. MAR: arXiv 2406.11838, with and without guidance.
RESULTS = (
    _var(16, 3.55),
    _var(20, 2.95),
    _var(24, 2.33),
    _var(30, 1.97),
    _var(36, 2.63, REFERENCE_512),
    _mar("b", 2.9, 1.0, fid=2.31, inception_score=281.7),
    _mar("l", 3.0, 1.0, fid=1.78, inception_score=296.0),
    _mar("h", 3.2, 1.0, fid=1.55, inception_score=303.7),
    _mar("b", 1.0, 0.95, fid=3.48),
    _mar("l", 1.0, 0.95, fid=2.60),
    _mar("h", 1.0, 0.95, fid=2.35),
)


@dataclasses.dataclass(frozen=True)
class Measurement:
    """Describes how samples of a model were measured, as far as a published result fixes it.

    Attributes:
        location: location of the weights.
        config: config of the transformer.
        options: sampling options used.
        count: number of samples of each class.
        reference: reference as given on the command line.
        features: name of the feature network.
    """

    location: str
    config: Any
    options: Any
    count: int
    reference: str
    features: str


def compare_settings(measurement: Measurement) -> tuple[PublishedResult | None, list[str]]:
    """Finds the published result that is nearest in its settings, and what differs.

    Returns:
        (None, []) for a model that has not the sizes of a released one. A result is compared with a
        measurement only where nothing differs.
    """
    name = released_sizes(measurement.config)
    results = [result for result in RESULTS if result.weights == name]
    if not results:
        return None, []
    weights = _weights_differ(measurement.location, results[0].weights)
    pairs = [(result, weights + _differences(measurement, result)) for result in results]
    return min(pairs, key=lambda pair: len(pair[1]))


def evaluation_options(config: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `given` sampling options, with the published steps of a released MAR by default."""
    name = released_sizes(config) or ""
    return ({"steps": MAR_STEPS} if name.startswith("mar_") else {}) | dict(given)


def released_sizes(config: Any) -> str | None:
    """Returns the name of the released model of these sizes, whatever its weights are, or None."""
    for name in dict.fromkeys(result.weights for result in RESULTS):
        kind, _, size = name.partition("_")
        preset = VARConfig.preset(size) if kind == "var" else MARConfig.preset(name)
        family = ("depth", "scales") if kind == "var" else ("encoder_depth", "head", "latent_map")
        compared = "width", "classes", *family
        if type(config) is type(preset) and all(
            getattr(config, field) == getattr(preset, field) for field in compared
        ):
            return name
    return None


def _weights_differ(location: str | pathlib.Path, name: str) -> list[str]:
    """Returns how weights differ from the released ones, whose files are known by SHA-256."""
    config, release = open_model(location).config, RELEASES[name]
    files = list(release.files.values())
    if unknown := [file for file in files if file not in release.sha256]:
        return [f"the SHA-256 of the published {unknown[0]} of {name} is not known"]
    if not {release.sha256[file] for file in files} <= set(config.get("sources", {}).values()):
        return [f"{location} is not made of the published files of {name}, by their SHA-256"]
    if options := config.get(CONVERT_OPTIONS):
        return [f"{location} was converted with options of its own, {', '.join(options)}"]
    return []


def _differences(measurement: Measurement, result: PublishedResult) -> list[str]:
    lines = []
    for field in dataclasses.fields(result.options):
        found = getattr(measurement.options, field.name)
        published = getattr(result.options, field.name)
        if found != published:
            lines.append(f"{field.name} is {found}, published {published}")
    if measurement.count != COUNT:
        lines.append(f"{measurement.count} samples of each class, published {COUNT}")
    if pathlib.PurePath(measurement.reference).name not in result.references:
        lines.append(f"the reference is {measurement.reference}, published {result.references[0]}")
    if measurement.features != INCEPTION:
        lines.append(f"features are {measurement.features}, published {INCEPTION}")
    return lines
