"""Where a tokenizer's training keeps what changes besides the tokenizer.

A train state's `params` are those of the tokenizer alone, so that whoever reads them, and their
average, finds a tokenizer like any other. The discriminator and all else are in `opt_state`.

    state, others = split_state(state)
    ...
    others["discriminator"] = updated
    state = join_state(state, others)
"""

import dataclasses

from varjax.training.task import TrainState
from varjax.trees import PyTree

OWN = "tokenizer"  # the name of the tokenizer's moments beside the others


def join_state(state: TrainState, others: dict[str, PyTree]) -> TrainState:
    """Puts what changes besides the tokenizer into its `opt_state`, if there is anything.

    Args:
        state: train state of the tokenizer.
        others: further state by name; None for parts that this run does not have. Without any part,
            the state is returned unchanged.
    """
    others = {name: x for name, x in others.items() if x is not None}
    if not others:
        return state
    return dataclasses.replace(state, opt_state={OWN: state.opt_state} | others)


def split_state(state: TrainState) -> tuple[TrainState, dict[str, PyTree]]:
    """Undoes `join_state`: (the tokenizer's state, all else by name)."""
    if not isinstance(state.opt_state, dict):
        return state, {}
    others = dict(state.opt_state)
    own = dataclasses.replace(state, opt_state=others.pop(OWN))
    return own, others
