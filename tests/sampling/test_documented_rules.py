"""Executes the examples under "Your own rules" in docs/sampling.md as they are written there."""

import re
import types

import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.paths import ROOT
from tests.var.test_guided_scales import VAR, pipeline
from tests.var.test_sample import QUANTIZER
from varjax.sampling.sampler import image_keys
from varjax.var.sample import VAROptions, choose_tokens, sample_scales


def blocks() -> list[str]:
    text = (ROOT / "docs" / "sampling.md").read_text()
    return re.findall(r"```python\n(.*?)```", text.partition("### Your own rules")[2], re.DOTALL)


class Recorder:
    """A model whose `sample` records its options."""

    def sample(self, labels, **options):
        self.options = options


def test_the_documented_copy_of_the_built_in_rule_draws_the_same_tokens():
    model = Recorder()
    exec(blocks()[0], {"model": model})
    logits_BlV = jnp.asarray(np.random.default_rng(0).normal(size=(2, 16, 32)) * 4, jnp.float32)
    given = QUANTIZER, logits_BlV, 2, image_keys(0, jnp.arange(2)), VAROptions().check()
    for own, built_in in zip(
        choose_tokens(*given, model.options["choose"]), choose_tokens(*given), strict=True
    ):
        np.testing.assert_array_equal(own, built_in)


def test_the_documented_mar_rule_changes_the_temperature_of_some_steps():
    drawn, model = [], Recorder()
    head = types.SimpleNamespace(draw=lambda *given: drawn.append(given[-1].temperature))
    model.mar = types.SimpleNamespace(head=head)
    exec(blocks()[2], {"mar_model": model, "jnp": jnp})
    for step in (9, 10):
        settings = types.SimpleNamespace(step=step)
        settings._replace = lambda temperature: types.SimpleNamespace(temperature=temperature)
        model.options["choose"](None, None, None, settings)
    np.testing.assert_allclose(drawn, [0.9, 1.0])


@pytest.mark.slow
def test_the_documented_self_guidance_moves_logits_away_from_the_previous_scale():
    model = pipeline()
    model.decode = lambda token_BL: token_BL
    found: dict = {"model": model, "jnp": jnp}
    exec(blocks()[1], found)
    assert found["images"].shape == (3, 21)
    x_BhwV = jnp.asarray(np.random.default_rng(0).normal(size=(1, 2, 2, 3)), jnp.float32)
    large_BhwV = found["enlarge"](x_BhwV, 4, 4)
    np.testing.assert_allclose(large_BhwV.mean((1, 2)), x_BhwV.mean((1, 2)), atol=1e-5)
    np.testing.assert_allclose(found["enlarge"](x_BhwV, 2, 2), x_BhwV, atol=1e-5)

    rng, shapes = np.random.default_rng(1), VAR.pyramid.shapes
    logits = [jnp.asarray(rng.normal(size=(3, n, 32)), jnp.float32) for n in (1, 4, 16)]
    seen = []

    def choose(logits_BlV, k):
        seen.append(logits_BlV)
        token_Bl = jnp.zeros(logits_BlV.shape[:2], jnp.int32)
        return token_Bl, QUANTIZER.look_up(token_Bl)

    network = found["self_guided"](lambda _, k, cache: (logits[k], cache), shapes, beta=0.5)
    sample_scales(network, choose, QUANTIZER, 3)
    np.testing.assert_array_equal(seen[0], logits[0])
    prior_BlV = found["enlarge"](logits[0].reshape(3, 1, 1, -1), 2, 2).reshape(3, 4, -1)
    np.testing.assert_allclose(seen[1], logits[1] + 0.5 * (logits[1] - prior_BlV), atol=1e-5)
