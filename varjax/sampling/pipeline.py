"""Code shared by the pipelines of all families: weights on devices, and checked requests."""

import contextlib
import dataclasses
import functools
import hashlib
import json
import pathlib
import textwrap
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from varjax import trees
from varjax.checkpoints.class_names import different_class
from varjax.config.config_tree import changed_fields
from varjax.config.numbers import FLOAT32_MAX, UINT32_MAX, seed_number, whole_number
from varjax.errors import InputError
from varjax.nn.compute import ComputeConfig
from varjax.runtime.data_parallel import batch_mesh, data_parallel, replicate
from varjax.sampling.sampler import image_keys
from varjax.trees import PyTree

Array = np.ndarray | jax.Array
Labels = str | Sequence[int | str | Mapping[int | str, float]] | np.ndarray | jax.Array
Index = Sequence[int] | np.ndarray
Location = str | pathlib.Path
# An option with one number for each scale or step: a list, or a function of the index.
Each = Sequence[float] | np.ndarray | Callable[[int], float]

DESCRIPTION_WIDTH = 100  # characters of a line


class HeldWeights:
    """Holds a model's parameters, and runs functions of them on batches.

        weights = HeldWeights(params, CAST_KERNELS, compute, devices)
        decode = weights.compile(lambda params, options, token_BL: …)
        images_BHWC = decode(None, token_BL)

    The devices get the parameters at the first call of a function, so that a model which only
    becomes part of another one never takes their memory.

    Attributes:
        params: the parameters on the host, as they were given.
        compute: dtype and execution.
        devices: devices that share each batch; every one holds all parameters.
    """

    def __init__(
        self,
        params: PyTree,
        cast_kernels: str,
        compute: ComputeConfig,
        devices: Sequence[Any] | None,
    ):
        """Prepares parameters for devices; None for all of this process.

        cast_kernels: pattern of the parameters that are held in `compute.dtype` only.
        """
        self._mesh = batch_mesh(devices)
        self.devices: tuple[Any, ...] = tuple(self._mesh.devices)
        self.compute, self.params = compute, jax.device_get(params)
        self._cast = functools.partial(trees.cast, cast_kernels, dtype=compute.jax_dtype)

    @functools.cached_property
    def on_devices(self) -> PyTree:
        """The parameters as devices hold them, a copy on each."""
        with jax.default_device(self.devices[0]):
            cast = self._cast(self.params)
        return replicate(cast, self._mesh)

    @functools.cached_property
    def shapes(self) -> PyTree:
        """Shapes and dtypes of the parameters as devices hold them."""
        return jax.eval_shape(self._cast, self.params)

    @functools.cached_property
    def nbytes(self) -> int:
        """Size of the parameters on a device."""
        return trees.nbytes(self.shapes)

    def compile(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Jits a function of (params, options, *batch), as (options, *batch) -> arrays.

        The devices share each batch, and compute one image as any number of them would.
        `__wrapped__` of the result is the jitted function.
        """
        program = data_parallel(function, self._mesh)

        @functools.wraps(program)
        def run(options, *batch):
            trees.refuse_tracers(batch)
            with self._own_mesh():
                return program(self.on_devices, options, *batch)

        return run

    def _own_mesh(self) -> contextlib.AbstractContextManager[Any]:
        """Replaces a mesh that the caller has set, which the program would not accept."""
        if jax.sharding.get_abstract_mesh().empty:
            return contextlib.nullcontext()
        return jax.set_mesh(self._mesh)

    def identity(self, configs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns all that images depend on besides labels, seed and options, as JSON data.

        configs: configs of all models whose parameters these are, by role; None for no model.
        """
        changed = {
            role: changed_fields(config) for role, config in configs.items() if config is not None
        }
        return {
            "compute": self.compute.identity(),
            "weights": trees.digest(self.params)[:16],
            "model_config": hashlib.sha256(
                json.dumps(changed, sort_keys=True).encode()
            ).hexdigest()[:16],
        }


def describe_pipeline(pipeline: Any) -> str:
    """Returns what `print(model)` shows of a family's pipeline.

    pipeline: pipeline with `config`, `params`, `labels`, `sampling`, `compute` and `devices`.
    """
    sizes = {
        name: sum(leaf.size for leaf in jax.tree.leaves(params))
        for name, params in pipeline.params.items()
    }
    lines = {
        name: f"{_rounded(sizes[name])} parameters: {_fields(config)}"
        for name, config in pipeline.config.items()
        if config is not None
    }
    companions = [name for name in sizes if name not in pipeline.config]
    lines |= {role: f"{_rounded(sizes[role])} parameters" for role in companions}
    if pipeline.config.get("tokenizer") is not None:
        H, W, channels = pipeline.image_shape
        lines["images"] = f"{H}x{W} pixels, {channels} {'channel' if channels == 1 else 'channels'}"
    lines["classes"] = f"{pipeline.classes:,}: {pipeline.labels!r}"
    lines["options"] = _fields(pipeline.sampling)
    device = pipeline.devices[0].device_kind
    lines["compute"] = f"{pipeline.compute.jax_dtype.name} on {len(pipeline.devices)} x {device}"
    wide = max(map(len, lines)) + 2
    indent = " " * (2 + wide)
    text = [
        textwrap.fill(f"  {name:{wide}}{line}", DESCRIPTION_WIDTH, subsequent_indent=indent)
        for name, line in lines.items()
    ]
    return "\n".join([type(pipeline).__name__, *text])


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
    if (label := different_class(model.labels, other.labels)) is not None:
        raise InputError(
            f"label {label} is {other.labels[label]!r} for the {role}, but {model.labels[label]!r} "
            f"for this model; choose a {role} that was trained on the same classes"
        )
    digests = [trees.digest(pipeline.params["tokenizer"]) for pipeline in (model, other)]
    if model.tokenizer != other.tokenizer or digests[0] != digests[1]:
        raise InputError(
            f"the {role}'s tokenizer has different weights than this model's; choose a {role} that "
            "was trained on the same tokenizer"
        )
    return other


def check_rule(choose: Any, **options: bool) -> None:
    """Raises InputError for a rule that is no function with a hash, or options it would not read.

    Args:
        choose: a user's rule that chooses tokens, or None.
        options: options that apply only without a rule, and whether they are set.
    """
    if choose is None:
        return
    if not callable(choose):
        raise InputError(f"choose={choose!r}: must be a function that returns tokens")
    try:
        hash(choose)
    except TypeError:
        raise InputError(
            f"choose={choose!r} has no hash, by which compiled programs are found again; give a "
            "function"
        ) from None
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


def checked_labels(labels: Any, classes: int, batch: int | None = None) -> jax.Array:
    """Returns labels as (B,) int32, or as weights (B, classes + 1) float32 if any is a mix.

    Args:
        labels: class numbers; `classes` itself means "no class". Or mixes of classes by weights,
            such as {207: 0.5, 980: 0.5} or "207:0.5+980:0.5"; their sum is set to 1.
        classes: number of classes.
        batch: number of labels B if it is fixed by another argument, else None.

    Raises:
        InputError: a wrong number of labels, no labels, or a label that is not a class.
    """
    allowed = f"allowed are 0 … {classes - 1}, and {classes} for no class"
    if _has_mixes(labels):
        weight_BN = np.stack([_class_weights(label, classes, allowed) for label in labels])
        if batch is not None and len(weight_BN) != batch:
            raise InputError(f"{len(weight_BN)} labels; expected {batch}")
        return jnp.asarray(weight_BN, jnp.float32)
    trees.refuse_tracers(labels)
    label_B = _numbers("labels", labels, allowed)
    if batch is not None and len(label_B) != batch:
        raise InputError(f"labels have shape {label_B.shape}; expected ({batch},)")
    if bad := label_B[(label_B < 0) | (label_B > classes)].tolist():
        raise InputError(f"labels {bad[:5]}: {allowed}")
    return jnp.asarray(label_B, jnp.int32)


def checked_keys(seed: Any, index: Any, batch: int) -> jax.Array:
    """Checks seed and index, and returns the key of each image, (B,); see `image_keys`.

    Args:
        seed: random seed of all images.
        index: numbers of the images; None for 0 … B-1.
        batch: number of images B.

    Raises:
        InputError: a seed or a number outside of 32 bits, or a wrong number of them.
    """
    trees.refuse_tracers((seed, index))
    index_B = np.arange(batch) if index is None else checked_index(index)
    if len(index_B) != batch:
        raise InputError(f"index has {len(index_B)} numbers; expected {batch}, one per image")
    return image_keys(seed_number("seed", seed), index_B.astype(np.uint32))


def checked_index(index: Any) -> np.ndarray:
    """Returns numbers of images as (B,) int64; raises InputError outside of 0 … 2³²-1."""
    allowed = f"allowed are 0 … {UINT32_MAX}"
    index_B = _numbers("index", index, allowed)
    if bad := index_B[(index_B < 0) | (index_B > UINT32_MAX)].tolist():
        raise InputError(f"index {bad[:5]}: {allowed}")
    return index_B


def checked_mask(mask: Any, batch: int, shape: tuple[int, int], name: str = "keep") -> np.ndarray:
    """Returns a mask (h, w), or one for each image, as (batch, h, w) bool.

    Raises InputError for another shape; `name` is the mask's name in the message.
    """
    trees.refuse_tracers(mask)
    mask = np.asarray(mask)
    if mask.shape not in (shape, (batch, *shape)):
        raise InputError(f"{name} has shape {mask.shape}; allowed are {shape}, {(batch, *shape)}")
    return np.broadcast_to(mask.astype(bool), (batch, *shape))


def checked_tokens(tokens: Any, shape: tuple[int, ...], vocab: int) -> jax.Array:
    """Returns tokens as (B, *shape) int32; raises InputError for another shape or other numbers."""
    trees.refuse_tracers(tokens)
    tokens = np.asarray(tokens)
    if tokens.shape[1:] != shape or not tokens.ndim or not len(tokens):
        raise InputError(
            f"tokens have shape {tokens.shape}; expected (B, {', '.join(map(str, shape))})"
        )
    if not np.issubdtype(tokens.dtype, np.integer):
        raise InputError(f"tokens are {tokens.dtype}; give integers")
    if not 0 <= tokens.min() <= tokens.max() < vocab:
        raise InputError(f"tokens are outside of 0 … {vocab - 1}")
    return jnp.asarray(tokens, jnp.int32)


def _numbers(name: str, values: Any, allowed: str) -> np.ndarray:
    """Returns whole numbers, one or (B,) of any type, as (B,) int64."""
    try:
        array_B = np.atleast_1d(np.asarray(values))
    except ValueError as error:  # rows of unequal lengths
        raise InputError(f"{name} do not have shape (B,): {error}") from error
    if array_B.ndim != 1:
        raise InputError(f"{name} have shape {array_B.shape}; expected (B,)")
    if not len(array_B):
        raise InputError(f"{name} are empty: {allowed}")
    if array_B.dtype.kind not in "iuf":
        raise InputError(f"{name} {array_B[:5].tolist()}: {allowed}")
    if bad := [x for x in array_B.tolist() if x % 1 != 0 or abs(x) > UINT32_MAX]:  # NaN as well
        raise InputError(f"{name} {bad[:5]}: {allowed}")
    return array_B.astype(np.int64)


def _has_mixes(labels: Any) -> bool:
    """Returns whether labels are a list of which at least one entry mixes classes."""
    if not isinstance(labels, list | tuple) and not (
        isinstance(labels, np.ndarray) and labels.ndim == 1
    ):
        return False
    return any(isinstance(x, Mapping) or (isinstance(x, str) and ":" in x) for x in labels)


def _class_weights(label: Any, classes: int, allowed: str) -> np.ndarray:
    """Returns the weights of all classes and of "no class" in a label, (classes + 1,)."""

    def class_number(number):
        if isinstance(number, str):
            return int(number)
        return whole_number("label", number, 0, classes)

    weight_N = np.zeros(classes + 1)
    try:
        if isinstance(label, str):
            pairs = [part.split(":") for part in label.split("+")]
            numbers = [(int(number), float(weight)) for number, weight in pairs]
        elif isinstance(label, Mapping):
            numbers = [(class_number(number), float(weight)) for number, weight in label.items()]
        else:
            numbers = [(class_number(label), 1.0)]
    except (TypeError, ValueError):
        numbers = []
    for number, weight in numbers:
        if 0 <= number <= classes and 0 < weight <= FLOAT32_MAX:
            weight_N[number] += weight
        else:
            numbers = []
    if not numbers:
        raise InputError(
            f"label {label!r}: give a class, or CLASS:WEIGHT+CLASS:WEIGHT (in Python also {{CLASS: "
            f"WEIGHT}}) with weights above 0; {allowed}"
        )
    return weight_N / weight_N.sum()


def _fields(config: Any) -> str:
    """Returns the fields of a dataclass, except for those that are None."""
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return ", ".join(f"{name}={value}" for name, value in values.items() if value is not None)


def _rounded(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count < 1e9 else f"{count / 1e9:,.2f} B"
