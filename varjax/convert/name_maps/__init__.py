"""Lists the kinds of official models that can be converted; each has a file and a line here."""

from typing import Any

from varjax.convert.name_maps.kl import KL
from varjax.convert.name_maps.mar import MAR
from varjax.convert.name_maps.name_map import NameMap
from varjax.convert.name_maps.var import VAR
from varjax.convert.name_maps.vq import VQ

NAME_MAPS = (VQ, KL, MAR, VAR)  # the first whose tensor `known_by` is in a file describes it


def name_map_of(config: Any) -> NameMap:
    """Returns the name map of the model that `config` describes."""
    return next(name_map for name_map in NAME_MAPS if isinstance(config, name_map.config))
