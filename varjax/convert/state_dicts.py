"""PyTorch checkpoints without PyTorch: read any, find the weights in it, write one."""

from reprlib import repr as short
from typing import Any

import numpy as np

from varjax.convert.pth.read import read_checkpoint
from varjax.convert.pth.write import write_pth
from varjax.core.errors import InputError

__all__ = ["read_checkpoint", "state_dicts", "write_pth"]

TRAINER = {"var": "var_wo_ddp", "vae": "vae_local"}  # as the official VAR trainer names them
WRAPPERS = ("state_dict", "model")


def state_dicts(checkpoint: Any) -> dict[str, dict[str, np.ndarray]]:
    """The weights in what `read_checkpoint` returned: {model: {name: array}}.

    The model is "var" or "vae" for a checkpoint of the official trainer, and "" for a plain state
    dict, also one under "state_dict" or "model". Prefixes that torch's DistributedDataParallel
    ("module.") and compile ("_orig_mod.") add to names are removed.

    Raises InputError if there are no weights, or anything else lies among them.
    """
    if not isinstance(checkpoint, dict):
        raise InputError(
            f"the checkpoint holds a {type(checkpoint).__name__}, not a dict of weights"
        )
    trainer = checkpoint.get("trainer", checkpoint)
    if isinstance(trainer, dict):
        found = {model: trainer[key] for model, key in TRAINER.items() if trainer.get(key)}
        if found:
            return {model: _weights(weights) for model, weights in found.items()}
    for key in WRAPPERS:
        if isinstance(checkpoint.get(key), dict):
            return {"": _weights(checkpoint[key])}
    return {"": _weights(checkpoint)}


def _weights(weights: Any) -> dict[str, np.ndarray]:
    if not isinstance(weights, dict) or not weights:
        raise InputError("the checkpoint holds no weights")
    if strange := [key for key, x in weights.items() if not isinstance(x, np.ndarray)]:
        raise InputError(
            f"{len(strange)} of {len(weights)} entries are no arrays: {short(strange)}; weights "
            f"are looked for at the top, in {', '.join(WRAPPERS)} and in trainer/"
            f"{', '.join(TRAINER.values())}; pass the part that holds them"
        )
    named = {_bare(str(key)): x for key, x in weights.items()}
    if len(named) < len(weights):
        raise InputError("two names in the checkpoint differ only in module. or _orig_mod.")
    return named


def _bare(name: str) -> str:
    # A compiled submodule adds its part in the middle of a name; no real module is called so.
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name
