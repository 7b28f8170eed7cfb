"""Classifier-free guidance (Ho and Salimans 2022), with one meaning in every family: 1 is off.

Options become one guidance scale for each scale (VAR) or step (MAR). A number is the maximum
guidance, and a schedule says what fraction of it is used when. A list holds the guidance scales
themselves. Outside of an interval, guidance is off.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from varjax.config.numbers import (
    FLOAT32_MAX,
    INT32_MAX,
    OneOrEach,
    finite_number,
    number_or_list,
    whole_number,
)
from varjax.errors import InputError

SCHEDULES = "linear, constant or power_cosine:P, where P is a number, 0 or more"


class GuidanceOptions(Protocol):
    """Lists the sampling options about guidance that all families have.

    Attributes:
        guidance: maximum guidance scale, or a list of one for each scale or step; 1 is off.
        guidance_schedule: schedule of a guidance that is one number; see `schedule_fractions`.
        guidance_from: first scale or step with guidance, counted from 0.
        guidance_to: end of the half-open range of scales or steps with guidance; 0 for no end.
    """

    @property
    def guidance(self) -> OneOrEach[float]: ...

    @property
    def guidance_schedule(self) -> str: ...

    @property
    def guidance_from(self) -> int: ...

    @property
    def guidance_to(self) -> int: ...


def check_guide_is_used(guide: Any, requests: Sequence[GuidanceOptions]) -> None:
    """Raises InputError for a guide that would do nothing, because guidance is off in all requests.

    Args:
        guide: model that guides, or its location; None for none.
        requests: sampling options of everything that is drawn.
    """
    if guide is not None and all(np.all(np.equal(x.guidance, 1)) for x in requests):
        raise InputError(
            f"guide={guide}: guidance is 1, which turns the guide off; give a guidance above 1, or "
            "leave the guide out"
        )


def checked_guidance_options(options: GuidanceOptions, count: int | None = None) -> dict[str, Any]:
    """Returns the options about guidance in plain Python types, by name.

    Args:
        options: sampling options of a family.
        count: number of scales or steps; None if it is not known, and then not checked.

    Raises:
        InputError: a guidance below 1, a list of another length, an unknown schedule, or an empty
            interval.
    """
    allowed = f"a finite number, 1 (off) … {FLOAT32_MAX:g}"
    guidance = number_or_list(
        "guidance",
        options.guidance,
        lambda name, value: finite_number(name, value, 1, allowed=allowed),
        count,
    )
    schedule = str(options.guidance_schedule)
    schedule_fractions(schedule, np.zeros(1))
    most = INT32_MAX if count is None else count
    start = whole_number("guidance_from", options.guidance_from, 0, most)
    stop = whole_number("guidance_to", options.guidance_to, 0, most)
    if start >= (stop or count or start + 1):
        raise InputError(
            f"guidance_from={start}, guidance_to={stop}: no scale or step is between them; for no "
            "guidance, give guidance=1"
        )
    return {
        "guidance": guidance,
        "guidance_schedule": schedule,
        "guidance_from": start,
        "guidance_to": stop,
    }


def check_guided_range(options: GuidanceOptions, ramp_S: np.ndarray) -> None:
    """Raises InputError for a range that leaves out all scales or steps with guidance.

    Args:
        options: sampling options of a family, checked.
        ramp_S: the family's ramp from 0 to 1, for the schedule "linear".
    """
    start, stop = options.guidance_from, options.guidance_to
    schedule = constant = ""
    if isinstance(options.guidance, tuple):
        extra_S = np.array(options.guidance) - 1
    else:
        schedule = f", guidance_schedule={options.guidance_schedule}"
        constant = " give guidance_schedule=constant,"
        extra_S = (options.guidance - 1) * schedule_fractions(options.guidance_schedule, ramp_S)
    guided_S = (1 + extra_S).astype(np.float32) != 1
    if np.any(guided_S) and not np.any(guided_S[start : stop or None]):
        raise InputError(
            f"guidance_from={start}, guidance_to={stop}{schedule}: guidance is 1, which is off, at "
            f"every scale or step between them; extend the range,{constant} or, for no guidance, "
            "give guidance=1"
        )


def schedule_fractions(schedule: str, ramp_S: np.ndarray) -> np.ndarray:
    """Returns the fraction of the maximum guidance at each scale or step, (S,) in [0, 1].

    Args:
        schedule: "linear" is the family's ramp, "constant" is 1 everywhere, and "power_cosine:P" is
            (1 - cos(π·(k/S)^P)) / 2 at scale or step k (Yu et al. 2024, RAR, arXiv 2411.00776).
        ramp_S: the family's ramp from 0 to 1.

    Raises:
        InputError: `schedule` is none of these.
    """
    kind, _, power = schedule.partition(":")
    if schedule == "linear":
        return ramp_S
    if schedule == "constant":
        return np.ones_like(ramp_S)
    try:
        P = finite_number("P", float(power), 0)
    except ValueError:
        kind = ""
    if kind != "power_cosine":
        raise InputError(f"guidance_schedule={schedule}: must be {SCHEDULES}")
    S = len(ramp_S)
    return (1 - np.cos(np.pi * (np.arange(S) / S) ** P)) / 2


def guidance_scales(options: GuidanceOptions, ramp_S: np.ndarray) -> jax.Array | np.ndarray:
    """Returns the guidance scale of each scale or step, (S,) float32.

    Args:
        options: sampling options of a family, checked. `guidance` may be traced.
        ramp_S: the family's ramp from 0 to 1, for the schedule "linear".
    """
    number_S = np.arange(len(ramp_S))
    stop = options.guidance_to or len(ramp_S)
    on_S = (number_S >= options.guidance_from) & (number_S < stop)
    if isinstance(options.guidance, tuple):
        return jnp.where(on_S, jnp.asarray(options.guidance, jnp.float32), 1)
    fraction_S = np.where(on_S, schedule_fractions(options.guidance_schedule, ramp_S), 0)
    return 1 + (options.guidance - 1) * fraction_S.astype(np.float32)


def guided_interval(options: GuidanceOptions, ramp_S: np.ndarray) -> tuple[int, int]:
    """Returns the first scale or step with guidance, and the first after the last one with it.

    (0, 0) if guidance is off everywhere. Arguments are those of `guidance_scales`, not traced:
    programs are compiled for the interval, and compute one stream outside of it.
    """
    with jax.ensure_compile_time_eval():  # numbers also while a caller's program is traced
        on = np.flatnonzero(np.asarray(guidance_scales(options, ramp_S)) != 1)
    return (int(on[0]), int(on[-1]) + 1) if len(on) else (0, 0)


def apply_guidance(x_2B: jax.Array, scale: jax.typing.ArrayLike) -> jax.Array:
    """Combines predictions c of the class and u of no class to u + scale·(c - u).

    For autoguidance (Karras et al. 2024, arXiv 2406.02507), u is of the class too, by a weaker
    model.

    Args:
        x_2B: the predictions c, then the predictions u.
        scale: weight of the class; 1 returns c.
    """
    conditional_B, unconditional_B = jnp.split(x_2B, 2)
    return unconditional_B + scale * (conditional_B - unconditional_B)
