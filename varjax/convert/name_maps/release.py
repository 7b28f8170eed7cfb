"""Defines the records that describe published weights: their files, results and license."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

# ADM's statistics of ImageNet's training set, and MAR's copy of them. Their digests have not been
# published, so the file is recognized by its name.
REFERENCE_256 = ("VIRTUAL_imagenet256_labeled.npz", "adm_in256_stats.npz")
REFERENCE_512 = ("VIRTUAL_imagenet512.npz",)


@dataclasses.dataclass(frozen=True)
class PublishedFile:
    """Names a published file of weights.

    Attributes:
        name: path of the file in the repository.
        repo: repository on the Hugging Face Hub; None if no hub has the file.
        commit: commit of the repository, because branches move. None if no commit is known. The
            file is then taken from the branch "main", and must not change after the first download.
        sha256: known SHA-256 of the file at that commit; None if it is not known.
    """

    name: str
    repo: str | None = None
    commit: str | None = None
    sha256: str | None = None

    @property
    def revision(self) -> str:
        """The revision of the repository to download."""
        return self.commit or "main"

    @property
    def basename(self) -> str:
        """The name of the file without the folders of the repository."""
        return pathlib.PurePosixPath(self.name).name


@dataclasses.dataclass(frozen=True)
class PublishedResult:
    """Holds metrics that authors report, and the settings that they were measured with.

    Attributes:
        metrics: published values by key, as in `varjax.metrics.report.ROWS`.
        options: values of all sampling options.
        references: names of files with the reference's statistics.
        caveat: reason why the result cannot be compared with a measurement; "" if it can.
    """

    metrics: Mapping[str, float]
    options: Any
    references: tuple[str, ...] = REFERENCE_256
    caveat: str = ""


@dataclasses.dataclass(frozen=True)
class Release:
    """Names published checkpoints that together make one directory of weights.

    Attributes:
        files: each file, by the flag that takes it: {"tokenizer": …, "var": …}.
        license: license of the weights, according to the authors' page.
        page: page for downloading the files by hand, if they are not in the repositories.
        config: config of the transformer; None for a tokenizer.
        results: metrics that the authors report.
        sampling: default sampling options of these weights; None for those of the kind of model.
        evaluation_options: sampling options of all results that differ from the defaults.
    """

    files: Mapping[str, PublishedFile]
    license: str
    page: str = ""
    config: Any = None
    results: tuple[PublishedResult, ...] = ()
    sampling: Any = None
    evaluation_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def hubs(self) -> str:
        """The addresses of the repositories that have the files."""
        repos = dict.fromkeys(file.repo for file in self.files.values())
        return " and ".join(f"https://huggingface.co/{repo}" for repo in repos)
