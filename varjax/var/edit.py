"""Zero-shot editing: sampling in which the tokens to keep are the image's own."""

import jax
import jax.numpy as jnp
import numpy as np

from varjax.nn import resize
from varjax.tokenizers.vq.pyramid import Pyramid


def keep_at_every_scale(pyramid: Pyramid, keep_Bhw: jax.Array | np.ndarray) -> jax.Array:
    """(B, h, w) bool over the finest map -> (B, L) bool: bilinear to each scale, more than half.

    The first scale, if it is a single token, is always kept, as in the reference.
    """
    weight_Bhw1 = jnp.asarray(keep_Bhw, jnp.float32)[..., None]
    keeps = []
    for shape in pyramid.shapes:
        keep = resize.bilinear(weight_Bhw1, shape).reshape(weight_Bhw1.shape[0], -1) > 0.5
        keeps.append(keep | (shape == (1, 1)))
    return jnp.concatenate(keeps, axis=1)
