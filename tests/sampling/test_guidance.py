import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import runs
from varjax.cli.sample import main
from varjax.config import config_tree
from varjax.errors import InputError
from varjax.mar.sample import MAROptions
from varjax.sampling.guidance import apply_guidance
from varjax.sampling.sampler import replace_options
from varjax.var.sample import VAROptions


@pytest.mark.parametrize("cfg", [0.25, 1.5, 4.0])
def test_var_guidance_is_the_official_cfg_plus_one(cfg):
    """Official VAR computes (1+t)·c - t·u with t = cfg · progress, which is equal up to rounding.

    So the same keys draw the same tokens.
    """
    conditional_BlV, unconditional_BlV = np.random.default_rng(0).normal(0, 3, (2, 4, 30, 256))
    both_2BlV = jnp.concatenate([conditional_BlV, unconditional_BlV]).astype(jnp.float32)
    gumbel_BlV = jax.random.gumbel(jax.random.key(0), (4, 30, 256))
    for progress in (0, 1 / 3, 2 / 3, 1):
        t = cfg * progress
        official_BlV = (1 + t) * both_2BlV[:4] - t * both_2BlV[4:]
        guided_BlV = apply_guidance(
            both_2BlV, 1 + (VAROptions(guidance=cfg + 1).guidance - 1) * progress
        )
        np.testing.assert_allclose(guided_BlV, official_BlV, atol=1e-5)
        draws_Bl = [jnp.argmax(x + gumbel_BlV, axis=-1) for x in (guided_BlV, official_BlV)]
        np.testing.assert_array_equal(*draws_Bl)


@pytest.mark.parametrize(
    ("options", "former", "message"),
    [
        (VAROptions(), {"cfg": 1.5}, "cfg=1.5: write guidance=2.5, for guidance is VAR's cfg + 1"),
        (VAROptions(), {"cfg": "1.5"}, "cfg=1.5: write guidance=2.5, for"),
        (MAROptions(), {"cfg": 2.9}, "cfg=2.9: write guidance=2.9, for MAR's cfg is now called"),
        (
            MAROptions(),
            {"cfg_schedule": "constant"},
            "cfg_schedule=constant: write guidance_schedule=constant, its name now",
        ),
    ],
)
def test_the_error_for_cfg_names_its_replacement(options, former, message):
    with pytest.raises(InputError) as error:
        replace_options(options, former)
    assert message in str(error.value)
    ((name, value),) = former.items()
    with pytest.raises(InputError) as error:
        config_tree.override(options, [f"{name}={value}"])
    assert message in str(error.value)


def test_the_error_for_a_cfg_flag_depends_on_the_model_family(tmp_path, capsys):
    arguments = [f"--weights={runs.untrained_var()}", f"--out={tmp_path / 'a.png'}", "--cfg=0.5"]
    assert main(arguments) == 1
    assert "cfg=0.5: write guidance=1.5, for guidance is VAR's cfg + 1" in capsys.readouterr().err
