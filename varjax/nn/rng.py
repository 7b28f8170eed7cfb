"""The random streams: which number is folded into a key for what, so that no two draws collide.

A key belongs to a run's first state, to a training step, or to one image; each kind has its own
numbers. Changing a number changes runs and samples, so numbers are never changed or used again.
"""

import enum

import jax


@enum.unique
class ImageStream(enum.IntEnum):
    """Names what is drawn from the key of one image, in training or sampling.

        order_key_B = stream_keys(key_B, ImageStream.ORDER)

    VAR's sampler folds in the index of the scale instead, and DiffAugment the index of the
    augmentation; neither shares its keys with a stream of such a small number.
    """

    ORDER = 0  # in which MAR's tokens become known
    NOISE = 1  # of MAR's sampler: normal or Gumbel noise
    TIMESTEP = 2  # of the diffusion loss
    DIFFUSION_NOISE = 3  # of the diffusion loss
    ATTENTION_DROPOUT = 4
    DROPOUT = 5
    LABEL = 6  # whether MAR's training drops it
    LATENT = 7  # noise by which MAR's training samples the tokenizer's posterior
    MASK_RATIO = 8  # in MAR's evaluation
    SCALE_DROPOUT = 101  # in the VQ tokenizer's training
    POSTERIOR = 102  # noise in the KL tokenizer's training


@enum.unique
class StepStream(enum.IntEnum):
    """Names what is drawn from the key of a training step; images fold in their index, from 0."""

    CODEBOOK = 2**31 - 1  # vectors for k-means or for dead codes


@enum.unique
class InitStream(enum.IntEnum):
    """Names what is drawn from the key of a run's first state, apart from the model itself."""

    DISCRIMINATOR = 1
    CODEBOOK = 2


def stream_key(key: jax.Array, stream: ImageStream | StepStream | InitStream) -> jax.Array:
    """Returns the key of a stream, from the key of an image, a step or a run's first state."""
    return jax.random.fold_in(key, int(stream))


def stream_keys(key_B: jax.Array, stream: ImageStream) -> jax.Array:
    """Returns the key of a stream for each image, (B,)."""
    return jax.vmap(jax.random.fold_in, (0, None))(key_B, int(stream))
