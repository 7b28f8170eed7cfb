"""Tells the kind and the config of official models from their tensors."""

import pathlib
from collections.abc import Mapping
from typing import Any

from varjax.convert.name_maps import NAME_MAPS
from varjax.convert.name_maps.name_map import ConvertOptions, NameMap, Tensors
from varjax.convert.sources import errors_naming
from varjax.core.errors import InputError


def infer_configs(
    sources: Mapping[str, tuple[pathlib.Path, Tensors]], options: ConvertOptions
) -> dict[str, Any]:
    """Infers the configs of models that belong together.

    Args:
        sources: the file and the official tensors of each part: "tokenizer", "var".
        options: tells what tensors cannot.

    Returns:
        The config of each part.

    Raises:
        InputError: names the file that is of another kind, lacks tensors or contradicts itself, or
            says how the models do not fit each other.
    """
    configs, kinds = {}, {}
    # A model of latents comes first: of its tokenizer it knows more than the tokenizer's file.
    for part in sorted(sources, key=lambda part: part == "tokenizer"):
        path, tensors = sources[part]
        with errors_naming(path):
            kinds[part] = find_kind(tensors, part)
            configs[part] = kinds[part].infer(tensors, options)
        options = kinds[part].tokenizer_options(configs[part], options)
    for part, kind in kinds.items():
        if kind.check_fit and "tokenizer" in configs:
            kind.check_fit(configs["tokenizer"], configs[part])
    return configs


def find_kind(tensors: Tensors, part: str) -> NameMap:
    """Finds the name map of official tensors; raises InputError if they are no such part."""
    found = next((kind for kind in NAME_MAPS if kind.known_by in tensors), None)
    if found is None:
        known = " nor ".join(kind.description for kind in NAME_MAPS)
        names = " nor ".join(kind.known_by for kind in NAME_MAPS)
        raise InputError(
            f"holds neither {known}: among its {len(tensors)} tensors is neither {names}"
        )
    if found.part != part:
        wanted = " or ".join(kind.description for kind in NAME_MAPS if kind.part == part)
        raise InputError(
            f"holds {found.description}, not {wanted}; give it as --{found.part} instead"
        )
    return found
