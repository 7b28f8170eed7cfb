"""The steps saved in a directory, read by one process without waiting for any other."""

import pathlib
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from varjax import trees
from varjax.training.task import PyTree, TrainState

ARRAYS = ("params", "ema", "opt_state")
UNREADABLE = (ValueError, KeyError, OSError)  # what Orbax raises for files that are not all there


class Mismatch(ValueError):
    """A step that can be read, of something else."""


class Saved:
    """<directory>/<step>, each whole: what is being written has another name until it is."""

    def __init__(self, directory: pathlib.Path):
        self.directory = directory.absolute()
        me = jax.process_index()
        alone = ocp.options.MultiprocessingOptions(primary_host=me, active_processes={me})
        handlers: dict[str, Any] = {
            name: ocp.StandardCheckpointHandler(multiprocessing_options=alone) for name in ARRAYS
        }
        handlers["meta"] = ocp.JsonCheckpointHandler(multiprocessing_options=alone)
        options = ocp.CompositeOptions(multiprocessing_options=alone)
        self._checkpointer = ocp.Checkpointer(
            ocp.CompositeCheckpointHandler(composite_options=options, **handlers),
            multiprocessing_options=alone,
        )

    def steps(self) -> list[int]:
        """Those that are there now, oldest first."""
        return sorted(int(path.name) for path in self.directory.iterdir() if path.name.isdigit())

    def meta(self, step: int) -> dict:
        """The `meta` saved with a step."""
        return self._restore(step, {"meta": ocp.args.JsonRestore()})["meta"]

    def state(self, step: int, abstract: TrainState, shardings: Any) -> tuple[TrainState, dict]:
        """The state laid out as `shardings`, of which each process reads its part, and `meta`.

        Raises Mismatch where the arrays saved are not those of `abstract`, one of UNREADABLE where
        files are damaged or missing.
        """
        self._check(step, abstract)
        targets = jax.tree.map(_abstract, abstract, shardings)
        wanted = {name: getattr(targets, name) for name in ARRAYS}
        items: dict[str, Any] = {"meta": ocp.args.JsonRestore()}
        items |= {n: ocp.args.StandardRestore(t) for n, t in wanted.items() if t is not None}
        read = self._restore(step, items)
        count = jax.make_array_from_callback((), shardings.step, lambda _: np.int32(step))
        state = TrainState(count, read["params"], read.get("ema"), read["opt_state"])
        return state, read["meta"]

    def params(self, step: int, ema: bool | None = None) -> PyTree:
        """Parameters alone on this process's first device, with shapes from the files themselves.

        `ema` asks for their average, None for the average if there is one.
        """
        saved = self._arrays(step)
        averaged = saved.get("ema") is not None
        if ema and not averaged:
            raise ValueError(f"step {step} in {self.directory} keeps no average; ask for params")
        name = "ema" if averaged and ema is not False else "params"
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: _abstract(x, sharding), saved[name].tree)
        return self._restore(step, {name: ocp.args.StandardRestore(target)})[name]

    def _check(self, step: int, abstract: TrainState) -> None:
        saved = self._arrays(step)
        if saved.get("params") is None:
            raise ValueError("the description of its parameters is missing")
        for name in ("params", "ema"):
            tree = saved[name].tree if saved.get(name) is not None else {}
            if report := trees.difference(getattr(abstract, name), tree):
                where = self.directory / str(step)
                raise Mismatch(f"{where} does not hold the {name} of this config:\n{report}")

    def _arrays(self, step: int) -> Any:
        """Names, shapes and dtypes of what was saved."""
        return self._checkpointer.metadata(self.directory / str(step)).item_metadata

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        return self._checkpointer.restore(
            self.directory / str(step), args=ocp.args.Composite(**items)
        )


def _abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
