"""Class embeddings of labels: of one class each, or of several classes mixed by weights.

Labels are numbers (B,), in which `classes` means "no class", or weights (B, classes + 1) whose rows
sum to 1.
"""

import jax
import jax.numpy as jnp


def embed_classes(label_B: jax.Array, embedding_NC: jax.Array) -> jax.Array:
    """Returns the class embeddings (B, C), or their weighted sums.

    Args:
        label_B: numbers (B,) or weights (B, classes + 1) of classes.
        embedding_NC: embeddings of all classes, and of "no class" at the end.
    """
    if label_B.ndim == 1:
        return jnp.take(embedding_NC, label_B, axis=0, mode="clip")
    return jnp.einsum("BN,NC->BC", label_B, embedding_NC, precision="highest")


def no_class(label_B: jax.Array, classes: int) -> jax.Array:
    """Returns labels like these that all mean "no class"."""
    if label_B.ndim == 1:
        return jnp.full_like(label_B, classes)
    return jnp.zeros_like(label_B).at[:, classes].set(1)


def drop_labels(key: jax.Array, label: jax.Array, rate: float, classes: int) -> jax.Array:
    """Replaces labels, each with a probability of `rate`, by "no class", which is `classes`."""
    dropped = jax.random.bernoulli(key, rate, label.shape)
    return jnp.where(dropped, classes, label)
