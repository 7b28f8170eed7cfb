"""Compiles a model's functions to StableHLO with jax.export; no device of the platform is needed.

A program takes (weights by path, numbers by path, arrays of the batch). Weights are inputs, so that
all programs share one file of them. Numbers are the seed and the sampling options that need no new
compilation.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export

from varjax import trees
from varjax.sampling.sampler import image_keys
from varjax.trees import PyTree

KINDS = ("sample", "encode", "decode", "edit")
NEEDED = {"edit": ("encode",)}  # programs that another one needs
SYMBOL = "b"  # the batch size of a program for any number of images


@dataclasses.dataclass(frozen=True)
class ModelFunction:
    """Holds a function that becomes a program, with the shapes of what it takes.

    Attributes:
        name: name of the program.
        function: (params, options, seed, *batch) -> arrays with a leading batch axis.
        batch: shapes of the arrays of one image.
        samples: whether it reads options and seed.
        most_kept: largest number of tokens that an edit may keep; 0 for other programs.
    """

    name: str
    function: Callable[..., jax.Array]
    batch: tuple[jax.ShapeDtypeStruct, ...]
    samples: bool = False
    most_kept: int = 0


def model_functions(model: Any, options: Any, what: Sequence[str]) -> Iterator[ModelFunction]:
    """Yields the functions of a pipeline that are exported.

    Args:
        model: pipeline of a family.
        options: checked sampling options, whose kind the programs are compiled for.
        what: names of the programs, of `KINDS`.
    """
    pure, shape = model.pure, jax.ShapeDtypeStruct
    label, index = shape((), jnp.int32), shape((), jnp.uint32)
    image, pixels = (shape(model.image_shape, dtype) for dtype in (jnp.float32, jnp.uint8))
    token_BL = jax.eval_shape(pure.encode, model.weights.shapes, _batch_of(1, image))
    token = shape(token_BL.shape[1:], token_BL.dtype)
    keep = shape(model.edit_shape, jnp.bool_)

    def draw(function, params, options, seed, label_B, index_B, *known):
        return function(params, options, label_B, image_keys(seed, index_B), *known)

    def without_options(function, params, options, seed, array_B):
        return function(params, array_B)

    bind = functools.partial
    if "sample" in what:
        sample = bind(draw, pure.sampler(options))
        yield ModelFunction("sample", sample, (label, index), samples=True)
    if "encode" in what:
        encode = bind(without_options, pure.encode)
        yield ModelFunction("encode", encode, (image,))
        # Division by 255 rounds differently outside of the program.
        yield ModelFunction("encode_uint8", encode, (pixels,))
    if "decode" in what:
        yield ModelFunction("decode", bind(without_options, pure.decode), (token,))
    if "edit" in what:
        for most_kept, edit in pure.editors(options).items():
            batch = label, index, token, keep
            yield ModelFunction("edit", bind(draw, edit), batch, True, most_kept)


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Lists what a program takes.

    Attributes:
        weights: shapes of the weights, by path.
        numbers: types of the seed and the options, by path.
    """

    weights: Mapping[str, jax.ShapeDtypeStruct]
    numbers: Mapping[str, jax.ShapeDtypeStruct]

    def only(self, weights: Collection[str], numbers: Collection[str]) -> "Inputs":
        """Returns the inputs of these paths."""
        return Inputs(
            {path: x for path, x in self.weights.items() if path in weights},
            {path: x for path, x in self.numbers.items() if path in numbers},
        )


def every_input(function: ModelFunction, weights: PyTree, options: Any) -> Inputs:
    """Returns all that a function takes, which is often more than it reads.

    Args:
        function: function to export.
        weights: shapes of all parameters.
        options: checked sampling options.
    """
    numbers = {
        path: jax.ShapeDtypeStruct((), jnp.result_type(x), weak_type=True)
        for path, x in trees.paths(options).items()
    }
    seed = {"seed": jax.ShapeDtypeStruct((), jnp.uint32)}
    return Inputs(trees.paths(weights), seed | numbers if function.samples else {})


def read_paths(exported: export.Exported, inputs: Inputs) -> tuple[set[str], set[str]]:
    """Returns the paths of the weights and numbers that a program reads.

    Args:
        exported: program with a fixed batch size, of which JAX knows what it reads.
        inputs: weights and numbers that the program takes.
    """
    weights, numbers = sorted(inputs.weights), sorted(inputs.numbers)
    kept = set(exported.module_kept_var_idx)
    return (
        {path for i, path in enumerate(weights) if i in kept},
        {path for i, path in enumerate(numbers, len(weights)) if i in kept},
    )


def export_program(
    function: ModelFunction,
    weights: PyTree,
    options: Any,
    inputs: Inputs,
    batch_size: int | None,
    platform: str,
) -> export.Exported:
    """Exports a function as a program.

    Args:
        function: function to export.
        weights: shapes of all parameters.
        options: sampling options, whose numbers the program uses where they are no inputs.
        inputs: weights and numbers that the program takes.
        batch_size: number of images; None for any number.
        platform: platform to compile for, "cpu", "cuda" or "tpu".
    """
    leaves, structure = trees.paths(weights), jax.tree.structure(weights)
    numbers, options_structure = trees.paths(options), jax.tree.structure(options)

    def program(given_leaves, given_numbers, batch):
        # What the function does not read is no input; anything of its shape may take its place.
        params = [
            given_leaves[path] if path in given_leaves else jnp.zeros(x.shape, x.dtype)
            for path, x in leaves.items()
        ]
        values = [given_numbers.get(path, value) for path, value in numbers.items()]
        return function.function(
            jax.tree.unflatten(structure, params),
            jax.tree.unflatten(options_structure, values),
            given_numbers.get("seed", 0),
            *batch,
        )

    rows = export.symbolic_shape(SYMBOL)[0] if batch_size is None else batch_size
    batch = [_batch_of(rows, x) for x in function.batch]
    exported = export.export(jax.jit(program), platforms=[platform])
    return exported(dict(inputs.weights), dict(inputs.numbers), batch)


def _batch_of(rows: Any, one: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((rows, *one.shape), one.dtype)
