"""The number of denoising steps of each sampling step."""

import numpy as np
import pytest

from tests.golden import weights
from varjax.mar.denoising_schedule import denoising_schedules, denoising_steps
from varjax.nn.diffusion import NoiseSchedule


@pytest.mark.parametrize("kind", ["linear", "cosine", "two_stage"])
def test_annealed_step_counts_match_reference(kind):
    expected = weights.case("disa")[f"counts.64.{kind}.50.5"]
    schedules = denoising_schedules(f"50:5:{kind}", 64)
    assert [schedule.steps for schedule in schedules] == expected
    assert {schedule.timestep_J[-1] for schedule in schedules} == {950}
    assert kind != "linear" or schedules == denoising_schedules("50:5", 64)
    assert [schedule.steps for schedule in denoising_schedules(f"50:5:{kind}", 1)][0] == 50


def test_single_step_count_ends_at_999():
    schedules = denoising_schedules("50", 3)
    assert schedules == (NoiseSchedule(50),) * 3 and schedules[0].timestep_J[-1] == 999


def test_denoising_steps_of_each_sampling_step():
    schedules = denoising_schedules("9:3", 5)
    for number, schedule in enumerate(schedules):
        count, coefficients = denoising_steps(schedules, number)
        assert count == len(schedule.timestep_J)
        np.testing.assert_array_equal(coefficients.timestep[:count], schedule.timestep_J)
