"""Finds published models by name, and downloads and converts them into a cache at first use.

    directory = resolve_weights("var_d16")  # ~/.cache/varjax/var_d16

The names are those in RELEASES of `varjax.convert.name_maps`. The cache folder is $VARJAX_CACHE,
otherwise varjax in $XDG_CACHE_HOME or ~/.cache. A folder in it is complete or absent.

Files are downloaded at a fixed commit if one is known, and converted only if their SHA-256 is the
known one. If no SHA-256 is known, that of the first download is recorded in the cache's folder
"downloads", and later downloads must match it.
"""

import os
import pathlib
import re
import shlex
import sys

from varjax.checkpoints.weights import split_step
from varjax.convert.from_torch import convert
from varjax.convert.name_maps import RELEASES
from varjax.convert.name_maps.release import PublishedFile
from varjax.convert.weights_dir import sha256_of
from varjax.errors import InputError, did_you_mean, needs_extra
from varjax.storage import files, folders
from varjax.storage.buckets import as_path
from varjax.storage.cache_dir import cache_folder
from varjax.storage.untrusted import path_inside

COMMIT = re.compile("[0-9a-f]{40}")


def resolve_weights(location: str | os.PathLike) -> pathlib.Path:
    """Finds weights: a path that exists, otherwise the published model of that name.

    Several processes may call this at once: the first one downloads and converts, the others wait.
    They use a lock file instead of a collective operation, because processes on different machines
    may have different caches.

    Args:
        location: a path or a name in RELEASES. A path that does not exist is returned unchanged,
            because its reader raises a clearer error.

    Raises:
        InputError: the name is only similar to that of a published model, or the model could not be
            downloaded, converted or stored. The message names the files to download and the command
            that converts them.
    """
    path = as_path(location)
    if files.exists(path) or split_step(location)[1] is not None:  # RUN@STEP is no published model
        return path
    if str(location) not in RELEASES:
        if hint := did_you_mean(str(location), RELEASES):
            raise InputError(
                f"{location} does not exist, and no published model has this name{hint}"
            )
        return path
    directory = cache_folder() / path
    if files.exists(directory):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(
            f"{directory.parent} cannot be written ({error}); set VARJAX_CACHE to another folder"
        ) from error
    with folders.lock_folder(directory.parent, wait=True):
        if not directory.exists():
            _fetch(str(location), directory)
    return directory


def download(repo: str, name: str, revision: str | None = None) -> pathlib.Path:
    """Downloads a file from the Hugging Face Hub, unless the Hub's cache has it already.

    Args:
        repo: name of the repository, such as "FoundationVision/var".
        name: name of the file in the repository.
        revision: branch, tag or commit; a commit always gives the same file. None for the revision
            of the file or its repository in RELEASES, otherwise "main".

    Returns:
        Path of the local copy in the cache of huggingface_hub.

    Raises:
        InputError: the file differs from the one known at this commit, or cannot be downloaded.
    """
    known = [
        file
        for release in RELEASES.values()
        for file in release.files.values()
        if file.repo == repo
    ]
    same = [file for file in known if file.name == name]
    revision = revision or next((file.revision for file in same + known), "main")
    try:
        path = _hub_file(repo, name, revision)
    except InputError as error:
        raise InputError(
            f"{error}; check the names and the network, or download {name} by hand from "
            f"https://huggingface.co/{repo}"
        ) from error
    pinned = [file for file in same if file.revision == revision]
    if pinned or COMMIT.fullmatch(revision):  # the file at any other revision may change
        sha256 = pinned[0].sha256 if pinned else None
        _check_digest(path, PublishedFile(name, repo, revision, sha256))
    return path


def _check_digest(path: pathlib.Path, file: PublishedFile) -> None:
    """Raises InputError if the SHA-256 is not the known one or that of the first download."""
    repo, revision, name = file.repo, file.revision, file.name
    (digest,) = sha256_of([path]).values()
    record = path_inside(cache_folder() / "downloads", f"{repo}/{revision}/{name}.json", "the Hub")
    expected, origin = file.sha256, "which is known for this file"
    if expected is None and not files.create_json(record, {"sha256": digest}):
        expected, origin = files.read_json(record).get("sha256"), f"recorded in {record}"
    if expected not in (None, digest):
        raise InputError(
            f"{name} of https://huggingface.co/{repo} at {revision} has SHA-256\n  {digest}\n"
            f"instead of\n  {expected}\n{origin}, so it was damaged or replaced and is not "
            f"converted. Delete {os.path.realpath(path)} and try again"
        )


def _hub_file(repo: str, name: str, revision: str) -> pathlib.Path:
    with needs_extra("hub", "huggingface_hub", f"downloading {name}"):
        from huggingface_hub import hf_hub_download  # pyright: ignore[reportMissingImports]
    try:
        return pathlib.Path(hf_hub_download(repo, name, revision=revision))
    except Exception as error:  # including errors of the HTTP library
        reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise InputError(
            f"{name} could not be downloaded from {repo} at revision {revision} ({reason})"
        ) from error


def _fetch(name: str, directory: pathlib.Path) -> None:
    """Downloads and converts a published model into `directory`."""
    release = RELEASES[name]
    try:
        if any(file.repo is None for file in release.files.values()):
            raise InputError("no hub hosts its files")
        print(f"{name}: from {release.hubs} to {directory}", file=sys.stderr)
        sources = {
            flag: _hub_file(str(file.repo), file.name, file.revision)
            for flag, file in release.files.items()
        }
    except InputError as error:
        flags = " ".join(f"--{flag}={file.basename}" for flag, file in release.files.items())
        names = " and ".join(file.name for file in release.files.values())
        raise InputError(
            f"{name} is neither a path nor in {directory.parent}, and {error}. To convert it "
            f"yourself, download {names} from {release.page or release.hubs} and run\n"
            f"  varjax convert {flags} --out={shlex.quote(str(directory))}"
        ) from error
    for flag, path in sources.items():
        _check_digest(path, release.files[flag])
    convert(directory, options=None, ema=None, **sources)
