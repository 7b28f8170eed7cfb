"""Multi-scale residual quantization (VAR, algorithms 1 and 2): a feature map <-> K token maps.

Everything that rebuilds features from tokens (tokenizer training, teacher forcing, sampling,
editing) goes through `add_scale` and `next_input`.
"""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from varjax.nn import resize
from varjax.tokenizers.vq.pyramid import Pyramid


@flax.struct.dataclass
class Quantized:
    """tokens_BL: code indices, int32. f_hats: K maps (B, h, w, Z), the sum of scales 0 … k."""

    tokens_BL: jax.Array
    f_hats: tuple[jax.Array, ...]


class Quantizer(nn.Module):
    """One code book of V codes of Z numbers for all scales, and the φ convolutions.

    phis: number of φ convolutions shared by the scales (0: one per scale); φ(x) = r·conv(x) +
    (1-r)·x with r = `phi_ratio`. cosine: nearest by angle instead of by distance.
    """

    pyramid: Pyramid
    vocab: int
    code_channels: int
    phis: int
    phi_ratio: float
    cosine: bool

    def setup(self):
        V, Z, P = self.vocab, self.code_channels, self.phis or len(self.pyramid)
        self.codebook_VZ = self.param("codebook", _uniform(1 / V), (V, Z), jnp.float32)
        bound = (9 * Z) ** -0.5
        self.phi_kernel = self.param("phi_kernel", _uniform(bound), (P, 3, 3, Z, Z), jnp.float32)
        self.phi_bias = self.param("phi_bias", _uniform(bound), (P, Z), jnp.float32)

    def __call__(self, f_BhwZ: jax.Array, kept_B: jax.Array | None = None) -> Quantized:
        """Quantizes scale by scale what the coarser ones left over, in float32.

        kept_B: how many scales each image adds up; beyond them its f_hats stay as they are.
        Gradients reach the code book and φ through f_hats; the choice of codes has none.
        """
        f_BhwZ = jax.lax.stop_gradient(f_BhwZ.astype(jnp.float32))
        tokens, f_hats = [], []
        f_hat_BhwZ = jnp.zeros_like(f_BhwZ)
        for k, shape in enumerate(self.pyramid.shapes):
            rest_BhwZ = f_BhwZ - jax.lax.stop_gradient(f_hat_BhwZ)
            tokens.append(self.nearest(_flat(resize.area(rest_BhwZ, shape))))
            added_BhwZ = self.add_scale(f_hat_BhwZ, self.look_up(tokens[-1]), k)
            if kept_B is not None:
                added_BhwZ = jnp.where((k < kept_B)[:, None, None, None], added_BhwZ, f_hat_BhwZ)
            f_hat_BhwZ = added_BhwZ
            f_hats.append(f_hat_BhwZ)
        return Quantized(jnp.concatenate(tokens, axis=1), tuple(f_hats))

    def nearest(self, z_BlZ: jax.Array) -> jax.Array:
        """(B, l, Z) -> (B, l) int32, the index of the nearest code, in float32."""
        codebook_VZ = self.codebook_VZ
        if self.cosine:
            # The largest cosine; the length of z does not change which one that is.
            codebook_VZ = codebook_VZ / jnp.linalg.norm(codebook_VZ, axis=-1, keepdims=True)
        dot_BlV = jnp.einsum("BlZ,VZ->BlV", z_BlZ, codebook_VZ, precision="highest")
        if self.cosine:
            return jnp.argmax(dot_BlV, axis=-1).astype(jnp.int32)
        z2_Bl1 = jnp.sum(jnp.square(z_BlZ), axis=-1, keepdims=True)
        e2_11V = jnp.sum(jnp.square(codebook_VZ), axis=-1)[None, None]
        distance_BlV = z2_Bl1 + e2_11V - 2 * dot_BlV
        return jnp.argmin(distance_BlV, axis=-1).astype(jnp.int32)

    def look_up(self, tokens_Bl: jax.Array) -> jax.Array:
        """(B, l) indices -> (B, l, Z) codes."""
        return jnp.take(self.codebook_VZ, tokens_Bl, axis=0, mode="clip")

    def mix(self, weights_BlV: jax.Array) -> jax.Array:
        """(B, l, V) weights over the codes -> (B, l, Z), the mixed codes."""
        return jnp.einsum("BlV,VZ->BlZ", weights_BlV, self.codebook_VZ, precision="highest")

    def add_scale(self, f_hat_BhwZ: jax.Array, codes_BlZ: jax.Array, k: int) -> jax.Array:
        """f_hat plus scale k: its codes (hard or soft) bicubically up to (h, w), then φ."""
        h, w = self.pyramid.shapes[k]
        codes_BhwZ = codes_BlZ.reshape(codes_BlZ.shape[0], h, w, self.code_channels)
        x_BhwZ = resize.bicubic(codes_BhwZ, self.pyramid.finest)
        p = self.pyramid.phi_index(self.phis)[k]
        conv_BhwZ = jax.lax.conv_general_dilated(
            x_BhwZ,
            self.phi_kernel[p],
            window_strides=(1, 1),
            padding="SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            precision="highest",
        )
        ratio = self.phi_ratio
        phi_BhwZ = ratio * (conv_BhwZ + self.phi_bias[p, None, None, None]) + (1 - ratio) * x_BhwZ
        return f_hat_BhwZ + phi_BhwZ

    def next_input(self, f_hat_BhwZ: jax.Array, k: int) -> jax.Array:
        """What the transformer reads after scale k, to predict scale k+1: (B, l of k+1, Z)."""
        return _flat(resize.area(f_hat_BhwZ, self.pyramid.shapes[k + 1]))

    def accumulate(self, tokens_BL: jax.Array) -> tuple[jax.Array, ...]:
        """The f_hats of `__call__` from its tokens."""
        f_hats, f_hat_BhwZ = [], self.empty(tokens_BL.shape[0])
        for k, scale in enumerate(self.pyramid.slices):
            f_hat_BhwZ = self.add_scale(f_hat_BhwZ, self.look_up(tokens_BL[:, scale]), k)
            f_hats.append(f_hat_BhwZ)
        return tuple(f_hats)

    def teacher_input(self, f_hats) -> jax.Array:
        """The transformer's input for all scales but the first, (B, L - l of scale 0, Z)."""
        inputs = [self.next_input(f_hat, k) for k, f_hat in enumerate(f_hats[:-1])]
        empty = jnp.zeros((f_hats[0].shape[0], 0, self.code_channels), jnp.float32)
        return jnp.concatenate([empty, *inputs], axis=1)

    def empty(self, batch: int) -> jax.Array:
        """The f_hat (B, h, w, Z) before any scale is added: zeros."""
        return jnp.zeros((batch, *self.pyramid.finest, self.code_channels), jnp.float32)


def quantizer_loss(
    f_BhwZ: jax.Array, f_hats, beta: float, kept_B: jax.Array | None = None
) -> jax.Array:
    """(B,): mean over scales of β·|sg(f_hat_k) - f|² + |f_hat_k - sg(f)|² (VAR's eq. 5).

    kept_B: over so many scales of each image, from the first; None for all.
    """
    f_BhwZ = f_BhwZ.astype(jnp.float32)
    stop = jax.lax.stop_gradient

    def distance(a_BhwZ, b_BhwZ):
        return jnp.mean(jnp.square(a_BhwZ - b_BhwZ), axis=(1, 2, 3))

    losses = [
        beta * distance(stop(f_hat), f_BhwZ) + distance(f_hat, stop(f_BhwZ)) for f_hat in f_hats
    ]
    if kept_B is None:
        return jnp.mean(jnp.stack(losses), axis=0)
    kept_KB = jnp.arange(len(losses))[:, None] < kept_B[None]
    return jnp.mean(jnp.stack(losses), axis=0, where=kept_KB)


def _flat(x_BhwZ):
    return x_BhwZ.reshape(x_BhwZ.shape[0], -1, x_BhwZ.shape[-1])


def _uniform(bound):
    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
