"""Tests guidance given as a schedule, list, function or interval."""

import dataclasses

import jax
import numpy as np
import pytest

from varjax.config import config_tree
from varjax.errors import InputError
from varjax.evaluation.sweep import point_path
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions, check_sampling
from varjax.sampling.guidance import guidance_scales, guided_interval, schedule_fractions
from varjax.sampling.option_sweep import parse_sweep
from varjax.var.sample import VAROptions

RAMP = np.linspace(0, 1, 4)


def scales(**options):
    return np.asarray(guidance_scales(VAROptions(**options).check(4), RAMP))


def interval(**options):
    return guided_interval(VAROptions(**options).check(4), RAMP)


@pytest.mark.parametrize(
    ("power", "strongest", "expected"),
    [
        (2.75, 16, (1.02, 1.80, 7.40)),
        (2.5, 15.5, (1.03, 2.09, 7.96)),
        (1.5, 6.9, (1.22, 2.64, 5.29)),
        (1.2, 8.0, (1.60, 3.79, 6.63)),
    ],
    ids=["RAR-B", "RAR-L", "RAR-XL", "RAR-XXL"],
)
def test_power_cosine_is_the_published_schedule(power, strongest, expected):
    ramp_S = np.arange(256) / 256
    options = VAROptions(guidance=strongest, guidance_schedule=f"power_cosine:{power}")
    found_S = guidance_scales(options, ramp_S)
    np.testing.assert_allclose(found_S[[64, 128, 192]], expected, atol=0.006)
    assert found_S[0] == 1
    np.testing.assert_array_equal(schedule_fractions("power_cosine:0", ramp_S), np.ones(256))


def test_schedules_lists_and_functions_give_the_expected_scales():
    np.testing.assert_allclose(scales(guidance=2.5), [1, 1.5, 2, 2.5])
    np.testing.assert_allclose(scales(guidance=2.5, guidance_schedule="constant"), [2.5] * 4)
    np.testing.assert_allclose(scales(guidance=[1, 3, 2, 1]), [1, 3, 2, 1])
    np.testing.assert_allclose(scales(guidance=np.array([1, 3, 2, 1])), [1, 3, 2, 1])
    np.testing.assert_allclose(scales(guidance=lambda k: 1 + k / 2), scales(guidance=2.5))
    assert VAROptions(guidance=lambda k: 1 + k).check(4).guidance == (1.0, 2.0, 3.0, 4.0)
    assert MAROptions(guidance=lambda s: 1 + s, steps=3).check().guidance == (1.0, 2.0, 3.0)
    assert VAROptions(guidance=[2.0]).check(1) == VAROptions(guidance=lambda k: 2.0).check(1)


def test_guidance_is_off_outside_of_the_interval():
    np.testing.assert_allclose(scales(guidance=2.5, guidance_from=2), [1, 1, 2, 2.5])
    np.testing.assert_allclose(scales(guidance=2.5, guidance_to=3), [1, 1.5, 2, 1])
    np.testing.assert_allclose(scales(guidance=[4, 3, 2, 5], guidance_to=2), [4, 3, 1, 1])
    assert interval(guidance=2.5) == (1, 4)  # VAR's ramp starts at 1, which is off
    assert interval(guidance=2.5, guidance_schedule="constant") == (0, 4)
    assert interval(guidance=2.5, guidance_from=2, guidance_to=3) == (2, 3)
    assert interval(guidance=[1, 3, 1, 1]) == (1, 2)
    assert interval(guidance=1.0) == interval(guidance=[1, 1, 1, 1]) == (0, 0)


