"""Measures samples, from a file or drawn from a model, against a reference."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

import varjax
from varjax.errors import InputError, StorageError
from varjax.evaluation.image_crop import describe_crop
from varjax.evaluation.published import Measurement, compare_settings, release_name
from varjax.evaluation.references import (
    EvaluationSettings,
    measure_real_images,
    real_images_of,
    reference_of,
)
from varjax.metrics.classifier import Classifier
from varjax.metrics.features import (
    FeatureArrays,
    FeatureExtractor,
    FeatureStore,
    extract_features,
)
from varjax.metrics.image_sets import FolderImages, ImageSet, parts_of
from varjax.metrics.references import Reference
from varjax.metrics.report import SampleMetrics, measure, metrics_table
from varjax.runtime.distributed import on_first_process
from varjax.sampling.job import SamplingJob, locked_for_job, run_job
from varjax.sampling.outputs import begun_batch_size, parts_folder
from varjax.sampling.rejection import RejectionSummary, best_candidates, summarize_rejection
from varjax.sampling.sampler import Sampler
from varjax.storage import files, folders
from varjax.storage.folders import locked_work_folder

LEAST_SAMPLES = 2
COMPANIONS = "guide", "refiner"  # attributes of a pipeline: models that help it to sample
REPORT_FIELDS = {"metrics", "left_out", "notices"}


class FeatureOutput:
    """Keeps only the features of a sampling job's images (an `Output`).

    Args:
        folder: folder of the features; see `FeatureStore`.
        request: JSON data that determine the features.
        extract: extractor of the features.
        job: job that draws the images.
        classifier: classifier of the images, whose probabilities are kept as "probability_N"; None
            for none.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        request: Mapping[str, Any],
        extract: FeatureExtractor,
        job: SamplingJob,
        classifier: Classifier | None,
    ):
        self._folder, self._request, self._extract = folder, request, extract
        self._job, self._classifier = job, classifier
        self.store: FeatureStore

    def begin(self, write: bool) -> None:
        self.store = FeatureStore(self._folder, self._request, write)

    def has(self, part: range) -> bool:
        return self.store.has(part)

    def add(self, part: range, images_NHWC: np.ndarray) -> None:
        features = self._extract(images_NHWC)
        if self._classifier is not None:
            label_N = self._job.label_M[part]
            features["probability_N"] = self._classifier.probabilities(images_NHWC, label_N)
        self.store.add(part, features)

    def finish(self) -> str:
        return ""

    def features_of(self, job: SamplingJob) -> tuple[FeatureArrays, RejectionSummary | None]:
        """Reads the features of the images that a job keeps, and a summary of the choice.

        Args:
            job: job whose candidates are among those of the job that drew them.
        """
        parts, m = list(self._job.parts), self._job.candidates
        if self._classifier is None:
            return self.store.join(parts), None
        probability_M = np.concatenate([self.store.read(part)["probability_N"] for part in parts])
        probability_Pm = probability_M.reshape(-1, m)[:, : job.candidates]
        kept_Pn = best_candidates(probability_Pm, job.count)
        keep_M = np.zeros(len(probability_M), bool)
        keep_M[(np.arange(len(kept_Pn))[:, None] * m + kept_Pn).reshape(-1)] = True
        features = self.store.join(parts, keep_M)
        del features["probability_N"]
        return features, summarize_rejection(job, probability_Pm, kept_Pn)


def evaluate_images(
    settings: EvaluationSettings, images: ImageSet, name: str, out: pathlib.Path
) -> dict[str, Any]:
    """Measures a set of images, and writes and returns the report.

    Continues an interrupted evaluation. If the report exists already, it is returned.

    Args:
        settings: settings of the evaluation.
        images: samples, in the order in which they are scored.
        name: name of the samples, for the report.
        out: path of the report; features are kept next to it until it is written.

    Raises:
        InputError: `out` holds another report, or the samples do not fit the reference.
    """
    if images.shape[0] < LEAST_SAMPLES:
        raise InputError(f"{name} has {images.shape[0]} images; two or more are needed")
    samples = {"images": images.digest, **settings.extract.network.identity}
    check_samples_of_report(out, samples)
    # Opened before any long work, because the dataset may lack that split.
    real_images_of(settings, images.shape[1:], images.shape[0])
    reference = reference_of(settings, images.shape[1:])
    request = {"samples": samples, "reference": reference.digest}
    if (done := finished_report(out, request)) is not None:
        return done
    real = measure_real_images(settings, images.shape[1:], images.shape[0])
    with locked_work_folder(parts_folder(out)):
        store = FeatureStore(parts_folder(out), samples)
        extract_features(images, settings.extract, store, "samples")
        features = store.join(parts_of(images.shape[0]))
        classes = settings.extract.network.classes
        measured = measure(features, reference, images.label_N, logit_classes=classes)
        if isinstance(images, FolderImages) and images.lossy:
            measured.notices.append("some samples are JPEG, which changes FID; keep PNG or .npz")
        about = _about(settings, reference, real, name, images.shape[0])
        report = _write_report(out, request, measured, about)
        store.delete()
        return report


