"""Prints what each number of diffusion steps costs in MAR, and how it amplifies a denoiser's error.

python -m varjax.mar.diffusion_steps
python -m varjax.mar.diffusion_steps --error=0.01 --steps=64

Nothing is sampled. The denoiser is the exact one for a standard normal with a relative error added,
so every variance has a closed form. An exact sampler would give a standard deviation of 1.
"""

import sys
from collections.abc import Iterator

import numpy as np

from varjax.errors import check_setting
from varjax.mar.denoising_schedule import DISA_LAST_TIMESTEP, denoising_schedules
from varjax.mar.masking import UnmaskingSchedule
from varjax.nn.diffusion import NoiseSchedule
from varjax.runtime.commands import command_parser, run_command

COUNTS = (5, 10, 25, 50, 100)
SETTINGS = ("100", "50:5", "50:5:cosine", "50:5:two_stage")
TOKENS = 256  # of the released models


def first_step_factor(schedule: NoiseSchedule) -> float:
    """Computes √(ᾱ_before / ᾱ) of the noisiest timestep: the first step's factor on x_t."""
    return float(np.sqrt(schedule.alpha_bar_before_J[-1] / schedule.alpha_bar_J[-1]))


def sample_std(schedule: NoiseSchedule, error: float) -> float:
    """Computes the standard deviation of samples of a standard normal.

    Args:
        schedule: noise schedule of the reverse loop, whose steps add the smallest variance, β̃.
        error: relative error; the predicted noise is (1 + error) times the best guess.
    """
    variance, s = 1.0, schedule
    for j in reversed(range(len(s.timestep_J))):
        # The best guess of the noise in x_t is √(1-ᾱ) x_t, so that each step is linear in x_t.
        noise = (1 + error) * (1 - s.alpha_bar_J[j])
        x0 = (1 - noise) / np.sqrt(s.alpha_bar_J[j])
        factor = s.mean_of_x0_J[j] * x0 + s.mean_of_xt_J[j]
        variance = factor**2 * variance + s.posterior_variance_J[j]
    return float(variance**0.5)


def steps_table(error: float) -> Iterator[str]:
    """Yields the lines of a table that compares starting at DiSA's timestep and at MAR's.

    error: relative error of the predicted noise.
    """
    yield f"| diffusion steps | first timestep | factor | std, no error | std, {error:.1%} error |"
    yield "|---|---|---|---|---|"
    for count in COUNTS:
        for schedule in (NoiseSchedule(count), NoiseSchedule(count, DISA_LAST_TIMESTEP)):
            stds = (sample_std(schedule, e) for e in (0.0, error))
            cells = f"{count} | {schedule.timestep_J[-1]} | {first_step_factor(schedule):,.2f}"
            yield f"| {cells} | {' | '.join(f'{std:.3f}' for std in stds)} |"


def cost_table(steps: int) -> Iterator[str]:
    """Yields the lines of a table of denoising steps per image.

    steps: number of sampling steps.
    """
    yield (
        "| `--diffusion_steps` | in the first and last sampling step | sum over all sampling steps "
        "| tokens × denoising steps |"
    )
    yield "|---|---|---|---|"
    new = np.diff(UnmaskingSchedule(TOKENS, steps).known)
    for setting in SETTINGS:
        counts = [len(schedule.timestep_J) for schedule in denoising_schedules(setting, steps)]
        work = int(np.dot(new, counts))
        yield f"| `{setting}` | {counts[0]}, {counts[-1]} | {sum(counts):,} | {work:,} |"


def print_tables(error: float, steps: int) -> None:
    """Prints both tables; raises InputError for a value out of range."""
    check_setting("error", error, 0 <= error < 1, "at least 0 and below 1")
    check_setting("steps", steps, 1 <= steps <= TOKENS, f"1 … {TOKENS}, the number of tokens")
    print("\n".join([*steps_table(error), "", *cost_table(steps)]))


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    parser = command_parser("python -m varjax.mar.diffusion_steps", __doc__)
    add = parser.add_argument
    add("--error", type=float, default=0.001, help="relative error of the noise (0.001)")
    add("--steps", type=int, default=64, help="sampling steps of the second table (64)")
    flags = parser.parse_args(arguments)
    return run_command("diffusion_steps", lambda: print_tables(**vars(flags)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
