"""Rejection sampling: draws extra images, and keeps those that a classifier ranks highest.

Razavi et al. 2019 (VQ-VAE-2, arXiv 1906.00446), section 3.3: images are ranked by the probability
that a classifier of real images gives to their class. Of the candidates of each label, those with
the highest probability are kept.
"""

import argparse
import functools
import os
import pathlib
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from varjax.config.numbers import finite_number, whole_number
from varjax.errors import InputError
from varjax.metrics.classifier import Classifier, LoadedClassifier, load_classifier
from varjax.runtime.distributed import on_all_processes, on_first_process
from varjax.sampling.job import SamplingJob, divided, run_job, sample_parts
from varjax.sampling.outputs import REQUEST, Output
from varjax.sampling.pipeline import checked_labels
from varjax.sampling.sampler import Sampler
from varjax.storage import files, folders
from varjax.storage.buckets import as_path
from varjax.storage.folders import remove_work_folder

BATCH_SIZE = 32  # of `sample_best`


def add_rejection_flags(parser: argparse.ArgumentParser) -> None:
    """Adds --accept and --classifier."""
    about = "fraction of each class's candidates that --classifier keeps, above 0 and at most 1"
    parser.add_argument("--accept", type=float, help=about)
    about = (
        "directory that varjax train-classifier or varjax convert --resnet wrote, or digits: "
        "chooses what --accept keeps"
    )
    parser.add_argument("--classifier", metavar="DIR", help=about)


def classifier_of_flags(
    flags: argparse.Namespace, swept: Sequence[float] = ()
) -> LoadedClassifier | None:
    """Loads the classifier that the flags name; None if they do not ask for rejection.

    Args:
        flags: flags that `add_rejection_flags` added.
        swept: acceptances of a sweep, in place of --accept.

    Raises:
        InputError: an acceptance out of range, one flag without the other, or no such classifier.
    """
    if flags.accept is not None:
        check_acceptance(flags.accept)
        if swept:
            raise InputError(f"accept={flags.accept} and a sweep of accept: give one of them")
    if (flags.accept is not None or bool(swept)) != (flags.classifier is not None):
        accept = flags.accept or ",".join(map(str, swept)) or None
        raise InputError(
            f"accept={accept}, classifier={flags.classifier}: give both; the classifier "
            "decides which fraction of the images is kept"
        )
    return None if flags.classifier is None else load_classifier(flags.classifier)


def check_acceptance(accept: Any) -> float:
    """Returns an acceptance as a float; raises InputError unless it is in (0, 1]."""
    return finite_number("accept", accept, 1e-6, 1, "above 0 (from 0.000001) and at most 1")


def check_classifier(classifier: LoadedClassifier, model: Sampler) -> None:
    """Raises InputError for a classifier whose classes or images differ from the model's."""
    if classifier.classes != model.classes:
        raise InputError(
            f"the classifier distinguishes {classifier.classes} classes, the model draws "
            f"{model.classes}; give a classifier of the model's classes"
        )
    if classifier.image_size not in (None, tuple(model.image_shape[:2])):
        sizes = ("{}x{}".format(*size[:2]) for size in (classifier.image_size, model.image_shape))
        raise InputError(
            "the classifier takes images of {} pixels, the model's have {}; give another "
            "classifier".format(*sizes)
        )
    if (channels := model.image_shape[2]) not in (1, 3):
        raise InputError(
            f"the model's images have {channels} channels; classifiers take 1 (gray) or 3 (RGB)"
        )


def best_candidates(probability_Pm: np.ndarray, count: int) -> np.ndarray:
    """Chooses the `count` candidates of each label with the highest probability.

    Args:
        probability_Pm: probability of each of m candidates of P labels.
        count: number of candidates to keep of each label.

    Returns:
        (P, count) numbers of candidates in ascending order. Ties keep the first.
    """
    order_Pm = np.argsort(-probability_Pm, axis=1, kind="stable")
    return np.sort(order_Pm[:, :count], axis=1)


