"""Writes directories of weights, completely or not at all, and never over other files."""

import contextlib
import hashlib
import pathlib
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping, Set
from typing import Any

from tqdm import tqdm

from varjax.config import config_tree
from varjax.convert.pth.write import write_pth
from varjax.errors import StorageError
from varjax.storage import files, folders, safetensors_io
from varjax.storage.safetensors_io import LazyArray, Tensor

CONVERT_OPTIONS = "convert_options"  # in config.json: the options that differ from the defaults
CHUNK_BYTES = 2**24
Contents = Mapping[str, Mapping[str, Tensor]]  # {name of a file: {name of a tensor: tensor}}


def write_converted(
    out: pathlib.Path,
    models: Mapping[str, tuple[Any, Mapping[str, Tensor]]],
    sources: Mapping[str, str],
    sampling: Any = None,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Writes a directory of weights that `varjax.load` reads.

    Args:
        out: directory to write; see `new_directory`.
        models: config and parameters by path of each part: "tokenizer", "var", "mar".
        sources: SHA-256 of each source file of the weights, by file name.
        sampling: default sampling options; None for a tokenizer alone.
        about: further JSON data for config.json: CONVERT_OPTIONS, the "release" and its "license",
            or the "crop" of a run's images.

    Raises:
        InputError: `out` has files that this would not write, or cannot be written.
    """
    config = {part: config_tree.to_dict(config) for part, (config, _) in models.items()}
    if sampling is not None:
        config |= {"sampling": config_tree.to_dict(sampling)}
    config |= about or {}
    write_weights(out, config, {part: leaves for part, (_, leaves) in models.items()}, sources)


def write_weights(
    out: pathlib.Path,
    config: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Tensor]],
    sources: Mapping[str, str],
) -> None:
    """Writes a directory of weights of any kind.

    Args:
        out: directory to write; see `new_directory`.
        config: JSON data for config.json.
        models: parameters by path, for each {part}.safetensors.
        sources: SHA-256 of each source file of the weights, for config.json.

    Raises:
        InputError: like `write_converted`.
    """
    contents = {f"{part}.safetensors": leaves for part, leaves in models.items()}
    with new_directory(out, contents, replaces=converted_files(models)) as temporary:
        files.write_json(temporary / "config.json", {**config, "sources": dict(sources)})
        write_files(temporary, contents)


def converted_files(parts: Iterable[str]) -> set[str]:
    """Returns the names of the files in a directory of weights of these parts."""
    return {"config.json", *(f"{part}.safetensors" for part in parts)}


@contextlib.contextmanager
def new_directory(
    out: pathlib.Path, contents: Contents, replaces: Set[str] = frozenset()
) -> Iterator[pathlib.Path]:
    """Yields an empty directory that becomes `out` on success, and is removed otherwise.

    Args:
        out: directory that does not exist, is empty, or is a converted directory with no files
            except `replaces`.
        contents: tensors that will be written; only their sizes are read here.
        replaces: names of files that may be replaced.

    Raises:
        InputError: `out` is anything else.
        StorageError: the disk is too small, or `out` cannot be written.
    """
    check_weights_dir(out, replaces)
    needed = sum(tensor.nbytes for named in contents.values() for tensor in named.values())
    with files.atomic_path(out) as temporary:
        temporary.mkdir()
        free = shutil.disk_usage(temporary).free
        if free < needed:
            raise StorageError(f"{out} needs {needed / 1e9:.3f} GB; {free / 1e9:.3f} GB are free")
        yield temporary


def check_weights_dir(out: pathlib.Path, replaces: Set[str] = frozenset()) -> None:
    """Raises InputError if `out` exists and `new_directory` would not replace it."""
    config = out / "config.json"
    # A conversion can be repeated and names its sources; a classifier that varjax trained has none.
    converted = config.is_file() and bool(files.read_json(config).get("sources"))
    folders.check_replaceable(out, replaces if converted else frozenset())


def write_files(
    directory: pathlib.Path, contents: Contents, metadata: Mapping[str, str] | None = None
) -> None:
    """Writes each file in the format of its suffix, .pth or .safetensors.

    The .safetensors files also contain `metadata`, text by name.
    """
    for name, named in contents.items():
        with _byte_progress(f"writing {name}", sum(x.nbytes for x in named.values())) as bar:
            counted = {key: _counted(tensor, bar) for key, tensor in named.items()}
            if name.endswith(".pth"):
                write_pth(directory / name, counted)
            else:
                safetensors_io.write_safetensors(directory / name, counted, metadata or {})


def sha256_of(paths: Collection[pathlib.Path]) -> dict[str, str]:
    """Returns each file's SHA-256 by its name, or by its path where two have the same name."""
    names = [path.name for path in paths]
    digests = {}
    for path in paths:
        sha256 = hashlib.sha256()
        with (
            open(path, "rb") as file,
            _byte_progress(f"reading {path.name}", path.stat().st_size) as bar,
        ):
            while chunk := file.read(CHUNK_BYTES):
                sha256.update(chunk)
                bar.update(len(chunk))
        digests[path.name if names.count(path.name) == 1 else str(path)] = sha256.hexdigest()
    return digests


def _counted(tensor: Tensor, bar: tqdm) -> LazyArray:
    """Returns the tensor with chunks that advance the progress bar once they are written."""

    def chunks():
        for chunk in safetensors_io.tensor_chunks(tensor):
            yield chunk
            bar.update(chunk.nbytes)

    return LazyArray(tensor.shape, tensor.dtype, chunks)


def _byte_progress(text: str, nbytes: int) -> tqdm:
    """Makes a progress bar that counts bytes; it shows only where stderr is a terminal."""
    return tqdm(total=nbytes, desc=text, unit="B", unit_scale=True, disable=None)
