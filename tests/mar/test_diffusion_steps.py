"""Tests how diffusion steps amplify a denoiser's error, against the sampler's own loop."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.paths import ROOT
from varjax.mar.diffusion_steps import first_step_factor, main, sample_std
from varjax.nn.diffusion import NoiseSchedule, reverse_diffusion


@pytest.mark.parametrize(
    ("steps", "to_999", "to_950"),
    [(100, 316, 1.02), (50, 632, 1.24), (25, 1327, 1.69), (10, 3493, 2.26), (5, 7707, 4.98)],
)
def test_first_step_factors_match_the_published_ones(steps, to_999, to_950):
    assert first_step_factor(NoiseSchedule(steps)) == pytest.approx(to_999, abs=0.5)
    assert first_step_factor(NoiseSchedule(steps, last=950)) == pytest.approx(to_950, abs=0.005)


@pytest.mark.parametrize(("last", "error"), [(999, 0.0), (999, 0.001), (950, 0.001), (950, 0.2)])
def test_standard_deviations_match_the_reverse_loop(last, error):
    schedule, key, shape = NoiseSchedule(5, last), jax.random.key(0), (5000, 4)
    alpha_bar_T = jnp.asarray(NoiseSchedule().alpha_bar_J, jnp.float32)

    def denoise(xt_NZ, t_1):
        noise_NZ = (1 + error) * jnp.sqrt(1 - alpha_bar_T[t_1])[:, None] * xt_NZ
        return jnp.concatenate([noise_NZ, -jnp.ones_like(xt_NZ)], axis=-1)  # -1: the variance is β̃

    x0_NZ = reverse_diffusion(
        denoise,
        schedule.coefficients(),
        5,
        lambda j: jax.random.normal(jax.random.fold_in(key, j), shape),
    )
    assert np.std(x0_NZ) == pytest.approx(sample_std(schedule, error), rel=0.02)


def test_documented_tables_match_the_command_s_output(capsys):
    assert main([]) == 0
    tables = capsys.readouterr().out.strip()
    assert all(table in (ROOT / "docs/mar.md").read_text() for table in tables.split("\n\n"))
    assert "| 5 | 999 | 7,707.23 | 0.661 | 2.992 |" in tables
    assert "| 5 | 950 | 4.98 | 0.662 | 0.661 |" in tables
    assert "| `50:5` | 48, 5 | 1,681 | 5,246 |" in tables  # the paper's setting


@pytest.mark.parametrize(("flag", "says"), [("--error=1", "error=1.0"), ("--steps=0", "steps=0")])
def test_values_out_of_range_are_refused(flag, says, capsys):
    assert main([flag]) == 1
    assert f"{says}: must be" in capsys.readouterr().err
