"""What codes have to stand for, and how to find some for it: pure functions of vectors."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from varjax.nn import resize
from varjax.tokenizers.vq.pyramid import Pyramid

LLOYD = 10  # iterations of k-means
NOISE = 0.01  # of the vectors' size, so that no two codes are equal
SHARPNESS = 10.0  # of soft choices: probabilities fall by e for each tenth of the mean distance


def scale_inputs(pyramid: Pyramid, f_BhwZ: jax.Array, f_hats: Sequence[jax.Array]):
    """What each scale has to find codes for, K arrays (B, l, Z): what the coarser ones left."""
    found, rest_BhwZ = [], f_BhwZ
    for shape, f_hat_BhwZ in zip(pyramid.shapes, f_hats, strict=True):
        z_BhwZ = resize.area(rest_BhwZ, shape)
        found.append(z_BhwZ.reshape(len(z_BhwZ), -1, z_BhwZ.shape[-1]))
        rest_BhwZ = f_BhwZ - jax.lax.stop_gradient(f_hat_BhwZ)
    return found


def kmeans(z_NZ: jax.Array, vocab: int, key: jax.Array) -> jax.Array:
    """(V, Z): the centers that Lloyd's algorithm finds from random ones of the vectors."""
    order_key, noise_key = jax.random.split(key)
    order_N = jax.random.permutation(order_key, len(z_NZ))
    start_VZ = _noisy(z_NZ[order_N[jnp.arange(vocab) % len(z_NZ)]], noise_key)

    def improve(codes_VZ, _):
        dot_NV = jnp.einsum("NZ,VZ->NV", z_NZ, codes_VZ, precision="highest")
        distance_NV = jnp.sum(jnp.square(codes_VZ), axis=-1)[None] - 2 * dot_NV
        own_NV = jax.nn.one_hot(jnp.argmin(distance_NV, axis=-1), vocab)
        sum_VZ = jnp.einsum("NV,NZ->VZ", own_NV, z_NZ, precision="highest")
        count_V1 = jnp.sum(own_NV, axis=0)[:, None]
        return jnp.where(count_V1 > 0, sum_VZ / jnp.maximum(count_V1, 1), codes_VZ), None

    return jax.lax.scan(improve, start_VZ, None, LLOYD)[0]


def draw(pyramid: Pyramid, z_BLZ: jax.Array, count: int, key: jax.Array) -> jax.Array:
    """(count, Z) of the vectors, as many of each scale."""
    image_key, scale_key, place_key, noise_key = jax.random.split(key, 4)
    image = jax.random.randint(image_key, (count,), 0, len(z_BLZ))
    scale = jax.random.randint(scale_key, (count,), 0, len(pyramid))
    length = jnp.array(pyramid.lengths)[scale]
    place = jnp.floor(jax.random.uniform(place_key, (count,)) * length.astype(jnp.float32))
    start = jnp.array([part.start for part in pyramid.slices])[scale]
    place = start + jnp.minimum(place.astype(jnp.int32), length - 1)
    return _noisy(z_BLZ[image, place], noise_key)


def entropy_loss(codebook_VZ: jax.Array, inputs: Sequence[jax.Array], cosine: bool) -> jax.Array:
    """Mean over scales of E[H(p)] - H(E[p]), p being a vector's soft choice of codes (V,).

    inputs: K arrays (B, l, Z).
    """
    losses = []
    for z_BlZ in inputs:
        z_NZ, codes_VZ = z_BlZ.reshape(-1, z_BlZ.shape[-1]), codebook_VZ
        if cosine:
            z_NZ, codes_VZ = (x / (jnp.linalg.norm(x, axis=-1, keepdims=True) + 1e-8)
                              for x in (z_NZ, codes_VZ))  # fmt: skip
        dot_NV = jnp.einsum("NZ,VZ->NV", z_NZ, codes_VZ, precision="highest")
        lengths_NV = jnp.sum(z_NZ**2, axis=-1)[:, None] + jnp.sum(codes_VZ**2, axis=-1)[None]
        distance_NV = lengths_NV - 2 * dot_NV
        unit = jax.lax.stop_gradient(jnp.mean(distance_NV)) + 1e-12
        log_NV = jax.nn.log_softmax(-SHARPNESS * distance_NV / unit)
        sure = -jnp.mean(jnp.sum(jnp.exp(log_NV) * log_NV, axis=-1))
        mean_V = jnp.mean(jnp.exp(log_NV), axis=0)
        losses.append(sure + jnp.sum(mean_V * jnp.log(mean_V + 1e-12)))
    return jnp.mean(jnp.stack(losses))


def _noisy(z_NZ, key):
    size = jnp.sqrt(jnp.mean(jnp.square(z_NZ)))
    return z_NZ + NOISE * size * jax.random.normal(key, z_NZ.shape)
