"""A stack of equal layers: parameters and key-value cache along an axis S, run by one scan."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from varjax.errors import InputError
from varjax.nn.compute import ComputeConfig, checkpoint_layer, shard_batch
from varjax.trees import PyTree


@flax.struct.dataclass
class KVCache:
    """Holds keys and values of all layers, for tokens that come one after another.

    All heads are concatenated along one axis, C = A·D: with axes A and D a TPU would pad D to 128.

    Attributes:
        keys_SBLC: keys of all tokens, of every layer.
        values_SBLC: values of all tokens, of every layer.
    """

    keys_SBLC: jax.Array
    values_SBLC: jax.Array

    @classmethod
    def allocate(
        cls, depth: int, batch: int, length: int, width: int, dtype: Any, zeros: bool = True
    ) -> "KVCache":
        """Makes a cache in which nothing is written yet.

        Args:
            depth: number of layers S.
            batch: number of examples B.
            length: length L of the whole sequence.
            width: total channels C of all heads.
            dtype: dtype of keys and values.
            zeros: whether to fill it with zeros, which is required if unwritten entries are read,
                and masked; False leaves the memory as it is, which is faster.
        """
        make = jnp.zeros if zeros else jax.lax.empty
        shape = depth, batch, length, width
        return cls(make(shape, dtype), make(shape, dtype))

    def resized(self, batch: int, length: int) -> "KVCache":
        """Keeps the first `batch` examples, with room for a sequence of `length` tokens."""
        padding = (0, 0), (0, 0), (0, length - self.keys_SBLC.shape[2]), (0, 0)
        return jax.tree.map(lambda x_SBLC: jnp.pad(x_SBLC[:, :batch], padding), self)


@flax.struct.dataclass
class LayerCache:
    """Gives one layer its part of a cache, and takes what the layer adds.

    Attributes:
        cache: cache of all layers.
        number: index of the layer, from 0.
        start: position of the first new token in the sequence.
        stop: number of tokens that are read, from the first; static.
    """

    cache: KVCache
    number: int | jax.Array
    start: int | jax.Array
    stop: int = flax.struct.field(pytree_node=False)

    @jax.named_scope("cache")
    def write(self, k_BlC: jax.Array, v_BlC: jax.Array) -> "LayerCache":
        """Writes new tokens; returns the cache with them."""

        def write(all_SBLC, new_BlC):
            index = (self.number, 0, self.start, 0)
            return jax.lax.dynamic_update_slice(all_SBLC, new_BlC[None], index)

        keys_SBLC = write(self.cache.keys_SBLC, k_BlC)
        values_SBLC = write(self.cache.values_SBLC, v_BlC)
        cache = KVCache(keys_SBLC, values_SBLC)
        return LayerCache(cache, self.number, self.start, self.stop)

    @jax.named_scope("cache")
    def read(self, first: int | jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values to attend to, (count, stop, C), of some examples.

        Args:
            first: number of the first example.
            count: number of examples.
        """

        def read(all_SBLC):
            sizes = 1, count, self.stop, all_SBLC.shape[-1]
            return jax.lax.dynamic_slice(all_SBLC, (self.number, first, 0, 0), sizes)[0]

        return read(self.cache.keys_SBLC), read(self.cache.values_SBLC)


def init_stack(
    init: Callable[[jax.Array], Mapping[str, PyTree]], key: jax.Array, depth: int
) -> PyTree:
    """Draws the parameters of `depth` layers, stacked along a leading axis S.

    init: makes the variables of one layer from a key.
    """
    return jax.vmap(lambda key: init(key)["params"])(jax.random.split(key, depth))


def stacked_param(
    module: nn.Module, name: str, init: Callable[[jax.Array], PyTree], depth: int
) -> PyTree:
    """Declares the parameters of a stack of layers in a module's `setup`.

    `module.param` compares all shapes in every call, and traces the initialization of the layers
    for it: a third of the time that tracing a sampler takes. This compares only the depth, because
    each layer compares the other shapes when it is applied.

    Args:
        module: module that holds the stack.
        name: name of the parameters.
        init: draws them, with `init_stack`.
        depth: number of layers.
    """
    if not module.has_variable("params", name):
        return module.param(name, init)
    params = module.get_variable("params", name)
    layers = len(jax.tree.leaves(params)[0])
    if layers != depth:
        raise InputError(f"{name}: the parameters have {layers} layers, but the config has {depth}")
    return params


def run_stack(
    block: nn.Module,
    params: PyTree,
    x_BlC: jax.Array,
    compute: ComputeConfig,
    *,
    cache: KVCache | None = None,
    start: int | jax.Array = 0,
    stop: int | None = None,
    by_layer: Mapping[str, PyTree] | None = None,
    **shared: Any,
) -> tuple[jax.Array, KVCache | None]:
    """Runs a block's layers one after another.

    Args:
        block: module of one layer, called with tokens, its part of the cache, and the keywords of
            `by_layer` and `shared`; it returns the tokens and the cache.
        params: parameters of all layers, from `init_stack`.
        x_BlC: tokens to process.
        compute: whether layers are unrolled, and what the backward pass recomputes.
        cache: keys and values of earlier tokens, to which these are added; None in training.
        start: position of the first of these tokens in the cache.
        stop: number of positions of the cache that layers read; None for all.
        by_layer: keyword arguments that differ between layers, stacked along a leading axis S.
        shared: keyword arguments that are the same for all layers.

    Returns:
        The tokens (B, l, C), and the cache with them (None without one).
    """

    def layer(carry, scanned):
        x_BlC, cache = carry
        number, params, own = scanned
        past = None
        if cache is not None:
            length = cache.keys_SBLC.shape[2] if stop is None else stop
            past = LayerCache(cache, number, start, length)
        return block.apply({"params": params}, shard_batch(x_BlC), past, **own, **shared), None

    depth = len(jax.tree.leaves(params)[0])
    carry, _ = jax.lax.scan(
        checkpoint_layer(layer, compute),
        (x_BlC, cache),
        (jnp.arange(depth), params, dict(by_layer or {})),
        unroll=depth if compute.unroll else 1,
    )
    return carry
