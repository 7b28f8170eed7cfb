"""Writing a directory of weights: whole or not at all, and never over anything else."""

import contextlib
import pathlib
import shutil
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from tqdm import tqdm

from varjax.convert.apply_map import Config
from varjax.convert.state_dicts import write_pth
from varjax.core import config_tree, files, safetensors_io
from varjax.core.errors import InputError
from varjax.core.safetensors_io import LazyArray, Tensor
from varjax.var.sample import VAROptions

Contents = Mapping[str, Mapping[str, Tensor]]  # tensors by name, of each file by name


def write_converted(
    out: pathlib.Path,
    models: Mapping[str, tuple[Config, Mapping[str, Tensor]]],
    sampling: VAROptions,
    sources: Mapping[str, str],
) -> None:
    """Writes the converted directory `out` of the models "tokenizer" and "var", or of one of them.

    sources: SHA-256 of each file the weights come from. Raises InputError where `out` holds
    anything that this would not write again, and where it cannot be written.
    """
    config = {name: config_tree.to_dict(config) for name, (config, _) in models.items()}
    config |= {"sampling": config_tree.to_dict(sampling)}
    write_weights(out, config, {name: leaves for name, (_, leaves) in models.items()}, sources)


def write_weights(
    out: pathlib.Path,
    config: Mapping[str, Any],
    models: Mapping[str, Mapping[str, Tensor]],
    sources: Mapping[str, str],
) -> None:
    """Writes a converted directory of any models by name; raises like `write_converted`."""
    contents = {f"{name}.safetensors": leaves for name, leaves in models.items()}
    with new_directory(out, contents, replaces=converted_files(models)) as temporary:
        files.write_json(temporary / "config.json", {**config, "sources": dict(sources)})
        write_files(temporary, contents)


def converted_files(models: Iterable[str]) -> set[str]:
    """The files in a converted directory of these models."""
    return {"config.json", *(f"{name}.safetensors" for name in models)}


@contextlib.contextmanager
def new_directory(
    out: pathlib.Path, contents: Contents, replaces: Set[str] = frozenset()
) -> Iterator[pathlib.Path]:
    """Yields an empty directory that becomes `out` when all went well, and vanishes otherwise.

    An existing `out` is replaced if it is empty, or a converted directory of no other files than
    those named in `replaces`. Raises InputError in other cases, and where the disk is too small.
    """
    check_vacant(out, replaces)
    needed = sum(x.nbytes for named in contents.values() for x in named.values())
    try:
        with files.atomic_path(out) as temporary:
            temporary.mkdir()
            if (free := shutil.disk_usage(temporary).free) < needed:
                raise InputError(f"{out} needs {needed / 1e9:.3f} GB; free are {free / 1e9:.3f} GB")
            yield temporary
    except OSError as error:
        raise InputError(
            f"{out} could not be written ({error}), and nothing of it was kept; "
            f"it needs {needed / 1e9:.3f} GB in a place that you may write to"
        ) from error


def check_vacant(out: pathlib.Path, replaces: Set[str] = frozenset()) -> None:
    """Raises InputError if `out` exists and `new_directory` would not replace it."""
    config = out / "config.json"
    converted = config.is_file() and "sources" in files.read_json(config)
    files.check_replaceable(out, replaces if converted else frozenset())


def write_files(directory: pathlib.Path, contents: Contents) -> None:
    """Writes each file, in the format that its name ends in: .pth or .safetensors."""
    for name, named in contents.items():
        with progress(f"writing {name}", sum(x.nbytes for x in named.values())) as bar:
            followed = {key: _followed(x, bar) for key, x in named.items()}
            if name.endswith(".pth"):
                write_pth(directory / name, followed)
            else:
                safetensors_io.write_safetensors(directory / name, followed, {})


def progress(text: str, nbytes: int) -> tqdm:
    """A bar that shows how many bytes are done, if anybody is watching."""
    return tqdm(total=nbytes, desc=text, unit="B", unit_scale=True, disable=None)


def _followed(x: Tensor, bar: tqdm) -> LazyArray:
    def chunks():
        for chunk in safetensors_io.tensor_chunks(x):
            yield chunk
            bar.update(chunk.nbytes)

    return LazyArray(x.shape, x.dtype, chunks)
