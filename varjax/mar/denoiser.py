"""MAR's denoising MLP, which denoises each token by itself, and the number of its steps."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from varjax.errors import InputError
from varjax.nn.compute import ComputeConfig
from varjax.nn.diffusion import TRAINING_STEPS, Coefficients, NoiseSchedule
from varjax.nn.linear import dense
from varjax.nn.stack import init_stack
from varjax.nn.transformer import modulate
from varjax.nn.vit import layer_norm

SINUSOIDS = 256  # of a timestep's embedding
LONGEST_PERIOD = 10_000
# DiSA's noisiest timestep. Beyond it almost no signal is left, so a step from 999 divides by nearly
# 0.
DISA_LAST_TIMESTEP = 950
# DiSA's schedules: the fraction of FIRST - LAST that step k of 0 … end has in addition to LAST.
ANNEALING: dict[str, Callable[[int, int], float]] = {
    "linear": lambda k, end: (end - k) / end,
    "cosine": lambda k, end: (math.cos(math.pi * k / end) + 1) / 2,
    "two_stage": lambda k, end: float(k < end / 2),
}


class DenoisingMLP(nn.Module):
    """Residual blocks whose norms are modulated by a token's condition z and by the timestep.

        cond_NE = mlp.apply(params, z_NC, method=DenoisingMLP.condition)  # for all timesteps
        out_N2Z = mlp.apply(params, xt_NZ, t_N, cond_NE, method=DenoisingMLP.denoise)

    Attributes:
        channels: number of channels Z of a token.
        depth: number of residual blocks.
        width: number of channels E of the residual blocks.
        compute: number format of the products inside. Inputs and outputs, the first and the last
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
        self.blocks = self.param("blocks", self._init_blocks)
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


class DenoisingSteps(NamedTuple):
    """Holds how the tokens of one sampling step are denoised.

    Attributes:
        count: number of denoising steps.
        coefficients: tables of the noise schedule, with at least `count` timesteps.
    """

    count: int | jax.Array
    coefficients: Coefficients


def denoising_schedules(text: str, steps: int) -> tuple[NoiseSchedule, ...]:
    """Reads how many denoising steps each sampling step takes.

    "100" is MAR's default: evenly spaced timesteps from 0 to 999. "50:5" is DiSA (Zhao et al. 2025,
    arXiv 2505.20297): later tokens depend more on known ones, so fewer steps suffice. Its timesteps
    end at 950. "50:5:cosine" and "50:5:two_stage" are the paper's other schedules.

    Args:
        text: one number, or FIRST:LAST, or FIRST:LAST:SCHEDULE.
        steps: number of sampling steps.

    Returns:
        The noise schedule of each sampling step.

    Raises:
        InputError: `text` is none of these, or a number is below 2 or above 1,000.
    """
    first, *rest = text.split(":")
    last, kind = (*rest, "linear")[:2] if rest else (first, "linear")
    valid = all(
        n.isdecimal() and len(n) < 5 and 2 <= int(n) <= TRAINING_STEPS for n in (first, last)
    )
    if not valid or len(rest) > 2 or kind not in ANNEALING:
        raise InputError(
            f"diffusion_steps={text}: give one number, 2 … {TRAINING_STEPS}, or FIRST:LAST like "
            f"50:5, or FIRST:LAST:SCHEDULE, where SCHEDULE is {', '.join(ANNEALING)}"
        )
    if not rest:
        return (NoiseSchedule(int(first)),) * steps
    most, least, end = int(first), int(last), max(steps - 1, 1)
    counts = [least + math.floor(ANNEALING[kind](k, end) * (most - least)) for k in range(steps)]
    return tuple(NoiseSchedule(count, last=DISA_LAST_TIMESTEP) for count in counts)


def denoising_steps(schedules: Sequence[NoiseSchedule], number: jax.Array | int) -> DenoisingSteps:
    """Returns the denoising of sampling step `number`, which may be traced."""
    if len(set(schedules)) == 1:
        return DenoisingSteps(len(schedules[0].timestep_J), schedules[0].coefficients())
    counts = [len(schedule.timestep_J) for schedule in schedules]
    tables = jax.tree.map(
        lambda *rows: np.stack([np.pad(row, (0, max(counts) - len(row))) for row in rows]),
        *(schedule.coefficients() for schedule in schedules),
    )
    return DenoisingSteps(jnp.asarray(counts)[number], tables.at(number))