class RejectionSummary(NamedTuple):
    """Summarizes what a classifier kept.

    Attributes:
        accept: fraction of the candidates that should be kept.
        candidates: number of images drawn.
        kept: number of images kept.
        mean_probability: mean probability of the label, of the images that are kept.
        mean_probability_of_candidates: mean probability of the label, of all candidates.
    """

    accept: float
    candidates: int
    kept: int
    mean_probability: float
    mean_probability_of_candidates: float

    def __str__(self) -> str:
        return (
            f"kept {self.kept:,} of {self.candidates:,} images, in which the classifier sees their "
            f"class with probability {self.mean_probability:.3f} "
            f"({self.mean_probability_of_candidates:.3f} before)"
        )


def summarize_rejection(
    job: SamplingJob, probability_Pm: np.ndarray, kept_Pn: np.ndarray
) -> RejectionSummary:
    """Summarizes a choice.

    Args:
        job: job that drew the candidates.
        probability_Pm: probability of each candidate.
        kept_Pn: numbers of the candidates that are kept, from `best_candidates`.
    """
    kept_probability_Pn = np.take_along_axis(probability_Pm, kept_Pn, axis=1)
    means = (float(np.mean(x, dtype=np.float64)) for x in (kept_probability_Pn, probability_Pm))
    return RejectionSummary(job.accept, probability_Pm.size, kept_Pn.size, *means)


