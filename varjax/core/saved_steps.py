"""The steps saved in a directory, read by one process without waiting for any other."""

import pathlib
from typing import Any

import jax
import orbax.checkpoint as ocp

from varjax.core import trees
from varjax.core.errors import InputError
from varjax.core.trees import PyTree

ARRAYS = ("params", "ema", "opt_state")
UNREADABLE = (ValueError, KeyError, OSError)  # what Orbax raises for files that are not all there


class Mismatch(InputError):
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

    def arrays(
        self, step: int, abstract: dict[str, PyTree], shardings: dict[str, Any]
    ) -> tuple[dict[str, PyTree], dict]:
        """The trees of `abstract` by name, laid out as `shardings`, and `meta`.

        Of each array a process reads its part. Raises Mismatch where the arrays saved are not those
        of `abstract`, one of UNREADABLE where files are damaged or missing.
        """
        self._check(step, abstract)
        items: dict[str, Any] = {"meta": ocp.args.JsonRestore()}
        for name, tree in abstract.items():
            if tree is not None:
                targets = jax.tree.map(_abstract, tree, shardings[name])
                items[name] = ocp.args.StandardRestore(targets)
        read = self._restore(step, items)
        return {name: read[name] for name in items if name != "meta"}, read["meta"]

    def params(self, step: int, ema: bool | None = None) -> PyTree:
        """Parameters alone on this process's first device, with shapes from the files themselves.

        `ema` asks for their average, None for the average if there is one.
        """
        saved = self._saved_arrays(step)
        averaged = saved.get("ema") is not None
        if ema and not averaged:
            raise InputError(f"step {step} in {self.directory} keeps no average; ask for params")
        name = "ema" if averaged and ema is not False else "params"
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        target = jax.tree.map(lambda x: _abstract(x, sharding), saved[name].tree)
        return self._restore(step, {name: ocp.args.StandardRestore(target)})[name]

    def _check(self, step: int, abstract: dict[str, PyTree]) -> None:
        saved = self._saved_arrays(step)
        if saved.get("params") is None:
            raise InputError("the description of its parameters is missing")
        for name in ("params", "ema"):
            tree = saved[name].tree if saved.get(name) is not None else {}
            if report := trees.difference(abstract[name], tree):
                where = self.directory / str(step)
                raise Mismatch(f"{where} does not hold the {name} of this config:\n{report}")

    def _saved_arrays(self, step: int) -> Any:
        """Names, shapes and dtypes of what was saved."""
        return self._checkpointer.metadata(self.directory / str(step)).item_metadata

    def _restore(self, step: int, items: dict[str, Any]) -> Any:
        return self._checkpointer.restore(
            self.directory / str(step), args=ocp.args.Composite(**items)
        )


def restore_weights(run_dir: str | pathlib.Path, ema: bool | None = None) -> PyTree:
    """The weights that a run is used with, on the first device: the best it kept, else its last.

    `ema` asks for their average or for none. None gives the average if there is one, unless the
    best was chosen by the parameters' own metric ("eval/..."). The run may be going on meanwhile.
    Raises InputError when nothing was saved yet, or no average.
    """
    for name in ("best", "checkpoints"):
        if not (directory := pathlib.Path(run_dir) / name).is_dir():
            continue
        saved = Saved(directory)
        if steps := saved.steps():
            chosen_by = saved.meta(steps[-1]).get("keep_best", "")
            if ema is None and name == "best" and chosen_by.startswith("eval/"):
                ema = False
            return saved.params(steps[-1], ema)
    raise InputError(f"{run_dir} holds no checkpoint yet; let it train until its first save")


def _abstract(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
