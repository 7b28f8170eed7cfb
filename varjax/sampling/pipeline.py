"""What the pipelines of all families share: weights held by devices, and checked requests."""

import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from varjax import trees
from varjax.errors import InputError
from varjax.nn.compute import ComputeConfig
from varjax.runtime.data_parallel import batch_mesh, data_parallel, replicate
from varjax.sampling.sampler import (
    checked_index,
    checked_keys,
    checked_labels,
)
from varjax.trees import PyTree

Array = np.ndarray | jax.Array
Labels = Sequence[int | str | Mapping[int, float]] | np.ndarray | jax.Array
Index = Sequence[int] | np.ndarray
Location = str | pathlib.Path
# An option with one number for each scale or step: a list, or a function of the index.
Each = Sequence[float] | np.ndarray | Callable[[int], float]


class HeldWeights:
    """Holds a model's parameters on devices, and runs functions of them on batches.

        weights = HeldWeights(params, CAST_KERNELS, compute, devices)
        decode = weights.compile(lambda params, options, token_BL: …)
        images_BHWC = decode(None, token_BL)

    Attributes:
        params: the parameters on the host, as they were given.
        compute: number format and execution.
        devices: devices that share each batch; every one holds all parameters.
        nbytes: size of the parameters on a device.
    """

    def __init__(
        self,
        params: PyTree,
        cast_kernels: str,
        compute: ComputeConfig,
        devices: Sequence[Any] | None,
    ):
        """Puts the parameters on the devices; None for all of this process.

        cast_kernels: pattern of the parameters that are held in `compute.dtype` only.
        """
        self._mesh = batch_mesh(devices)
        self.devices: tuple[Any, ...] = tuple(self._mesh.devices)
        self.compute, self.params = compute, jax.device_get(params)
        with jax.default_device(self.devices[0]):
            cast = trees.cast(cast_kernels, self.params, compute.jax_dtype)
        self._on_devices = replicate(cast, self._mesh)
        self.nbytes = trees.nbytes(self._on_devices)

    def compile(self, function: Callable[..., Any]) -> functools.partial:
        """Jits a function of (params, options, *batch), as (options, *batch) -> arrays.

        The devices share each batch, and compute one image as any number of them would.
        """
        return functools.partial(data_parallel(function, self._mesh), self._on_devices)

    def identity(self) -> dict[str, Any]:
        """Returns all that images depend on besides labels, seed and options, as JSON data."""
        return {"compute": self.compute.identity(), "weights": trees.digest(self.params)[:16]}


def checked_companion(
    role: str, model: Any, other: Any, sizes_of: Callable[[Any], dict[str, Any]]
) -> Any:
    """Returns the pipeline of a model that helps another one to sample.

    Args:
        role: what it is for the other: "guide" or "refiner".
        model: pipeline of the model that is helped.
        other: pipeline of the helping model, or its location, which `model.loader` loads.
        sizes_of: pipeline -> what must be equal in both, in addition to the classes, by name.

    Raises:
        InputError: it is no pipeline of the same family, or the two models do not fit together.
    """
    if isinstance(other, str | pathlib.Path):
        if model.loader is None:
            raise InputError(f"{role}={other}: give a model that was loaded with varjax.load")
        other = model.loader(other)
    if type(other) is not type(model):
        kinds = type(other).__name__, type(model).__name__
        raise InputError(f"{role} is a {kinds[0]}; it must be a {kinds[1]}")
    sizes, others = ({"classes": m.classes, **sizes_of(m)} for m in (model, other))
    if lines := [f"{n}: {role} {others[n]}, model {x}" for n, x in sizes.items() if x != others[n]]:
        raise InputError(f"the {role} does not fit this model:\n  " + "\n  ".join(lines))
    digests = [trees.digest(pipeline.params["tokenizer"]) for pipeline in (model, other)]
    if model.tokenizer != other.tokenizer or digests[0] != digests[1]:
        raise InputError(
            f"the {role}'s tokenizer has other weights than this model's; choose a {role} that was "
            "trained on the same tokenizer"
        )
    return other


def check_rule(choose: Any, **options: bool) -> None:
    """Raises InputError for a rule that is no function, or options that it would not read.

    Args:
        choose: a user's rule that chooses tokens, or None.
        options: options that apply only without a rule, and whether they are set.
    """
    if choose is None:
        return
    if not callable(choose):
        raise InputError(f"choose={choose!r}: must be a function that returns tokens")
    if ignored := [name for name, is_set in options.items() if is_set]:
        raise InputError(f"{', '.join(ignored)}: not with `choose`, which chooses the tokens")


def checked_request(
    labels: Labels, seed: int, index: Index | None, classes: int
) -> tuple[jax.Array, jax.Array]:
    """Checks the arguments of `Sampler.sample`; returns labels (B,) and keys (B,).

    Raises InputError for labels, a seed or numbers out of range, or of another length.
    """
    label_B = checked_labels(labels, classes)
    return label_B, checked_keys(seed, index, len(label_B))


def checked_edit(
    images: int, labels: Labels | None, seed: int, index: Index | None, classes: int
) -> tuple[jax.Array, jax.Array]:
    """Checks the arguments of `Sampler.edit`; returns labels (B,) and keys (B,).

    Args:
        images: number of images given.
        labels: classes, as `Sampler.edit` takes them.
        seed: random seed of all results.
        index: numbers of the results, as `Sampler.edit` takes them.
        classes: number of classes.

    Raises:
        InputError: a wrong number of images or labels, or labels out of range.
    """
    index_B = np.arange(images) if index is None else checked_index(index)
    B = len(index_B)
    if not images or images not in (1, B):
        raise InputError(f"{images} images and {B} of index; give one image, or one per index")
    labels = np.full(B, classes) if labels is None else labels
    return checked_labels(labels, classes, B), checked_keys(seed, index_B, B)
