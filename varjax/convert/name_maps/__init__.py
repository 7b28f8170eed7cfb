"""Lists the kinds of official models that can be converted; each has a file, and a line here."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from varjax.convert.name_maps.kl import KL_MAP
from varjax.convert.name_maps.mar import MAR_MAP
from varjax.convert.name_maps.name_map import NameMap
from varjax.convert.name_maps.resnet import RESNET_MAP
from varjax.convert.name_maps.var import VAR_MAP
from varjax.convert.name_maps.vq import VQ_MAP

# The first one whose tensor `known_by` is in a file describes that file.
NAME_MAPS = (VQ_MAP, KL_MAP, MAR_MAP, VAR_MAP, RESNET_MAP)

# Every published model by the name that `varjax.load` takes.
RELEASES = {name: release for kind in NAME_MAPS for name, release in kind.releases.items()}


def name_map_of(config: Any) -> NameMap:
    """Returns the name map of the model that `config` describes."""
    return next(name_map for name_map in NAME_MAPS if isinstance(config, name_map.config))


def kinds() -> dict[str, NameMap]:
    """Returns the name maps by the flag that takes their files."""
    return {name_map.flag: name_map for name_map in NAME_MAPS}


def option_fields() -> dict[str, Mapping[str, Any]]:
    """Returns the metadata and default of the options of all kinds, by name."""
    options: dict[str, Mapping[str, Any]] = {}
    for name_map in NAME_MAPS:
        for field in dataclasses.fields(name_map.options):
            options.setdefault(field.name, {"default": field.default, **field.metadata})
    return options
