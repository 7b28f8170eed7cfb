"""Compares measurements with published results, if the settings match."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from varjax.convert.name_maps import NAME_MAPS, RELEASES, name_map_of
from varjax.convert.name_maps.release import PublishedResult
from varjax.convert.weights_dir import CONVERT_OPTIONS
from varjax.metrics.features import INCEPTION
from varjax.models import open_model

COUNT = 50  # samples of each class


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
        accept: fraction of the samples that a classifier kept.
        companions: roles of other models that took part, such as "guide" and "refiner".
    """

    location: str
    config: Any
    options: Any
    count: int
    reference: str
    features: str
    accept: float = 1.0
    companions: tuple[str, ...] = ()


def compare_settings(measurement: Measurement) -> tuple[PublishedResult | None, list[str]]:
    """Finds the published result that is nearest in its settings, and what differs.

    Returns:
        (None, []) for a model that has not the sizes of a released one, or whose release has no
        results. A result is compared with a measurement only where nothing differs.
    """
    name = release_name(measurement.location, measurement.config)
    if name is None or not RELEASES[name].results:
        return None, []
    weights = _weights_differ(measurement.location, name)
    pairs = [(r, weights + _differences(measurement, r)) for r in RELEASES[name].results]
    return min(pairs, key=lambda pair: len(pair[1]))


def evaluation_options(config: Any, chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `chosen` sampling options; those left out are as published for this model's size."""
    name = released_sizes(config)
    return (dict(RELEASES[name].evaluation_options) if name else {}) | dict(chosen)


def release_name(location: str | pathlib.Path, config: Any) -> str | None:
    """Returns the name of the released model that a directory says it holds, else of its sizes."""
    sizes = released_sizes(config)
    named = open_model(location).config.get("release") if sizes else None
    if named in RELEASES and name_map_of(config).same_sizes(RELEASES[named].config, config):
        return named
    return sizes


def released_sizes(config: Any) -> str | None:
    """Returns the name of the released model of these sizes, whatever its weights are, or None."""
    for kind in NAME_MAPS:
        for name, release in kind.releases.items():
            if config is not None and kind.same_sizes(config, release.config):
                return name
    return None


def _weights_differ(location: str | pathlib.Path, name: str) -> list[str]:
    """Returns the differences between weights and the released ones, by the files' SHA-256."""
    config, release = open_model(location).config, RELEASES[name]
    files = release.files.values()
    if unknown := [file.basename for file in files if file.sha256 is None]:
        return [f"the SHA-256 of the published {unknown[0]} of {name} is not known"]
    if not {file.sha256 for file in files} <= set(config.get("sources", {}).values()):
        return [f"{location} was not made from the published files of {name}, by their SHA-256"]
    if options := config.get(CONVERT_OPTIONS):
        return [
            f"{location} was converted with options other than the defaults: {', '.join(options)}"
        ]
    return []


def _differences(measurement: Measurement, result: PublishedResult) -> list[str]:
    lines = [result.caveat] if result.caveat else []
    for field in dataclasses.fields(result.options):
        found = getattr(measurement.options, field.name)
        published = getattr(result.options, field.name)
        if found != published:
            lines.append(f"{field.name} is {found}, published {published}")
    if measurement.count != COUNT:
        lines.append(f"{measurement.count} samples of each class, published {COUNT}")
    if pathlib.PurePath(measurement.reference).name not in result.references:
        lines.append(f"the reference is {measurement.reference}, published {result.references[0]}")
    if measurement.companions and not result.caveat:  # which is about the pair
        lines.append(f"a {' and a '.join(measurement.companions)} took part, published none")
    if measurement.accept != 1:
        lines.append(f"a classifier kept {measurement.accept} of the samples, published all")
    if measurement.features != INCEPTION:
        lines.append(f"features are {measurement.features}, published {INCEPTION}")
    return lines
