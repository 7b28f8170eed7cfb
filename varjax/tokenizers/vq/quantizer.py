"""Multi-scale residual quantization (VAR, algorithms 1 and 2): a feature map <-> K token maps.

Everything that rebuilds features from tokens (tokenizer training, teacher forcing, sampling,
editing) goes through `add_scale` and `next_input`.
"""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from varjax.nn import resize
from varjax.tokenizers.vq.pyramid import Pyramid

UNIT_EPSILON = 1e-12  # F.normalize's, in the reference's cosine look-up


@flax.struct.dataclass
class Quantized:
    """Holds the result of quantizing features.

    Attributes:
        tokens_BL: code indices, int32, the scales concatenated.
        f_hats: K maps (B, h, w, Z); the k-th is the sum of scales 0 … k.
    """

    tokens_BL: jax.Array
    f_hats: tuple[jax.Array, ...]


class Quantizer(nn.Module):
    """Quantizes features with one codebook for all scales, and φ convolutions after upsampling.

    Attributes:
        pyramid: the sizes of the K token maps.
        vocab: number of codes V.
        code_channels: number of channels Z of a code.
        num_phi: number of φ convolutions that the scales share; 0 for one per scale.
        phi_ratio: weight r of the convolution in φ(x) = r·conv(x) + (1-r)·x.
        cosine: whether the nearest code is the one with the largest cosine, instead of the smallest
            distance.
    """

    pyramid: Pyramid
    vocab: int
    code_channels: int
    num_phi: int
    phi_ratio: float
    cosine: bool

    def setup(self):
        V, Z, P = self.vocab, self.code_channels, self.num_phi or len(self.pyramid)
        self.codebook_VZ = self.param("codebook", _uniform(1 / V), (V, Z), jnp.float32)
        bound = (9 * Z) ** -0.5
        self.phi_kernel = self.param("phi_kernel", _uniform(bound), (P, 3, 3, Z, Z), jnp.float32)
        self.phi_bias = self.param("phi_bias", _uniform(bound), (P, Z), jnp.float32)

    def __call__(self, f_BhwZ: jax.Array, kept_B: jax.Array | None = None) -> Quantized:
        """Quantizes, scale by scale, the residual of the coarser ones, in float32.

        Gradients reach the codebook and φ through f_hats; the choice of codes has none.

        Args:
            f_BhwZ: features with the size of the finest scale.
            kept_B: number of scales that are added up for each image; its further f_hats repeat the
                last sum. None for all.
        """
        f_BhwZ = jax.lax.stop_gradient(f_BhwZ.astype(jnp.float32))
        tokens, f_hats = [], []
        f_hat_BhwZ = jnp.zeros_like(f_BhwZ)
        for k, shape in enumerate(self.pyramid.shapes):
            residual_BhwZ = f_BhwZ - jax.lax.stop_gradient(f_hat_BhwZ)
            tokens.append(self.nearest_codes(_flat(resize.area(residual_BhwZ, shape))))
            added_BhwZ = self.add_scale(f_hat_BhwZ, self.look_up(tokens[-1]), k)
            if kept_B is not None:
                added_BhwZ = jnp.where((k < kept_B)[:, None, None, None], added_BhwZ, f_hat_BhwZ)
            f_hat_BhwZ = added_BhwZ
            f_hats.append(f_hat_BhwZ)
        return Quantized(jnp.concatenate(tokens, axis=1), tuple(f_hats))

    def nearest_codes(self, z_BlZ: jax.Array) -> jax.Array:
        """Returns the index of each vector's nearest code, (B, l) int32, found in float32."""
        codebook_VZ = self.codebook_VZ
        if self.cosine:
            # The largest cosine; the length of z does not change the choice.
            codebook_VZ = unit_vectors(codebook_VZ)
        dot_BlV = jnp.einsum("BlZ,VZ->BlV", z_BlZ, codebook_VZ, precision="highest")
        if self.cosine:
            return jnp.argmax(dot_BlV, axis=-1).astype(jnp.int32)
        z2_Bl1 = jnp.sum(jnp.square(z_BlZ), axis=-1, keepdims=True)
        e2_11V = jnp.sum(jnp.square(codebook_VZ), axis=-1)[None, None]
        distance_BlV = z2_Bl1 + e2_11V - 2 * dot_BlV
        return jnp.argmin(distance_BlV, axis=-1).astype(jnp.int32)

    def look_up(self, tokens_Bl: jax.Array) -> jax.Array:
        """Returns the codes (B, l, Z) of (B, l) indices."""
        return jnp.take(self.codebook_VZ, tokens_Bl, axis=0, mode="clip")

    def mix_codes(self, weights_BlV: jax.Array) -> jax.Array:
        """Returns the codes' averages (B, l, Z) by (B, l, V) weights: soft choices of codes."""
        return jnp.einsum("BlV,VZ->BlZ", weights_BlV, self.codebook_VZ, precision="highest")

    def add_scale(self, f_hat_BhwZ: jax.Array, codes_BlZ: jax.Array, k: int) -> jax.Array:
        """Adds scale k to f_hat: its codes, upsampled bicubically to f_hat's size, through φ.

        Args:
            f_hat_BhwZ: the sum of the scales before k.
            codes_BlZ: scale k's codes, looked up or mixed.
            k: index of the scale, from 0.

        Returns:
            The sum of scales 0 … k, (B, h, w, Z).
        """
        h, w = self.pyramid.shapes[k]
        codes_BhwZ = codes_BlZ.reshape(codes_BlZ.shape[0], h, w, self.code_channels)
        x_BhwZ = resize.bicubic(codes_BhwZ, self.pyramid.finest)
        p = self.pyramid.phi_index(self.num_phi)[k]
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
        """Downsamples f_hat to the transformer's input for scale k+1, (B, l of k+1, Z)."""
        return _flat(resize.area(f_hat_BhwZ, self.pyramid.shapes[k + 1]))

    def accumulated_scales(self, tokens_BL: jax.Array) -> tuple[jax.Array, ...]:
        """Rebuilds the f_hats of `__call__` from its tokens."""
        f_hats, f_hat_BhwZ = [], self.initial_f_hat(tokens_BL.shape[0])
        for k, scale in enumerate(self.pyramid.slices):
            f_hat_BhwZ = self.add_scale(f_hat_BhwZ, self.look_up(tokens_BL[:, scale]), k)
            f_hats.append(f_hat_BhwZ)
        return tuple(f_hats)

    def teacher_forcing_input(self, f_hats: Sequence[jax.Array]) -> jax.Array:
        """Returns the transformer's input for all scales but the first, (B, L - l of k=0, Z)."""
        inputs = [self.next_input(f_hat, k) for k, f_hat in enumerate(f_hats[:-1])]
        empty = jnp.zeros((f_hats[0].shape[0], 0, self.code_channels), jnp.float32)
        return jnp.concatenate([empty, *inputs], axis=1)

    def initial_f_hat(self, batch_size: int) -> jax.Array:
        """Returns the f_hat (B, h, w, Z) before any scale is added: zeros."""
        return jnp.zeros((batch_size, *self.pyramid.finest, self.code_channels), jnp.float32)


