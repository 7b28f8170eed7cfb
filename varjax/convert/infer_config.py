"""Infers the kind and the config of official models from their tensors."""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from varjax.convert.name_maps import NAME_MAPS
from varjax.convert.name_maps.name_map import ConvertOptions, NameMap, Tensors
from varjax.convert.sources import errors_naming
from varjax.errors import InputError

# What only HMAR's models have: they share `word_embed.weight` with VAR's.
HMAR_NAMES = ("ns_blocks.", "ns_head", "mask_blocks.", "mask_head", "mask_embed.", "base_blocks.")
HMAR = "an HMAR model (NVlabs/HMAR, arXiv 2506.04421), another architecture than VAR"


@dataclasses.dataclass(frozen=True)
class Source:
    """Holds what was read for one part of a directory of weights.

    Attributes:
        path: path of the file, or of the index of its parts.
        kind: kind of model that the file holds.
        tensors: official tensors, all from that model.
        held: all tensors of the file, by the names used in it.
        files: `path` and the paths of its parts.
    """

    path: pathlib.Path
    kind: NameMap
    tensors: Tensors
    held: Tensors = dataclasses.field(default_factory=dict)
    files: tuple[pathlib.Path, ...] = ()


def infer_configs(sources: Mapping[str, Source], options: ConvertOptions) -> dict[str, Any]:
    """Infers the configs of models that belong together.

    Args:
        sources: source of each part: "tokenizer", "var" or "mar".
        options: settings of the models that the files do not contain.

    Returns:
        The config of each part.

    Raises:
        InputError: names the file that lacks tensors or contradicts itself, or says how the models
            do not fit each other.
    """
    tokenizer = sources.get("tokenizer")
    models = [source for part, source in sources.items() if tokenizer and part != "tokenizer"]
    for source in models:
        assert tokenizer is not None
        if source.kind.reads not in (None, tokenizer.kind.config):
            raise InputError(
                f"{source.path}: {source.kind.description} does not read the latents of "
                f"{tokenizer.kind.description}, which {tokenizer.path} holds"
            )
    configs = {}
    # A model of latents comes first: of its tokenizer it knows more than the tokenizer's file. But
    # what the latents are, only that file knows.
    if tokenizer:
        with errors_naming(tokenizer.path):
            options = tokenizer.kind.model_options(tokenizer.tensors, options)
    for part in sorted(sources, key=lambda part: part == "tokenizer"):
        source = sources[part]
        with errors_naming(source.path):
            configs[part] = source.kind.infer(source.tensors, options)
        options = source.kind.tokenizer_options(configs[part], options)
    for source in models:
        if source.kind.check_fit:
            source.kind.check_fit(configs["tokenizer"], configs[source.kind.part])
    return configs


def find_kind(tensors: Tensors, flag: str) -> NameMap:
    """Finds the name map of official tensors; raises InputError if `flag` does not take them."""
    if foreign := [n for n in tensors if n.startswith(HMAR_NAMES)]:
        raise InputError(f"holds {HMAR}, by its {foreign[0]}, which varjax does not have")
    found = next(
        (kind for kind in NAME_MAPS if {kind.known_by, kind.prefix + kind.known_by} & set(tensors)),
        None,
    )
    if found is None:
        known = " nor ".join(kind.description for kind in NAME_MAPS)
        names = " nor ".join(kind.known_by for kind in NAME_MAPS)
        raise InputError(
            f"holds neither {known}: among its {len(tensors)} tensors is neither {names}"
        )
    if found.flag != flag:
        wanted = next(kind.description for kind in NAME_MAPS if kind.flag == flag)
        raise InputError(
            f"holds {found.description}, not {wanted}; give it as --{found.flag} instead"
        )
    return found
