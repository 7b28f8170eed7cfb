"""The pieces of MAR's sampling that benchmarks compile, against the whole program."""

import functools

import jax
import jax.numpy as jnp
import pytest

from varjax.mar.benchmark import sampling_programs
from varjax.nn.compute import ComputeConfig
from varjax.runtime import flops
from varjax.sampling.sampler import image_keys

COMPUTE = ComputeConfig()


def work(diffusion_steps, guided=True):
    """Returns the pieces' FLOP and denoising steps, and a function that counts the whole's FLOP."""
    programs = sampling_programs("mar_b", 12, guided, diffusion_steps=diffusion_steps)
    params = jax.eval_shape(programs.init, jax.random.key(0))
    arguments = jax.eval_shape(
        lambda: (programs.options, jnp.zeros(2, jnp.int32), image_keys(0, jnp.arange(2)))
    )
    pieces = programs.pieces(params, *arguments, COMPUTE)
    total, denoising = 0, 0
    for piece in pieces:
        function = functools.partial(piece.function, compute=COMPUTE)
        total += piece.times * flops.count(function, *piece.arguments)
        denoising += piece.times * piece.name.startswith("denoising")
    sample = functools.partial(programs.sample, compute=COMPUTE)
    return total, denoising, lambda: flops.count(sample, params, *arguments)


@pytest.mark.parametrize("guided", [True, False])
def test_pieces_have_the_flop_of_the_whole_program(guided):
    total, denoising, count_whole = work("10", guided)
    assert denoising == 12 * 10
    assert total == pytest.approx(count_whole(), rel=0.01)


def test_pieces_count_a_varying_number_of_denoising_steps():
    most, _, _ = work("10")
    total, denoising, count_whole = work("10:5")  # DiSA
    assert denoising == sum(5 + (11 - k) * 5 // 11 for k in range(12)) and total < most
    with pytest.raises(flops.UnknownIterations):
        count_whole()
