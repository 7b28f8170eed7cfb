"""Finds the weights in a PyTorch checkpoint: a plain state dict, a wrapped one, a trainer's."""

from typing import Any

import numpy as np

from varjax.convert.infer_config import HMAR
from varjax.convert.name_maps import NAME_MAPS
from varjax.convert.name_maps.name_map import NameMap, Tensors
from varjax.errors import InputError
from varjax.storage.untrusted import check_name, shown

TRAINER_KEYS = {kind.flag: kind.trainer_key for kind in NAME_MAPS if kind.trainer_key}
# Where trainers keep the averaged weights beside "model": MAR's, and DeiT's and those after it.
AVERAGED = ("model_ema", "ema")
WRAPPERS = ("state_dict", "model")
HMAR_TRAINER = "transformer_wo_ddp"  # where HMAR's trainer keeps its transformer


def find_state_dicts(checkpoint: Any, ema: bool | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Finds the weights in what `read_checkpoint` returned.

    Prefixes that torch's DistributedDataParallel ("module.") and compile ("_orig_mod.") add to
    names are removed.

    Args:
        checkpoint: content of the checkpoint.
        ema: False ignores averaged weights; else they are used if there are any.

    Returns:
        {flag: {name: array}}; the flag is "tokenizer" or "var" for a checkpoint of VAR's trainer,
        and "" for a plain state dict, also one under "model_ema", "ema", "state_dict", "model", or
        under "trainer", where CCA's fine-tuning of VAR keeps it.

    Raises:
        InputError: there are no weights, or something else is among them.
    """
    if not isinstance(checkpoint, dict):
        raise InputError(
            f"the checkpoint holds a {type(checkpoint).__name__}, not a dict of weights"
        )
    trainer = checkpoint.get("trainer", checkpoint)
    if isinstance(trainer, dict):
        if HMAR_TRAINER in trainer:
            raise InputError(f"holds {HMAR}, by its {HMAR_TRAINER}, which varjax does not have")
        found = {
            flag: weights
            for flag, key in TRAINER_KEYS.items()
            if isinstance(weights := trainer.get(key), dict) and weights
        }
        if found:
            return {flag: _clean(weights) for flag, weights in found.items()}
        if _is_state_dict(checkpoint.get("trainer")):
            return {"": _clean(trainer)}
    if ema is not False and (averaged := averaged_key(checkpoint)):
        return {"": _clean(checkpoint[averaged])}
    for key in WRAPPERS:
        if isinstance(checkpoint.get(key), dict):
            return {"": _clean(checkpoint[key])}
    return {"": _clean(checkpoint)}


def averaged_key(checkpoint: Any) -> str | None:
    """Returns where what `read_checkpoint` returned holds averaged weights; None without them."""
    if not isinstance(checkpoint, dict):
        return None
    return next((key for key in AVERAGED if _is_state_dict(checkpoint.get(key))), None)


def own_tensors(kind: NameMap, tensors: Tensors) -> tuple[dict[str, np.ndarray], list[str]]:
    """Parts a model's tensors from those that its file holds besides.

    Returns:
        The model's tensors by their own names, and the beginnings of the other names.
    """
    prefix = kind.prefix if kind.prefix + kind.known_by in tensors else ""
    own, others = {}, []
    for full_name, x in tensors.items():
        name = full_name.removeprefix(prefix)
        if full_name.startswith(prefix) and not name.startswith(kind.ignored):
            own[name] = x
        else:
            others.append(name.partition(".")[0])
    return own, list(dict.fromkeys(others))


def _is_state_dict(held: Any) -> bool:
    return isinstance(held, dict) and any(isinstance(x, np.ndarray) for x in held.values())


def _clean(weights: Any) -> dict[str, np.ndarray]:
    """Checks that these are weights, and removes prefixes of their names."""
    if not isinstance(weights, dict) or not weights:
        raise InputError("the checkpoint holds no weights")
    if strange := [key for key, x in weights.items() if not isinstance(x, np.ndarray)]:
        raise InputError(
            f"{len(strange)} of {len(weights)} entries are no arrays: {shown(strange)}; weights "
            f"are looked for at the top, in {', '.join((*AVERAGED, *WRAPPERS))} and in trainer/"
            f"{', '.join(TRAINER_KEYS.values())}; pass the part that holds them"
        )
    named = {_without_prefixes(check_name(key)): x for key, x in weights.items()}
    if len(named) < len(weights):
        raise InputError("two names in the checkpoint differ only in module. or _orig_mod.")
    return named


def _without_prefixes(name: str) -> str:
    # A compiled submodule adds its part in the middle of a name; no real module is called so.
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