def test_traced_options_give_the_same_scales():
    for given in (dict(guidance=2.5), dict(guidance=(1.0, 3.0, 2.0, 1.0), guidance_to=3)):
        options = VAROptions(**given)
        traced = jax.jit(lambda options: guidance_scales(options, RAMP))(options)
        np.testing.assert_allclose(traced, scales(**given), rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (VAROptions(guidance=(1, 2, 3)), "guidance has 3 numbers: give one, or 4, one for each"),
        (VAROptions(top_k=(1, 2)), "top_k has 2 numbers"),
        (VAROptions(guidance=[3.0]), "guidance has 1 numbers: give one, or 4, one for each"),
        (VAROptions(top_p=(0.5, 0.5, 0.5, 2.0)), r"top_p\[3\]=2.0: must be in \[0, 1\]"),
        (VAROptions(temperature=(1, 1, 1, -1)), r"temperature\[3\]=-1: must be a finite number, 0"),
        (VAROptions(guidance=(1, 2, 3, 0.5)), r"guidance\[3\]=0.5: must be a finite number, 1"),
        (VAROptions(guidance=lambda k: k), r"guidance\[0\]=0: must be a finite number, 1"),
        (VAROptions(guidance_schedule="power_cosine"), "power_cosine: must be linear, constant or"),
        (VAROptions(guidance_schedule="power_cosine:-1"), "must be linear, constant or power"),
        (VAROptions(guidance_schedule="cosine:2"), "must be linear, constant or power_cosine:P"),
        (VAROptions(guidance_from=5), "guidance_from=5: must be at most 4"),
        (VAROptions(guidance_from=4), "guidance_from=4, guidance_to=0: no scale or step"),
        (VAROptions(guidance_from=2, guidance_to=2), "no scale or step is between them"),
        (
            VAROptions(guidance_to=1),  # linear starts at 1, which is off
            "guidance_from=0, guidance_to=1, guidance_schedule=linear: guidance is 1, which is off,"
            " at every scale .*extend the range, give guidance_schedule=constant, or, for no",
        ),
        (VAROptions(guidance_to=1, guidance_schedule="power_cosine:2"), "power_cosine:2: .* is 1"),
        (
            VAROptions(guidance=(3, 2, 1, 1), guidance_from=2),
            "guidance_from=2, guidance_to=0: .* extend the range, or, for no guidance, give",
        ),
    ],
)
def test_invalid_options_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        options.check(4)


def test_a_range_may_be_limited_where_guidance_is_on_or_off_on_purpose():
    assert interval(guidance_to=1, guidance_schedule="constant") == (0, 1)
    assert interval(guidance_to=1, guidance=1) == interval(guidance_to=1, guidance=[1] * 4)
    one_scale = VAROptions().check(1)  # whose ramp is 0, so that the default is no guidance
    assert guided_interval(one_scale, np.zeros(1)) == (0, 0)


def test_mar_refuses_a_range_without_guidance():
    options = MAROptions(steps=4, guidance_to=1, guidance_schedule="power_cosine:2")
    with pytest.raises(InputError, match="guidance_to=1, guidance_schedule=power_cosine:2: .* is "):
        check_sampling(MARConfig.preset("mar_b"), options)
    linear = dataclasses.replace(options, guidance_schedule="linear")  # on at the first step
    assert check_sampling(MARConfig.preset("mar_b"), linear) == linear


def test_mar_lists_need_a_number_for_each_step():
    with pytest.raises(InputError, match="guidance has 2 numbers: give one, or 3"):
        MAROptions(guidance=(1, 2), steps=3).check()
    with pytest.raises(InputError, match="guidance has 3 numbers: give one, or 16"):
        MAROptions(guidance=(1, 2, 3), steps=3).check(16)  # a causal model of 16 tokens
    with pytest.raises(InputError, match="guidance_timestep_from=700: must be below .*=600"):
        MAROptions(guidance_timestep_from=700, guidance_timestep_to=600).check()


def test_lists_pass_through_configs_and_overrides_unchanged():
    options = VAROptions(guidance=(1.0, 2.0, 3.0), top_k=(3, 2, 1))
    assert config_tree.from_dict(VAROptions, config_tree.to_dict(options)) == options
    changed = config_tree.override(VAROptions(), ["guidance=1,2,3.5", "top_k=4", "top_p=0.5"])
    assert changed == VAROptions(guidance=(1.0, 2.0, 3.5), top_k=4, top_p=0.5)


def test_the_interval_is_known_while_a_program_is_traced():
    found = []
    jax.make_jaxpr(lambda: found.append(interval(guidance=(1, 2, 3, 1))))()
    assert found == [(1, 3)]


def test_sweeps_separate_the_numbers_of_a_list_by_colons(tmp_path):
    points = parse_sweep(["guidance=1:2:3,2.5", "guidance_schedule=power_cosine:2"], VAROptions())
    assert [point["guidance"] for point in points] == [(1.0, 2.0, 3.0), 2.5]
    assert points[0]["guidance_schedule"] == "power_cosine:2"
    path = point_path(tmp_path / "report.json", {"guidance": (1.0, 2.0)})
    assert path.name == "report.guidance=1:2.json"


def test_equal_guidance_lists_of_different_types_give_equal_options():
    lists = [[1, 2, 3, 4], (1.0, 2, 3, 4), np.arange(1, 5), lambda k: k + 1]
    found = [dataclasses.replace(VAROptions(), guidance=x).check(4) for x in lists]
    assert len(set(found)) == 1