def quantizer_loss(
    f_BhwZ: jax.Array,
    f_hats: Sequence[jax.Array],
    beta: float,
    kept_B: jax.Array | None = None,
) -> jax.Array:
    """Computes the codebook and commitment losses, |f_hat_k - sg(f)|² + β·|sg(f_hat_k) - f|².

    Mean squares of each image, averaged over scales (VAR's eq. 5).

    Args:
        f_BhwZ: features, before quantization.
        f_hats: K maps (B, h, w, Z), as in `Quantized`.
        beta: weight of the commitment loss.
        kept_B: number of each image's scales that count, from the first; None for all.

    Returns:
        (B,) losses.
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


def code_counts(
    pyramid: Pyramid, vocab: int, tokens_BL: jax.Array, weight_B: jax.Array
) -> jax.Array:
    """Counts how often each scale uses each code.

    Args:
        pyramid: the sizes of the scales.
        vocab: number of codes V.
        tokens_BL: code indices, the scales concatenated.
        weight_B: weight of each image: 1, or 0 for padding.

    Returns:
        (K, V) float32 counts.
    """
    weight_Bl = weight_B.astype(jnp.float32)[:, None]
    return jnp.stack(
        [jnp.zeros(vocab).at[tokens_BL[:, scale]].add(weight_Bl) for scale in pyramid.slices]
    )


def code_perplexity(count_KV: Any, xp: Any) -> Any:
    """Computes e^entropy of each row (K,): the number of codes in use if all were used equally.

    xp: jnp, or np for host arrays.
    """
    p_KV = count_KV / xp.sum(count_KV, axis=-1, keepdims=True)
    return xp.exp(-xp.sum(p_KV * xp.log(xp.maximum(p_KV, 1e-12)), axis=-1))


def unit_vectors(x: jax.Array) -> jax.Array:
    """Scales vectors (the last axis) to length 1; zeros stay zeros and have a finite gradient.

    Like PyTorch's `F.normalize`: divided by the length, or by 1e-12 if that is larger.
    """
    squared_length = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return x / jnp.sqrt(jnp.maximum(squared_length, UNIT_EPSILON**2))


def _flat(x_BhwZ):
    return x_BhwZ.reshape(x_BhwZ.shape[0], -1, x_BhwZ.shape[-1])


def _uniform(bound):
    def init(key, shape, dtype):
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init
