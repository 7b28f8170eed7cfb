"""Measures samples, of a file or drawn from a model on the way, against a reference."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import varjax
from varjax.core import files
from varjax.core.errors import InputError
from varjax.data.sources import CachedLatents, parse_dataset
from varjax.mar.model import MARConfig
from varjax.metrics.feature_store import FeatureStore, extract_features, parts_of
from varjax.metrics.features import FeatureExtractor, FeatureNetwork, feature_sizes
from varjax.metrics.image_sets import DatasetImages, FolderImages, ImageSet
from varjax.metrics.references import Reference, read_reference, reference_of_images
from varjax.metrics.report import Measured, measure, metrics_table
from varjax.sampling.job import SamplingJob, run_job
from varjax.sampling.sampler import Sampler
from varjax.var.model import VARConfig

# What the authors report of released models, at 50 samples a class, against the statistics of
# ImageNet's training set (ADM's files). VAR: arXiv 2404.02905, its first version, cfg 1.5, top-k
# 900, top-p 0.96; MAR: arXiv 2406.11838, 256 steps.
PUBLISHED: dict[str, dict[str, float]] = {
    "var_d16": {"fid": 3.55},
    "var_d20": {"fid": 2.95},
    "var_d24": {"fid": 2.33},
    "var_d30": {"fid": 1.97},
    "var_d36": {"fid": 2.63},
    "mar_b": {"fid": 2.31, "inception_score": 281.7},
    "mar_l": {"fid": 1.78, "inception_score": 296.0},
    "mar_h": {"fid": 1.55, "inception_score": 303.7},
}
DATASETS = "folder:", "tfds:", "digits", "photos"  # what a reference may be besides files
LEAST_SAMPLES = 2


@dataclasses.dataclass(frozen=True, eq=False)
class Measuring:
    """What all evaluations of a command share.

    Attributes:
        network: makes features.
        reference: an .npz, a folder, or a dataset as `parse_dataset` names it, whose images are
            then cropped to the samples' size.
        split: of that dataset.
        cache: folder for statistics of references.
    """

    network: FeatureNetwork
    reference: str
    split: str
    cache: pathlib.Path


class FeatureOutput:
    """Takes the images of a sampling job and keeps their features alone (an `Output`)."""

    def __init__(self, folder: pathlib.Path, request: Mapping[str, Any], extract: FeatureExtractor):
        self._folder, self._request, self._extract = folder, request, extract
        self.store: FeatureStore

    def begin(self, write: bool) -> None:
        self.store = FeatureStore(self._folder, self._request, write)

    def has(self, part: range) -> bool:
        return self.store.has(part)

    def add(self, part: range, images_NHWC: np.ndarray) -> None:
        self.store.add(part, self._extract(images_NHWC))

    def finish(self) -> str:
        return ""


def evaluate_images(measuring: Measuring, images: ImageSet, name: str, out: pathlib.Path) -> dict:
    """Measures a set of images, and writes and returns the report.

    Goes on where a killed one was; a report that is there already is returned.

    Args:
        measuring: how.
        images: the samples, in the order in which they are scored.
        name: of the samples, for the report.
        out: the report's file; features lie beside it until it is written.

    Raises:
        InputError: `out` holds another report, or samples and reference do not fit.
    """
    if images.shape[0] < LEAST_SAMPLES:
        raise InputError(f"{name} holds {images.shape[0]} images; two or more are needed")
    request = {"samples": name, "images": images.digest, "count": images.shape[0]}
    request |= _settings(measuring)
    if (done := finished_report(out, request)) is not None:
        return done
    extract = FeatureExtractor(measuring.network)
    reference = _read_reference(measuring, extract, images.shape[1:])
    store = FeatureStore(_parts_folder(out), request)
    extract_features(images, extract, store, "samples")
    features = store.join(parts_of(images.shape[0]))
    measured = measure(features, reference, images.label_N)
    if isinstance(images, FolderImages) and images.lossy:
        notice = "some samples are JPEG, which changes FID; keep PNG or .npz"
        measured.notices.append(notice)
    return _write_report(out, request, measured, reference, store, images.shape[0])


def evaluate_model(
    measuring: Measuring, model: Sampler, job: SamplingJob, out: pathlib.Path
) -> dict:
    """Draws samples from a model and measures them; else like `evaluate_images`.

    All devices and processes draw; the first process measures, and writes the report.
    """
    if len(job.label_N) < LEAST_SAMPLES:
        raise InputError(f"{len(job.label_N)} samples are asked for; two or more are needed")
    request = json.loads(json.dumps(job.request(model) | _settings(measuring)))
    if (done := finished_report(out, request)) is not None:
        return done
    extract, first = FeatureExtractor(measuring.network), jax.process_index() == 0
    reference = _read_reference(measuring, extract, model.image_shape) if first else None
    output = FeatureOutput(_parts_folder(out), request, extract)
    run_job(model, job, output)
    if reference is None:
        return {}
    order_N = np.random.default_rng(job.seed).permutation(len(job.label_N))  # as in an .npz
    features = {n: x[order_N] for n, x in output.store.join(list(job.parts)).items()}
    measured = measure(features, reference, job.label_N[order_N])
    name = published_model(_config_of(model))
    return _write_report(out, request, measured, reference, output.store, len(job.label_N), name)


def finished_report(out: pathlib.Path, request: Mapping[str, Any]) -> dict | None:
    """Returns the report at `out`; None where there is none yet.

    Raises InputError where it is of another request, or no report.
    """
    if not out.exists():
        return None
    report = files.read_json(out)
    if not isinstance(report, dict) or "request" not in report:
        raise InputError(f"{out} exists and is no report; delete it or choose another out")
    files.check_same_request(out, report["request"], request)
    return report


def print_report(report: dict) -> None:
    """Prints a report as a table."""
    if not report:
        return
    measured = Measured(report["metrics"], report["left_out"], report["notices"])
    name = report["published_model"]
    count, of = report["images"], report["reference_images"]
    against = f"{of:,} images" if of else "statistics"
    print(f"\n{count:,} samples against {against} of {report['request']['reference']}")
    print(metrics_table(measured, PUBLISHED.get(name or ""), name or ""))


def published_model(config: Any) -> str | None:
    """Returns the name of the released model of these sizes; None where there is none."""
    for name in PUBLISHED:
        kind, _, size = name.partition("_")
        preset = VARConfig.preset(size) if kind == "var" else MARConfig.preset(name)
        compared = "width", "classes", *(("scales",) if kind == "var" else ("head", "latent_map"))
        if type(config) is type(preset) and all(
            getattr(config, field) == getattr(preset, field) for field in compared
        ):
            return name
    return None


def _settings(measuring: Measuring) -> dict[str, Any]:
    """What the metrics depend on besides the samples."""
    reference: dict[str, Any] = {"reference": measuring.reference}
    if measuring.reference.startswith(DATASETS):
        reference["split"] = measuring.split
    return reference | measuring.network.identity


def _parts_folder(out: pathlib.Path) -> pathlib.Path:
    return out.with_name(f".{out.name}.parts")


def _read_reference(
    measuring: Measuring, extract: FeatureExtractor, image_shape: tuple[int, ...]
) -> Reference:
    text = measuring.reference
    if text.startswith(DATASETS) and not pathlib.Path(text).exists():
        images = dataset_images(text, measuring.split, image_shape)
        return reference_of_images(images, extract, measuring.cache)
    sizes = feature_sizes(extract.network, image_shape)
    return read_reference(text, extract, measuring.cache, sizes)


def dataset_images(text: str, split: str, image_shape: tuple[int, ...]) -> ImageSet:
    """Opens a split of a dataset with images of a size; InputError as `parse_dataset`."""
    H, W, channels = image_shape
    data = parse_dataset(text, (H, W), channels)
    if isinstance(data, CachedLatents):
        raise InputError(f"reference={text} holds latents; give images")
    return DatasetImages(data, split)


def _config_of(model: Sampler) -> Any:
    """The transformer's config, by which a released model is known."""
    configs = getattr(model, "config", {})
    return next((config for name, config in configs.items() if name != "tokenizer"), None)


def _write_report(
    out: pathlib.Path,
    request: Mapping[str, Any],
    measured: Measured,
    reference: Reference,
    store: FeatureStore,
    images: int,
    name: str | None = None,
) -> dict:
    report = {
        **measured.metrics,
        "images": images,
        "reference_images": reference.images,
        "reference_digest": reference.digest,
        "left_out": measured.left_out,
        "notices": measured.notices,
        "metrics": measured.metrics,
        "published_model": name,
        "request": dict(request),
        "versions": {"varjax": varjax.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
    files.write_json(out, report)
    store.delete()
    return report
