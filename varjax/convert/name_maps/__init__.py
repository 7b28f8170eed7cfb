"""The kinds of official models that are converted: a file and a line of NAME_MAPS each."""

from typing import Any

from varjax.convert.name_maps.kl import KL
from varjax.convert.name_maps.mar import MAR
from varjax.convert.name_maps.name_map import NameMap
from varjax.convert.name_maps.var import VAR
from varjax.convert.name_maps.vq import VQ

NAME_MAPS = (VQ, KL, MAR, VAR)  # a tensor in `known_by` decides; the first that is found wins


def name_map_of(config: Any) -> NameMap:
    """Returns the name map of the model that `config` describes."""
    return next(name_map for name_map in NAME_MAPS if isinstance(config, name_map.config))
