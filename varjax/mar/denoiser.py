"""MAR's denoising MLP, which denoises each token by itself."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from varjax.nn.compute import ComputeConfig
from varjax.nn.linear import dense
from varjax.nn.stack import init_stack, stacked_param
from varjax.nn.transformer import layer_norm, modulate

SINUSOIDS = 256  # of a timestep's embedding
LONGEST_PERIOD = 10_000


class DenoisingMLP(nn.Module):
    """Residual blocks whose norms are modulated by a token's condition z and by the timestep.

        cond_NE = mlp.apply(params, z_NC, method=DenoisingMLP.condition)  # for all timesteps
        out_N2Z = mlp.apply(params, xt_NZ, t_N, cond_NE, method=DenoisingMLP.denoise)

    Attributes:
        channels: number of channels Z of a token.
        depth: number of residual blocks.
        width: number of channels E of the residual blocks.
        compute: dtype of the products inside. Inputs and outputs, the first and the last
            layer, the residual stream, its norms and all sums are float32: near t = 999 a sampler
            multiplies an error in the noise by hundreds.
    """

    channels: int
    depth: int
    width: int
    compute: ComputeConfig

    def setup(self):
        dtype, xavier = self.compute.jax_dtype, nn.initializers.xavier_uniform()
        normal, zeros = nn.initializers.normal(0.02), nn.initializers.zeros
        self.time_embed = TimestepEmbedding(self.width, dtype, normal)
        self.cond_embed = dense(self.width, dtype, xavier, None)
        self.input_proj = dense(self.width, jnp.float32, xavier, None)
        self.block = DenoisingBlock(self.width, dtype, parent=None)
        self.blocks = stacked_param(self, "blocks", self._init_blocks, self.depth)
        self.adaln = dense(2 * self.width, dtype, zeros, None)
        self.out = dense(2 * self.channels, jnp.float32, zeros, None)

    def condition(self, z_NC: jax.Array) -> jax.Array:
        """Computes what z contributes, (N, E), which is the same at every timestep."""
        return self.cond_embed(z_NC)

    def __call__(self, xt_NZ: jax.Array, t_N: jax.Array, z_NC: jax.Array) -> jax.Array:
        """Predicts the noise in tokens from z, as `denoise` does from `condition(z)`."""
        return self.denoise(xt_NZ, t_N, self.condition(z_NC))

    def denoise(self, xt_NZ: jax.Array, t_N: jax.Array, cond_NE: jax.Array) -> jax.Array:
        """Predicts the noise in tokens.

        Args:
            xt_NZ: noisy tokens x_t.
            t_N: timesteps of the tokens, 0 … 999; or a single one for all.
            cond_NE: conditioning vectors, from `condition`.

        Returns:
            (N, 2 Z) float32: the noise, and the variance's values in about [-1, 1].
        """
        x_NE = self.input_proj(xt_NZ)
        cond_NE = nn.silu(self.time_embed(t_N) + cond_NE.astype(jnp.float32))
        # A loop over slices instead of a scan: within a sampler's loop over timesteps, a scan would
        # copy every block's weights at each timestep.
        for i in range(self.depth):
            params = jax.tree.map(lambda p: p[i], self.blocks)  # noqa: B023  (used immediately)
            x_NE = self.block.apply({"params": params}, x_NE, cond_NE)
        shift_NE, scale_NE = jnp.split(self.adaln(cond_NE), 2, axis=-1)
        return self.out(modulate(x_NE, scale_NE, shift_NE, jnp.float32))

    def _init_blocks(self, key):
        x_NE = jnp.zeros((1, self.width), jnp.float32)
        return init_stack(lambda key: self.block.init(key, x_NE, x_NE), key, self.depth)


class DenoisingBlock(nn.Module):
    """x + gate · mlp(norm(x)·(1+scale)+shift), modulated by the condition, all float32."""

    width: int
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x_NE, cond_NE):
        xavier, zeros = nn.initializers.xavier_uniform(), nn.initializers.zeros
        modulation_N3E = dense(3 * self.width, self.dtype, zeros, "adaln")(cond_NE)
        shift_NE, scale_NE, gate_NE = jnp.split(modulation_N3E.astype(jnp.float32), 3, axis=-1)
        h_NE = layer_norm("norm")(x_NE) * (1 + scale_NE) + shift_NE
        h_NE = nn.silu(dense(self.width, self.dtype, xavier, "up")(h_NE))
        h_NE = dense(self.width, self.dtype, xavier, "down")(h_NE)
        return x_NE + gate_NE * h_NE.astype(jnp.float32)


class TimestepEmbedding(nn.Module):
    """Sinusoids of the timestep, cosines first, then two layers with SiLU between."""

    width: int
    dtype: jnp.dtype
    kernel_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, t_N):
        half = SINUSOIDS // 2
        frequency_F = jnp.exp(
            -math.log(LONGEST_PERIOD) / half * jnp.arange(half, dtype=jnp.float32)
        )
        angle_NF = t_N.astype(jnp.float32)[:, None] * frequency_F[None]
        wave_NF = jnp.concatenate([jnp.cos(angle_NF), jnp.sin(angle_NF)], axis=-1)
        h_NE = dense(self.width, self.dtype, self.kernel_init, "up")(wave_NF)
        h_NE = dense(self.width, self.dtype, self.kernel_init, "down")(nn.silu(h_NE))
        return h_NE.astype(jnp.float32)