def evaluate_model(
    settings: EvaluationSettings,
    model: Sampler,
    name: str,
    jobs: Mapping[pathlib.Path, SamplingJob],
    classifier: Classifier | None = None,
) -> list[dict[str, Any]]:
    """Draws samples from a model and measures them, otherwise like `evaluate_images`.

    All devices and processes draw. The first process measures and writes the reports.

    Args:
        settings: settings of the evaluation.
        model: model that samples.
        name: location of the model, for the reports.
        jobs: job for each path of a report. They differ only in their acceptances, and share the
            candidates of the job with the lowest one.
        classifier: classifier that chooses among the candidates; None to keep all images.

    Returns:
        A report for each job.
    """
    network = settings.extract.network.identity
    samples = {}
    for out, job in jobs.items():
        if len(job.label_N) < LEAST_SAMPLES:
            raise InputError(f"{len(job.label_N)} samples are requested; two or more are needed")
        drawn = job.request(model)
        assert not drawn.keys() & network.keys()
        samples[out] = json.loads(json.dumps(drawn | network))
    reference: Reference
    real: dict[str, Any] | None = None
    image_shape, count = tuple(model.image_shape), len(next(iter(jobs.values())).label_N)

    def begin() -> list[dict[str, Any] | None]:
        nonlocal reference
        nonlocal real
        for out in jobs:
            check_samples_of_report(out, samples[out])
        # Opened before any long work, because the dataset may lack that split.
        real_images_of(settings, image_shape, count)
        reference = reference_of(settings, image_shape)
        finished = [
            finished_report(out, {"samples": samples[out], "reference": reference.digest})
            for out in jobs
        ]
        if None in finished:  # measured before any long work, because it may fail
            real = measure_real_images(settings, image_shape, count)
        return finished

    reports = dict(zip(jobs, on_first_process(begin), strict=True))
    missing = [out for out, report in reports.items() if report is None]
    if not missing:
        return list(reports.values())
    # Its report is the last one, so that features are kept until all reports are written.
    missing.sort(key=lambda out: -jobs[out].accept)
    folder, largest = parts_folder(missing[-1]), jobs[missing[-1]]
    output = FeatureOutput(folder, samples[missing[-1]], settings.extract, largest, classifier)

    def finish() -> list[dict[str, Any]]:
        written = []
        for out in missing:
            job = jobs[out]
            features, rejection = output.features_of(job)
            order_N = np.random.default_rng(job.seed).permutation(len(job.label_N))  # as in an .npz
            features = {name: x[order_N] for name, x in features.items()}
            measured = measure(
                features,
                reference,
                job.label_N[order_N],
                model.classes,
                settings.extract.network.classes,
            )
            about = _about(settings, reference, real, name, len(job.label_N))
            about["published"] = _published(settings, model, name, job)
            if rejection is not None:
                about["rejection"] = rejection._asdict()
            request = {"samples": samples[out], "reference": reference.digest}
            written.append(_write_report(out, request, measured, about))
        output.store.delete()
        return written

    with locked_for_job(lambda: folder):
        run_job(model, largest, output)
        reports |= zip(missing, on_first_process(finish), strict=True)
    return list(reports.values())


def begun_batch_size_of_report(out: pathlib.Path) -> int | None:
    """Returns the batch size that a report's samples were begun with; None if none were."""
    if not out.exists():
        return begun_batch_size(parts_folder(out))
    try:
        return files.read_json(out)["request"]["samples"].get("batch_size")
    except (InputError, OSError, KeyError, TypeError, AttributeError):
        return None  # not a report; `finished_report` refuses it


