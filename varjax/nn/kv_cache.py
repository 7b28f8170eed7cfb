"""Keys and values of the tokens seen so far (a KV cache), in one array for all layers."""

from typing import Any

import flax.struct
import jax
import jax.numpy as jnp


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
            dtype: number format of keys and values.
            zeros: whether to fill it with zeros, which is required if unwritten entries are read,
                and masked; False leaves the memory as it is, which is faster.
        """
        make = jnp.zeros if zeros else jax.lax.empty
        shape = depth, batch, length, width
        return cls(make(shape, dtype), make(shape, dtype))


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

        def put(all_SBLC, new_BlC):
            place = (self.number, 0, self.start, 0)
            return jax.lax.dynamic_update_slice(all_SBLC, new_BlC[None], place)

        keys_SBLC = put(self.cache.keys_SBLC, k_BlC)
        values_SBLC = put(self.cache.values_SBLC, v_BlC)
        cache = KVCache(keys_SBLC, values_SBLC)
        return LayerCache(cache, self.number, self.start, self.stop)

    @jax.named_scope("cache")
    def read(self, first: int | jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
        """Returns keys and values to attend to, (count, stop, C), of some examples.

        Args:
            first: number of the first example.
            count: number of examples.
        """

        def some(all_SBLC):
            sizes = 1, count, self.stop, all_SBLC.shape[-1]
            return jax.lax.dynamic_slice(all_SBLC, (self.number, first, 0, 0), sizes)[0]

        return some(self.cache.keys_SBLC), some(self.cache.values_SBLC)
