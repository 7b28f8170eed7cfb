"""Gaussian diffusion with a learned variance (Nichol and Dhariwal 2021, iDDPM), over any denoiser.

A denoiser is a function of noisy vectors x_NZ and their timesteps t_N that returns (N, 2 Z): the
noise that it sees in them, and for each number a value in about [-1, 1] that interpolates between
the smallest and the largest sensible variance.
"""

import dataclasses
import functools
import math
from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from varjax.errors import check_setting

TRAINING_STEPS = 1000
MAX_BETA = 0.999
# The decoder's likelihood at t = 0 speaks of images of 256 levels in [-1, 1], latents or not.
HALF_LEVEL, LEVEL_LIMIT = 1 / 255, 0.999
LOG_FLOOR = 1e-12

Table = np.ndarray | jax.Array
Denoiser = Callable[[jax.Array, jax.Array], jax.Array]


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """The cosine schedule of 1,000 timesteps, or some of them evenly spaced (iDDPM, section 3.2).

    Tables are float64 arrays over the J chosen timesteps, least noise first. Raises InputError for
    a number of steps that is out of range.

        NoiseSchedule(100).timestep_J  # 0, 10, 20, … 999
        NoiseSchedule(5, last=950).timestep_J  # 0, 250, 500, 749, 950

    Attributes:
        steps: number of timesteps from 0 to 999, 2 … 1000.
        last: largest timestep that is kept. Larger ones become this one, and equal ones are merged,
            so J may be smaller than `steps`.
    """

    steps: int = TRAINING_STEPS
    last: int = TRAINING_STEPS - 1

    def __post_init__(self):
        ok = 2 <= self.steps <= TRAINING_STEPS and self.steps == int(self.steps)
        check_setting("diffusion_steps", self.steps, ok, f"a whole number, 2 … {TRAINING_STEPS}")
        assert 1 <= self.last < TRAINING_STEPS

    @functools.cached_property
    def timestep_J(self) -> np.ndarray:
        """The chosen timesteps, from 0 by a rounded stride to 999 or `last`; int."""
        stride, place, taken = (TRAINING_STEPS - 1) / (self.steps - 1), 0.0, []
        for _ in range(self.steps):  # summed up as the reference does, so that it rounds alike
            taken.append(round(place))
            place += stride
        return np.unique(np.minimum(taken, self.last))

    @functools.cached_property
    def alpha_bar_J(self) -> np.ndarray:
        """ᾱ: the share of the variance that is signal."""
        return np.cumprod(1 - _cosine_betas())[self.timestep_J]

    @functools.cached_property
    def alpha_bar_before_J(self) -> np.ndarray:
        """ᾱ of the step before, 1 at the first."""
        return np.append(1.0, self.alpha_bar_J[:-1])

    @functools.cached_property
    def beta_J(self) -> np.ndarray:
        """β: the share of noise that a step adds."""
        return 1 - self.alpha_bar_J / self.alpha_bar_before_J

    @functools.cached_property
    def posterior_variance_J(self) -> np.ndarray:
        """β̃ of q(x_{t-1} | x_t, x_0)."""
        return self.beta_J * (1 - self.alpha_bar_before_J) / (1 - self.alpha_bar_J)

    @functools.cached_property
    def posterior_log_variance_J(self) -> np.ndarray:
        """log β̃, with that of the second step in place of the first, which is -inf."""
        return np.log(np.append(self.posterior_variance_J[1], self.posterior_variance_J[1:]))

    @functools.cached_property
    def mean_of_x0_J(self) -> np.ndarray:
        """Factor of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.beta_J * np.sqrt(self.alpha_bar_before_J) / (1 - self.alpha_bar_J)

    @functools.cached_property
    def mean_of_xt_J(self) -> np.ndarray:
        """Factor of x_t in that mean."""
        return (1 - self.alpha_bar_before_J) * np.sqrt(1 - self.beta_J) / (1 - self.alpha_bar_J)

    def coefficients(self) -> "Coefficients":
        """Returns the tables that losses and steps need, as float32 arrays."""
        f32 = functools.partial(np.asarray, dtype=np.float32)
        return Coefficients(
            timestep=self.timestep_J.astype(np.int32),
            x0_of_xt=f32(np.sqrt(1 / self.alpha_bar_J)),
            x0_of_noise=f32(np.sqrt(1 / self.alpha_bar_J - 1)),
            mean_of_x0=f32(self.mean_of_x0_J),
            mean_of_xt=f32(self.mean_of_xt_J),
            least_log_variance=f32(self.posterior_log_variance_J),
            most_log_variance=f32(np.log(self.beta_J)),
            signal=f32(np.sqrt(self.alpha_bar_J)),
            noise=f32(np.sqrt(1 - self.alpha_bar_J)),
        )


@functools.cache
def _cosine_betas() -> np.ndarray:
    """β of all 1,000 timesteps."""

    def alpha_bar(t: float) -> float:
        return math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    T = TRAINING_STEPS
    return np.array(
        [min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), MAX_BETA) for i in range(T)]
    )


@flax.struct.dataclass
class Coefficients:
    """Holds what losses and steps need of a schedule, each array (J,) or of some of its timesteps.

    Attributes:
        timestep: timestep passed to the denoiser.
        x0_of_xt: x_0 = x0_of_xt · x_t - x0_of_noise · noise.
        x0_of_noise: factor on the noise in that equation.
        mean_of_x0: the mean of x_{t-1} is mean_of_x0 · x_0 + mean_of_xt · x_t.
        mean_of_xt: factor on x_t in that equation.
        least_log_variance: smallest log variance of x_{t-1} given x_t: the posterior's, log β̃.
        most_log_variance: largest log variance of x_{t-1} given x_t: log β.
        signal: x_t = signal · x_0 + noise · normal noise.
        noise: factor on the noise in that equation.
    """

    timestep: Table
    x0_of_xt: Table
    x0_of_noise: Table
    mean_of_x0: Table
    mean_of_xt: Table
    least_log_variance: Table
    most_log_variance: Table
    signal: Table
    noise: Table

    def at(self, j: jax.Array | int) -> "Coefficients":
        """Returns those of timestep number j, an integer or an array of them."""
        return jax.tree.map(lambda table: jnp.asarray(table)[j], self)

    def log_variance(self, value: jax.Array) -> jax.Array:
        """Interpolates the logarithm of the variance by the denoiser's value (iDDPM, eq. 15)."""
        share = (value + 1) / 2
        return share * self.most_log_variance + (1 - share) * self.least_log_variance