def finished_report(out: pathlib.Path, request: Mapping[str, Any]) -> dict | None:
    """Returns the report at `out`, or None if it does not exist yet.

    Raises InputError if the file is another request's report, or not a report.
    """
    if (report := _read_report(out)) is not None:
        folders.check_same_request(out, report["request"], request)
    return report


def check_samples_of_report(out: pathlib.Path, samples: Mapping[str, Any]) -> None:
    """Checks a report at `out` as far as that is possible before the reference is measured.

    Raises InputError if the file is not a report, or that of other samples.
    """
    if (report := _read_report(out)) is not None:
        existing = {"samples": report["request"].get("samples")}
        folders.check_same_request(out, existing, {"samples": samples})


def _read_report(out: pathlib.Path) -> dict[str, Any] | None:
    """Reads the report at `out`; None if there is no file. Raises InputError if it is not one."""
    if not out.exists():
        return None
    no_report = f"{out} exists and is not a report; delete it or choose another out"
    try:
        report = files.read_json(out)
    except StorageError:
        raise
    except InputError as error:
        raise InputError(no_report) from error
    if not isinstance(report.get("request"), dict) or not report.keys() >= REPORT_FIELDS:
        raise InputError(no_report)
    return report


def print_report(report: Mapping[str, Any]) -> None:
    """Prints a report as a table."""
    measured = SampleMetrics(report["metrics"], report["left_out"], report["notices"])
    published = report.get("published")
    count, reference_count = report["images"], report["reference_images"]
    kind = f"{reference_count:,} images" if reference_count else "statistics"
    print(f"\n{count:,} samples of {report['name']} against {kind} of {report['reference']}")
    if rejection := report.get("rejection"):
        print(RejectionSummary(**rejection))
    if crop := report.get("reference_crop"):
        print(f"the reference is {crop}")
    if real := report.get("real"):
        print(f"real: {real['images']:,} {real['split']} images of {report['reference']}")
    if published and not published["differences"]:
        print(metrics_table(measured, published["metrics"], published["weights"]))
        return
    print(metrics_table(measured, real=real["metrics"] if real else None))
    if published:
        lines = "\n  ".join(published["differences"])
        name = published["weights"]
        print(f"note: no published value of {name} is shown, because these differ:\n  {lines}")


def transformer_config(model: Sampler) -> Any:
    """Returns the transformer's config, which identifies a released model; None without one."""
    configs = getattr(model, "config", {})
    return next((config for name, config in configs.items() if name != "tokenizer"), None)


def _published(
    settings: EvaluationSettings, model: Sampler, name: str, job: SamplingJob
) -> dict[str, Any] | None:
    """Returns the published values of the model, or the differences, as JSON data."""
    measurement = Measurement(
        name,
        transformer_config(model),
        job.options,
        job.count,
        settings.reference,
        settings.extract.network.identity["features"],
        job.accept,
        tuple(role for role in COMPANIONS if getattr(model, role, None) is not None),
    )
    result, differences = compare_settings(measurement)
    if result is None:
        return None
    metrics = {} if differences else dict(result.metrics)
    weights = release_name(name, measurement.config)
    return {"weights": weights, "metrics": metrics, "differences": differences}


def _about(
    settings: EvaluationSettings,
    reference: Reference,
    real: dict[str, Any] | None,
    name: str,
    images: int,
) -> dict[str, Any]:
    """Returns the part of a report that describes samples, reference and real images."""
    return {
        "name": name,
        "images": images,
        "reference": settings.reference,
        "reference_images": reference.images,
        "reference_crop": describe_crop(settings.reference, settings.crop),
        "features": settings.extract.network.identity["features"],
        "real": real,
        "published": None,
    }


def _write_report(
    out: pathlib.Path,
    request: Mapping[str, Any],
    measured: SampleMetrics,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    report = {
        **measured.metrics,
        **about,
        "left_out": measured.left_out,
        "notices": measured.notices,
        "metrics": measured.metrics,
        "request": dict(request),
        "versions": {"varjax": varjax.__version__, "jax": jax.__version__},
        "device": jax.devices()[0].device_kind,
    }
    files.write_json(out, report)
    return report
