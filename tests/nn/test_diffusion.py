"""Noise schedules, the diffusion loss, and reverse diffusion."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.golden import weights
from varjax.errors import InputError
from varjax.nn.diffusion import NoiseSchedule, diffusion_loss, reverse_diffusion


@pytest.mark.parametrize(("case", "steps"), [("mar_base", 10), ("mar_patch2", 7)])
def test_schedules_match_reference(case, steps):
    out = weights.outputs(case)
    for kind, schedule in (("train", NoiseSchedule()), ("gen", NoiseSchedule(steps))):
        ours = {
            "betas": schedule.beta_J,
            "alphas_cumprod": schedule.alpha_bar_J,
            "posterior_variance": schedule.posterior_variance_J,
            "posterior_log_variance_clipped": schedule.posterior_log_variance_J,
            "posterior_mean_coef1": schedule.mean_of_x0_J,
            "posterior_mean_coef2": schedule.mean_of_xt_J,
            "timestep_map": schedule.timestep_J,
        }
        for name, table in ours.items():
            np.testing.assert_allclose(table, out[f"schedule.{kind}.{name}"], rtol=1e-7)


DISA = weights.case("disa")
DISA_STEPS = [int(name.partition(".")[2]) for name in DISA if name.startswith("timesteps.")]


@pytest.mark.parametrize("steps", DISA_STEPS)
def test_schedules_that_end_at_950_match_reference(steps):
    schedule = NoiseSchedule(steps, last=950)
    np.testing.assert_array_equal(schedule.timestep_J, DISA[f"timesteps.{steps}"])
    np.testing.assert_allclose(schedule.beta_J, DISA[f"betas.{steps}"], rtol=1e-9)


@pytest.mark.parametrize("temperature", [1.0, 0.9])
@pytest.mark.parametrize("steps", DISA_STEPS)
def test_reverse_diffusion_from_950_matches_reference(steps, temperature):
    """Uses the denoiser and the draws that the note in disa.json describes."""
    schedule = NoiseSchedule(steps, last=950)
    J = len(schedule.timestep_J)

    def denoise(xt_NZ, t_1):
        noise_NZ = xt_NZ * (0.5 + 0.4 * jnp.cos(t_1[:, None].astype(jnp.float32) / 300))
        return jnp.concatenate([noise_NZ, 0.3 * jnp.tanh(xt_NZ)], axis=-1)

    def draws(seed):
        return np.random.RandomState(seed).standard_normal((5, 3)).astype(np.float32)

    # Draw J is the start. The loop then takes J-1 … 1, which the note numbers 0, 1, ….
    draw_JNZ = jnp.asarray([draws(1000 + J - 1 - j) for j in range(J)] + [draws(77)])
    found_NZ = reverse_diffusion(
        denoise, schedule.coefficients(), J, lambda j: draw_JNZ[j], temperature
    )
    expected_NZ = DISA[f"sample.{steps}.t{temperature}"]
    np.testing.assert_allclose(found_NZ, expected_NZ, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("steps", [1, 1001, 2.5])
def test_invalid_numbers_of_steps_are_refused(steps):
    with pytest.raises(InputError, match=f"diffusion_steps={steps}: must be a whole number, 2"):
        NoiseSchedule(steps)


def gaussian_denoiser(mean, std, xt_NZ, t_N):
    """Predicts the expected noise in normally distributed data, and the posterior's variance."""
    alpha_bar = jnp.asarray(NoiseSchedule().alpha_bar_J, jnp.float32)[t_N][:, None]
    variance = alpha_bar * std**2 + 1 - alpha_bar
    noise_NZ = jnp.sqrt(1 - alpha_bar) * (xt_NZ - jnp.sqrt(alpha_bar) * mean) / variance
    return jnp.concatenate([noise_NZ, -jnp.ones_like(xt_NZ)], axis=-1)


@pytest.mark.parametrize(("temperature", "spread"), [(1.0, 1.0), (0.0, None)])
def test_reverse_diffusion_samples_the_distribution_of_its_denoiser(temperature, spread):
    mean, std = 1.5, 0.4
    key, shape = jax.random.key(0), (4000, 4)
    x0_NZ = reverse_diffusion(
        functools.partial(gaussian_denoiser, mean, std),
        NoiseSchedule(250).coefficients(),
        250,
        lambda j: jax.random.normal(jax.random.fold_in(key, j), shape),
        temperature,
    )
    assert np.mean(x0_NZ) == pytest.approx(mean, abs=0.02)
    if spread:
        assert np.std(x0_NZ) == pytest.approx(std, rel=0.05)
    else:
        assert np.std(x0_NZ) < 0.9 * std


def test_clip_denoised_bounds_the_samples():
    schedule = NoiseSchedule(10)
    wrong = lambda xt_NZ, t_N: 1.05 * gaussian_denoiser(0.0, 1.0, xt_NZ, t_N)  # noqa: E731
    key = jax.random.key(1)
    draw = lambda j: jax.random.normal(jax.random.fold_in(key, j), (500, 2))  # noqa: E731

    def largest(**clip):
        x0_NZ = reverse_diffusion(wrong, schedule.coefficients(), 10, draw, **clip)
        return float(jnp.abs(x0_NZ).max())

    assert largest(clip_denoised=2.0) <= 2 < largest()
    assert largest(clip_denoised=1e6) == largest()  # 0, the default, is no limit


def test_a_traced_number_of_steps_gives_the_same_samples():
    schedule = NoiseSchedule(6)
    draw = lambda j: jax.random.normal(jax.random.fold_in(jax.random.key(2), j), (3, 2))  # noqa: E731
    loop = functools.partial(
        reverse_diffusion, functools.partial(gaussian_denoiser, 0.0, 1.0), draw=draw
    )
    tables = schedule.coefficients()
    longer = jax.tree.map(lambda x: np.pad(x, (0, 3), mode="edge"), tables)
    np.testing.assert_allclose(
        jax.jit(loop)(longer, steps=jnp.int32(6)), loop(tables, steps=6), rtol=1e-5
    )


def test_variational_bound_trains_only_the_variance():
    key = jax.random.split(jax.random.key(3), 3)
    x0_NZ, noise_NZ, out_N2Z = (
        jax.random.normal(k, (6, n)) for k, n in zip(key, (2, 2, 4), strict=True)
    )
    t_N = jnp.array([0, 1, 10, 300, 700, 999])
    grad_N2Z = jax.grad(lambda out: diffusion_loss(lambda *_: out, x0_NZ, t_N, noise_NZ)[1].sum())(
        out_N2Z
    )
    assert not grad_N2Z[:, :2].any() and (grad_N2Z[:, 2:] != 0).all()