def diffusion_loss(
    denoise: Denoiser, x0_NZ: jax.Array, t_N: jax.Array, noise_NZ: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Computes the hybrid loss of iDDPM (its eq. 16, both terms of weight 1) of each vector.

    Args:
        denoise: function that predicts the noise and the variance.
        x0_NZ: vectors without noise.
        t_N: timesteps of the vectors, 0 … 999.
        noise_NZ: standard normal noise.

    Returns:
        (N,) each: the mean square of the noise's error, and the variational bound in bits a number,
        whose gradient reaches the variance alone.
    """
    at = jax.tree.map(lambda x_N: jnp.expand_dims(x_N, 1), NoiseSchedule().coefficients().at(t_N))
    xt_NZ = at.signal * x0_NZ + at.noise * noise_NZ
    predicted_NZ, value_NZ = jnp.split(denoise(xt_NZ, t_N).astype(jnp.float32), 2, axis=-1)
    mse_N = jnp.mean(jnp.square(noise_NZ - predicted_NZ), axis=-1)

    true_mean_NZ = at.mean_of_x0 * x0_NZ + at.mean_of_xt * xt_NZ
    guess_NZ = at.x0_of_xt * xt_NZ - at.x0_of_noise * jax.lax.stop_gradient(predicted_NZ)
    mean_NZ = at.mean_of_x0 * guess_NZ + at.mean_of_xt * xt_NZ
    log_variance_NZ = at.log_variance(value_NZ)
    kl_NZ = _gaussian_kl(true_mean_NZ, at.least_log_variance, mean_NZ, log_variance_NZ)
    likelihood_NZ = _discrete_log_likelihood(x0_NZ, mean_NZ, log_variance_NZ / 2)
    bound_NZ = jnp.where(t_N[:, None] == 0, -likelihood_NZ, kl_NZ)
    return mse_N, jnp.mean(bound_NZ, axis=-1) / math.log(2)


def reverse_diffusion(
    denoise: Denoiser,
    coefficients: Coefficients,
    steps: int | jax.Array,
    draw: Callable[[jax.Array | int], jax.Array],
    temperature: float | jax.Array = 1.0,
    clip_denoised: float | jax.Array = 0.0,
) -> jax.Array:
    """Draws vectors by undoing the noise step by step (Ho et al. 2020, DDPM, algorithm 2).

    Args:
        denoise: function that predicts the noise and the variance; its t_N has one entry, for all
            vectors.
        coefficients: coefficients of a schedule with at least J timesteps.
        steps: number J of steps; may be traced, and then has no gradient.
        draw: j -> normal noise (N, Z): for j = J the vectors to start from, and for j = J-1 … 1 the
            noise added by the step from timestep number j.
        temperature: factor on the noise that steps add.
        clip_denoised: largest |x_0| that a step may aim at; 0 for no limit.

    Returns:
        x_0, (N, Z).
    """

    bound = jnp.where(jnp.equal(clip_denoised, 0), jnp.inf, clip_denoised)

    def step(i, xt_NZ):
        j = steps - 1 - i
        at = coefficients.at(j)
        noise_NZ, value_NZ = jnp.split(denoise(xt_NZ, jnp.asarray(at.timestep)[None]), 2, axis=-1)
        x0_NZ = at.x0_of_xt * xt_NZ - at.x0_of_noise * noise_NZ.astype(jnp.float32)
        x0_NZ = jnp.clip(x0_NZ, -bound, bound)
        mean_NZ = at.mean_of_x0 * x0_NZ + at.mean_of_xt * xt_NZ
        std_NZ = jnp.exp(at.log_variance(value_NZ.astype(jnp.float32)) / 2)
        return mean_NZ + jnp.where(j > 0, std_NZ * draw(j) * temperature, 0)

    return jax.lax.fori_loop(0, steps, step, draw(steps))


def _gaussian_kl(mean1, log_variance1, mean2, log_variance2):
    """KL divergence of two normal distributions, in nats."""
    return 0.5 * (
        log_variance2
        - log_variance1
        - 1
        + jnp.exp(log_variance1 - log_variance2)
        + jnp.square(mean1 - mean2) * jnp.exp(-log_variance2)
    )


def _discrete_log_likelihood(x, mean, log_std):
    """Log-probability of x's level, one of 256 in [-1, 1] of which the outer ones are open."""
    centered, precision = x - mean, jnp.exp(-log_std)
    below_NZ = _normal_cdf(precision * (centered - HALF_LEVEL))
    above_NZ = _normal_cdf(precision * (centered + HALF_LEVEL))
    inside = jnp.where(x > LEVEL_LIMIT, 1 - below_NZ, above_NZ - below_NZ)
    return jnp.log(jnp.maximum(jnp.where(x < -LEVEL_LIMIT, above_NZ, inside), LOG_FLOOR))


def _normal_cdf(x):
    """The tanh approximation, as the reference has it."""
    return 0.5 * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
