"""Lists the published models that have a name: what `varjax.load` and --weights take.

varjax models
varjax models var_d16 mar_b

FID is the authors' own, with the sampling options next to it. GB is the size of the weights in
float32. docs/convert.md has the sources and what each license allows.
"""

import dataclasses
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import jax

from varjax.checkpoints.weights import abstract_params
from varjax.convert.name_maps import NAME_MAPS, RELEASES
from varjax.convert.name_maps.name_map import NameMap
from varjax.convert.name_maps.release import PublishedResult
from varjax.errors import InputError
from varjax.runtime.commands import command_parser, run_command
from varjax.runtime.text_table import table_lines
from varjax.storage.cache_dir import cache_folder

BYTES = 4  # of a float32


@dataclasses.dataclass(frozen=True)
class PublishedModel:
    """Describes a published model.

    Attributes:
        name: name that `varjax.load` and --weights take.
        kind: kind of the model, such as "var", or "tokenizer".
        parameters: number of parameters, without those of the tokenizer.
        image_shape: (H, W, channels) of its images; None for a tokenizer of any size.
        fid: lowest FID that the authors report; None if they report none.
        options: sampling options of this FID that differ from the defaults, as flags, and what else
            was special.
        license: license of the weights.
        cached: whether this machine has it, so that nothing is downloaded.
    """

    name: str
    kind: str
    parameters: int
    image_shape: tuple[int, int, int] | None
    fid: float | None
    options: str
    license: str
    cached: bool

    @property
    def gigabytes(self) -> float:
        """Size of the weights in float32, without the tokenizer."""
        return self.parameters * BYTES / 1e9

    def __str__(self) -> str:
        return models_table([self])


def list_models() -> list[PublishedModel]:
    """Lists the published models by name; nothing is downloaded.

        for model in varjax.list_models():
            print(model.name, model.parameters, model.license)

    Returns:
        A record for each name, tokenizers first.
    """
    return [*_published(RELEASES)]


def models_table(models: Sequence[PublishedModel]) -> str:
    """Formats models as a table."""
    rows = [("name", "parameters", "GB", "pixels", "FID", "here", "license", "options of the FID")]
    for model in models:
        count = model.parameters
        rows.append(
            (
                model.name,
                f"{count / 1e9:.2f} B" if count >= 1e9 else f"{count / 1e6:.0f} M",
                f"{model.gigabytes:.1f}",
                str(model.image_shape[0]) if model.image_shape else "any",
                f"{model.fid:.2f}" if model.fid is not None else "–",
                "yes" if model.cached else "no",
                model.license,
                model.options,
            )
        )
    return "\n".join(table_lines(rows))


def _published(names: Collection[str]) -> Iterator[PublishedModel]:
    """Describes the models of these names, in the order of the table."""
    for kind in NAME_MAPS:
        yield from (_describe(kind, name) for name in kind.releases if name in names)


def _describe(kind: NameMap, name: str) -> PublishedModel:
    release = RELEASES[name]
    shape = None
    if kind.reads is not None:
        settings = kind.tokenizer_options(release.config, kind.options())
        shape = kind.reads(**settings).image_shape
    config: Any = release.config if release.config is not None else kind.config()
    parameters = sum(leaf.size for leaf in jax.tree.leaves(abstract_params(config)))
    result = min(release.results, key=lambda result: result.metrics["fid"], default=None)
    return PublishedModel(
        name,
        kind.part,
        parameters,
        shape,
        None if result is None else result.metrics["fid"],
        "" if result is None else _settings(result),
        release.license,
        (cache_folder() / name).exists(),
    )


def _settings(result: PublishedResult) -> str:
    """Returns the options that differ from the defaults, as flags, and the result's caveat."""
    flags = []
    for field in dataclasses.fields(result.options):
        value = getattr(result.options, field.name)
        if value != field.default:
            text = ",".join(f"{x:g}" for x in value) if isinstance(value, tuple) else value
            flags.append(f"--{field.name}={text}")
    return " ".join(flags + [f"({result.caveat})"] * bool(result.caveat))


def _print_models(names: Sequence[str]) -> None:
    """Prints the named models, or all; raises InputError for a name that is not published."""
    if unknown := [name for name in names if name not in RELEASES]:
        raise InputError(f"{', '.join(unknown)}: no published model; varjax models lists all")
    print(models_table([*_published(names or RELEASES)]))


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    parser = command_parser("varjax models", __doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="models to show (all)")
    flags = parser.parse_args(arguments)
    return run_command("varjax models", lambda: _print_models(flags.names))