class Candidates:
    """A folder with the candidates of a job and their probabilities (an `Output`).

    Of the images, only those are written that may still be kept: the best of their label among all
    candidates that this process knows. That is about count · (1 + ln(1 / accept)) of each label.

    Args:
        folder: folder that is absent, or was started for an equal request.
        job: job that draws the candidates.
        request: JSON data that the images depend on.
        classifier: classifier of the images.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        job: SamplingJob,
        request: dict[str, Any],
        classifier: Classifier,
    ):
        self._folder, self._job, self._request = folder, job, request
        self._classifier = classifier
        # Those that are not known yet rank below all others.
        self._probability_Pm = np.full((len(job.labels), job.candidates), -np.inf, np.float32)
        self._read = functools.lru_cache(1)(lambda path: files.read_tensors(path)[0])

    def begin(self, write: bool) -> None:
        folders.claim_folder(self._folder, REQUEST, self._request, write)

    def has(self, part: range) -> bool:
        if (found := folders.read_or_remove(self._file(part))) is None:
            return False
        self._probability_Pm.reshape(-1)[part] = found[0]["probability_n"]
        return True

    def add(self, part: range, images_NHWC: np.ndarray) -> None:
        label_n = self._job.label_M[part]
        probability_n = np.asarray(self._classifier.probabilities(images_NHWC, label_n), np.float32)
        if probability_n.shape != label_n.shape or not np.isfinite(probability_n).all():
            raise InputError(
                f"the classifier's probabilities have shape {probability_n.shape} and range from "
                f"{probability_n.min()} to {probability_n.max()}; expected {label_n.shape} finite "
                "numbers"
            )
        self._probability_Pm.reshape(-1)[part] = probability_n
        row_n = np.flatnonzero(np.isin(part, self._kept_positions(part)))
        content = {"probability_n": probability_n, "row_n": row_n, "image_NHWC": images_NHWC[row_n]}
        files.write_tensors(self._file(part), content, {})

    def finish(self) -> str:
        return ""

    def choose(self) -> tuple[np.ndarray, RejectionSummary]:
        """Chooses among all candidates, once they are drawn.

        Returns:
            (positions of the N candidates that are kept, in the job's order; what was kept).
        """
        for part in self._job.parts:
            self._probability_Pm.reshape(-1)[part] = self._read(self._file(part))["probability_n"]
        kept_Pn = best_candidates(self._probability_Pm, self._job.count)
        start_P1 = np.arange(len(kept_Pn))[:, None] * self._job.candidates
        return (start_P1 + kept_Pn).reshape(-1), summarize_rejection(
            self._job, self._probability_Pm, kept_Pn
        )

    def images(self, position_N: np.ndarray) -> np.ndarray:
        """Reads images (N, H, W, channels) that are kept; ascending positions are read fastest."""
        images = []
        for position in position_N:
            part = self._job.parts[position // self._job.batch_size]
            content = self._read(self._file(part))
            (row,) = np.flatnonzero(content["row_n"] == position - part.start)
            images.append(content["image_NHWC"][row])
        return np.stack(images)

    def _kept_positions(self, part: range) -> np.ndarray:
        """The positions that would be kept now, of the labels that a part holds."""
        m = self._job.candidates
        first, last = part.start // m, (part.stop - 1) // m
        kept_Pn = best_candidates(self._probability_Pm[first : last + 1], self._job.count)
        return np.arange(first, last + 1)[:, None] * m + kept_Pn

    def _file(self, part):
        return self._folder / f"{part.start:09d}.safetensors"


def candidates_folder(location: str | pathlib.Path) -> pathlib.Path:
    """Returns the folder next to an output that keeps candidates until the output is complete."""
    path = as_path(location)
    if path.name in ("", ".."):  # of the current folder, or another one without its name
        path = pathlib.Path(os.path.abspath(path))
    return path.parent / f".{path.name}.candidates"


def run_rejection_job(
    model: Sampler,
    job: SamplingJob,
    classifier: Classifier,
    output: Output,
    folder: pathlib.Path,
) -> str:
    """Draws the candidates, and writes those that are kept; otherwise like `run_job`.

    Args:
        model: model that samples.
        job: job with an acceptance.
        classifier: classifier that chooses.
        output: output of the images that are kept, numbered in the order of their candidates.
        folder: folder for the candidates, which is removed in the end.
    """
    process, processes = jax.process_index(), jax.process_count()
    on_first_process(lambda: output.begin(write=True))
    on_all_processes(lambda: output.begin(write=False) if process else None)
    mine = divided(len(job.label_N), job.batch_size)[process::processes]
    missing = [part for part in mine if not output.has(part)]
    summaries = []
    if any(on_all_processes(lambda: len(missing))):
        candidates = Candidates(folder, job, job.request(model), classifier)
        run_job(model, job, candidates)
        position_N, chosen = candidates.choose()
        summaries.append(str(chosen))
        for part in missing:
            output.add(part, candidates.images(position_N[part]))
        on_all_processes(lambda: None)  # waits until all parts are written

    def finish() -> str:
        message = output.finish()
        remove_work_folder(folder)
        return "; ".join([message, *summaries])

    message = on_first_process(finish)
    return message if process == 0 else ""


def sample_best(
    model: Sampler,
    classifier: Classifier,
    labels: Sequence[int],
    count: int = 4,
    accept: float = 0.1,
    seed: int = 0,
    **options: Any,
) -> tuple[np.ndarray, RejectionSummary]:
    """Draws count / accept images of each label, and keeps the best of them.

        images_NHWC, summary = sample_best(model, classifier, [207, 980], accept=0.1)

    Equal to what `varjax sample --accept=… --classifier=…` writes in batches of 32.

    Args:
        model: model that samples.
        classifier: any object with a method `probabilities(images, labels)`.
        labels: classes to draw.
        count: number of images to keep of each label.
        accept: fraction of the images to keep, in (0, 1].
        seed: random seed of all images.
        options: sampling options of the model.

    Returns:
        (images (labels · count, H, W, channels) uint8, ordered by label; what was kept).

    Raises:
        InputError: a label, number or option out of range, or an image that is NaN.
    """
    label_B = checked_labels(labels, model.classes)
    if label_B.ndim == 2 or (label_B == model.classes).any():
        raise InputError("rejection sampling takes single classes, no mixes of them or no class")
    if isinstance(classifier, LoadedClassifier):
        check_classifier(classifier, model)
    labels = tuple(label_B.tolist())
    whole_number("count", count, 1)
    job = SamplingJob(
        labels, count, seed, model.options(**options), BATCH_SIZE, check_acceptance(accept)
    )
    with tempfile.TemporaryDirectory() as folder:
        candidates = Candidates(pathlib.Path(folder), job, {}, classifier)
        for part, images_NHWC in sample_parts(model, job, job.parts):
            candidates.add(part, images_NHWC)
        position_N, chosen = candidates.choose()
        return candidates.images(position_N), chosen
