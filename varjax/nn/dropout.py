"""Dropout whose masks come from a key for each example, so that no batch or mesh changes them."""

import flax.struct
import jax
import jax.numpy as jnp


@flax.struct.dataclass
class Dropout:
    """Sets a share of numbers to 0 and divides the others by what is left (Srivastava et al. 2014).

        dropout = Dropout(key_B, rate=0.1)
        y_BlC = dropout.fold_in(layer)(x_BlC)

    Attributes:
        key_B: a random key for each example.
        rate: the share; 0 leaves everything as it is.
    """

    key_B: jax.Array
    rate: float = flax.struct.field(pytree_node=False)

    def fold_in(self, number: int | jax.Array) -> "Dropout":
        """Returns the dropout of another place in the network, which draws other masks."""
        return self.replace(key_B=jax.vmap(jax.random.fold_in, (0, None))(self.key_B, number))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Drops numbers of x, whose first axis is that of the keys."""
        return jax.vmap(drop, (0, 0, None))(self.key_B, x, self.rate) if self.rate else x


def drop(key: jax.Array, x: jax.Array, rate: float) -> jax.Array:
    """Drops numbers of x with a single key."""
    kept = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(kept, x / (1 - rate), 0)
