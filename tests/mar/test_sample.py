"""MAR's sampling against generations of the reference, and its loops with fake networks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.mar import golden
from tests.mar.test_model import assert_close
from varjax import trees
from varjax.errors import InputError
from varjax.mar.causal import sample_causal
from varjax.mar.heads import NOT_FINITE, CategoricalHead, DiffusionHead
from varjax.mar.latents import decode_tokens
from varjax.mar.masking import UnmaskingSchedule, draw_orders
from varjax.mar.model import MARConfig
from varjax.mar.sample import (
    MAROptions,
    check_sampling,
    make_setup,
    sample_mar_tokens,
    sample_masked,
)
from varjax.sampling.sampler import KnownTokens, image_keys
from varjax.tokenizers.vq.model import VQConfig

KEY_B = image_keys(0, jnp.arange(2))
LABEL_B = jnp.array([1, 9], jnp.int32)
TINY = MARConfig(
    width=24, encoder_depth=1, decoder_depth=1, encoder_heads=2, decoder_heads=2,
    head=DiffusionHead(channels=3, depth=1, width=16), classes=10, latent_map=(3, 4), buffer_size=2,
)  # fmt: skip
FEW = MAROptions(guidance=2.0, steps=5, diffusion_steps="4", clip_denoised=2.0)


def official_noise(case, generation: str, steps: int):
    """Returns an official generation's noise by (image, position, draw), and its token order."""
    out, J = case.out, case.steps
    order_BL = np.ascontiguousarray(out["orders"][:, ::-1]).astype(np.int32)
    known = UnmaskingSchedule(case.config.length, steps).known
    Z = case.config.head.token_shape[0]
    noise_BLJZ = np.zeros((*order_BL.shape, J + 1, Z), np.float32)
    shapes = [tuple(shape) for shape in out[f"{generation}.calls"]]
    call = 0
    for start, stop in zip(known[:-1], known[1:], strict=True):
        rows = [(b, position) for b in range(2) for position in sorted(order_BL[b, start:stop])]
        for j in range(J, -1, -1):
            draw = np.random.RandomState(1000 + call).standard_normal(shapes[call])
            call += 1
            for (b, position), row in zip(rows, draw[: len(rows)], strict=True):
                noise_BLJZ[b, position, j] = row
    assert call == len(shapes)
    return noise_BLJZ, order_BL


def test_reference_noise_is_read_in_order():
    case = golden.case("mar_base")
    noise_BLJZ, _ = official_noise(case, "generate.plain", 4)
    assert (noise_BLJZ[:, :, 1:] != 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("name", golden.CASES)
@pytest.mark.parametrize(
    ("generation", "options"),
    [
        ("generate.plain", dict(guidance=1.0, steps=4)),
        ("generate.cfg3linear", dict(guidance=3.0, steps=4)),
        ("generate.cfg2constant", dict(guidance=2.0, steps=3, guidance_schedule="constant")),
    ],
)
def test_sampling_matches_reference(name, generation, options):
    case = golden.case(name)
    options = MAROptions(**options, diffusion_steps=str(case.steps)).check()
    noise_BLJZ, order_BL = official_noise(case, generation, options.steps)
    noise_BLJZ = jnp.asarray(noise_BLJZ)

    def noise(position_Bm, j):
        return jax.vmap(lambda noise_LJZ, position_m: noise_LJZ[position_m, j])(
            noise_BLJZ, position_Bm
        )

    sample = functools.partial(sample_mar_tokens, case.config, noise=noise)
    setup = make_setup(case.config, options)
    token_BLZ = jax.jit(sample)(case.params, LABEL_B, KEY_B, setup, order_BL=order_BL)
    latents_BhwZ = case.config.unpatchify(token_BLZ)
    assert_close(latents_BhwZ.transpose(0, 3, 1, 2), case.out[generation])


@functools.cache
def params(config):
    """Draws parameters as if trained: none is 0, and z depends on the known tokens."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        std = 2.0 if path == "head/kernel" else 0.3
        return jnp.asarray(rng.normal(path.endswith("scale"), std, leaf.shape), jnp.float32)

    return trees.map_with_path(fill, jax.eval_shape(config.init, jax.random.key(0)))


@functools.cache
def compiled(config):
    return jax.jit(functools.partial(sample_mar_tokens, config))


def sampled(
    config, options, labels=LABEL_B, key_B=KEY_B, keep_BL=None, token_BL=None, group_count=2
):
    setup = make_setup(config, options.check(), keep_BL, group_count)
    known = None if keep_BL is None else KnownTokens(jnp.asarray(token_BL), jnp.asarray(keep_BL))
    return np.asarray(compiled(config)(params(config), labels, key_B, setup, known))


CATEGORICAL = dict(head=CategoricalHead(7))
CAUSAL = dict(causal=True)
KINDS = [{}, CATEGORICAL, CAUSAL, CATEGORICAL | CAUSAL, CAUSAL | dict(order="raster")]


def tiny(changes) -> MARConfig:
    return dataclasses.replace(TINY, **changes)


def nothing_known(batch, length):
    return KnownTokens(jnp.zeros((batch, length), int), jnp.zeros((batch, length), bool))


def counted(known_Bn):
    return jnp.broadcast_to(jnp.sum(known_Bn, axis=1)[:, None, None], (len(known_Bn), 16, 1))


def test_each_token_is_drawn_once_from_all_tokens_known_before_it():
    """A fake network returns how many tokens it was given; the fake head writes that number.

    Fails if a token is drawn twice, or sees padding or a token of its own step.
    """
    schedule = UnmaskingSchedule(length=16, steps=5, group_count=2)
    order_BL = jax.vmap(jax.random.permutation, (0, None))(image_keys(0, jnp.arange(3)), 16)
    token_BL = sample_masked(
        lambda token_Bn, position_Bn, known_Bn: counted(known_Bn),
        lambda z_Bm1, position_Bm, number: z_Bm1[..., 0],
        nothing_known(3, 16),
        order_BL,
        schedule.groups(),
    )
    known_L = np.repeat(schedule.known[:-1], np.diff(schedule.known))  # by rank in the order
    drawn_BL = np.take_along_axis(np.asarray(token_BL), np.asarray(order_BL), axis=1)
    np.testing.assert_array_equal(drawn_BL, np.tile(known_L, (3, 1)))


def test_network_is_given_the_known_tokens_at_their_positions():
    """A fake head writes position + 100; the fake network checks what it is given."""
    schedule, order_BL = UnmaskingSchedule(length=16, steps=4), jnp.arange(16)[None, ::-1]

    def hidden(token_Bn, position_Bn, known_Bn):
        right_Bn = jnp.where(known_Bn, token_Bn == position_Bn + 100, True)
        return jnp.broadcast_to(jnp.all(right_Bn), (1, 16, 1))

    def draw(z_Bm1, position_Bm, number):
        return jnp.where(z_Bm1[..., 0], position_Bm + 100, -1)

    token_BL = sample_masked(hidden, draw, nothing_known(1, 16), order_BL, schedule.groups())
    np.testing.assert_array_equal(token_BL, np.arange(100, 116)[None])


def test_edits_draw_the_missing_tokens_in_the_last_steps():
    """The fake head writes the step's number; image 0 keeps three tokens, image 1 eight."""
    schedule = UnmaskingSchedule(length=16, steps=5)
    kept_B1 = np.array([[3], [8]])
    known = KnownTokens(jnp.full((2, 16), -7), jnp.arange(16)[None] < kept_B1)
    token_BL = sample_masked(
        lambda token_Bn, position_Bn, known_Bn: counted(known_Bn),
        lambda z_Bm1, position_Bm, number: jnp.full(position_Bm.shape, number),
        known,
        jnp.tile(jnp.arange(16), (2, 1)),
        schedule.groups(3, 8),
    )
    step_L = np.repeat(np.arange(5), np.diff(schedule.known))
    expected_BL = np.where(np.arange(16) < kept_B1, -7, step_L)
    np.testing.assert_array_equal(token_BL, expected_BL)


def test_causal_loop_draws_each_token_after_the_one_before_it():
    """The fake cache holds the last token; the fake head adds 1 to it, and writes 0 first."""
    order_BL = jnp.array([[2, 0, 3, 1], [1, 3, 0, 2]])
    known = nothing_known(2, 4)
    known = known.replace(token_BL=jnp.full((2, 4), 50), keep_BL=known.keep_BL.at[0, 3].set(True))
    token_BL = sample_causal(
        lambda position_B: (jnp.full((2, 1), -1), jnp.zeros(2, int)),
        lambda token_B, position_B, next_B, number, count_B: (token_B[:, None], count_B + 1),
        lambda z_B11, position_B1, number: z_B11[..., 0] + 1,
        known,
        order_BL,
    )
    drawn_BL = np.take_along_axis(np.asarray(token_BL), np.asarray(order_BL), axis=1)
    np.testing.assert_array_equal(drawn_BL, [[0, 1, 50, 51], [0, 1, 2, 3]])


@pytest.mark.slow
@pytest.mark.parametrize("changes", KINDS)
def test_images_do_not_depend_on_the_batch(changes):
    config = tiny(changes)
    draw = functools.partial(sampled, config, FEW, group_count=1)
    both = draw()
    for row in range(2):
        alone = draw(LABEL_B[row : row + 1], KEY_B[row : row + 1])
        np.testing.assert_allclose(alone[0], both[row], rtol=1e-4, atol=1e-4)
    assert (both[0] != both[1]).any()
    assert (draw(LABEL_B[::-1])[0] != both[0]).any()
    assert (draw(key_B=image_keys(1, jnp.arange(2)))[0] != both[0]).any()


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, CATEGORICAL])
def test_step_groups_do_not_change_samples(changes):
    config, options = tiny(changes), FEW.replace(diffusion_steps="5:3")
    by_step = sampled(config, options, group_count=0)
    for group_count in (1, 2):
        grouped = sampled(config, options, group_count=group_count)
        np.testing.assert_allclose(grouped, by_step, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_annealed_diffusion_steps_change_only_the_last_tokens():
    config, key_B = TINY, KEY_B
    order_BL = np.asarray(draw_orders(config, key_B))
    options = FEW.replace(guidance=1.0, steps=12)
    all_alike = sampled(config, options.replace(diffusion_steps="4:4"))  # also ends at 950
    # Each of 12 steps draws one token: the first six by 4 denoising steps, the others by 3.
    annealed = sampled(config, options.replace(diffusion_steps="4:3:two_stage"))
    before = 6
    for b in range(2):
        first, rest = order_BL[b, :before], order_BL[b, before:]
        np.testing.assert_allclose(annealed[b, first], all_alike[b, first], rtol=1e-4, atol=1e-5)
        assert (annealed[b, rest] != all_alike[b, rest]).any()


@pytest.mark.slow
@pytest.mark.parametrize("changes", KINDS)
def test_edits_keep_tokens_exactly_and_condition_on_them(changes):
    config, rng = tiny(changes), np.random.default_rng(1)
    shape = 2, config.length, *config.head.token_shape
    token_BL = rng.integers(0, 7, shape) if changes.get("head") else rng.normal(size=shape)
    token_BL = token_BL.astype(config.head.token_dtype)
    keep_BL = np.zeros((2, config.length), bool)
    keep_BL[0, :3], keep_BL[1, :8] = True, True
    edited = sampled(config, FEW, keep_BL=keep_BL, token_BL=token_BL)
    np.testing.assert_array_equal(edited[keep_BL], token_BL[keep_BL])
    others = sampled(config, FEW, keep_BL=keep_BL, token_BL=np.roll(token_BL, 1, axis=1))
    assert (others[~keep_BL] != edited[~keep_BL]).any()
    # Values at positions that are not kept are never read.
    hidden = np.where(keep_BL.reshape(keep_BL.shape + (1,) * (token_BL.ndim - 2)), token_BL, 3)
    same = sampled(config, FEW, keep_BL=keep_BL, token_BL=hidden.astype(token_BL.dtype))
    np.testing.assert_array_equal(same, edited)
    alone = sampled(config, FEW, LABEL_B[:1], KEY_B[:1], keep_BL=keep_BL[:1], token_BL=token_BL[:1])
    np.testing.assert_allclose(alone[0], edited[0], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_an_edit_that_keeps_everything_draws_nothing():
    token_BL = np.random.default_rng(2).normal(size=(2, 12, 3)).astype(np.float32)
    keep_BL = np.ones((2, 12), bool)
    edited = sampled(TINY, FEW, keep_BL=keep_BL, token_BL=token_BL)
    np.testing.assert_array_equal(edited, token_BL)


@pytest.mark.slow
def test_temperature_0_is_greedy():
    config = tiny(CATEGORICAL)
    greedy = [
        sampled(
            config,
            MAROptions(guidance=1.0, steps=1, temperature=0.0),
            key_B=image_keys(s, jnp.arange(2)),
        )
        for s in (0, 1)
    ]
    np.testing.assert_array_equal(*greedy)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(steps=13), "steps=13: must be at most 12, the number of tokens"),
        (dict(steps=0), "steps=0: must be a whole number, 1 or more"),
        (dict(guidance=-1.0), "guidance=-1.0: must be a finite number, 1 .off."),
        (dict(guidance=float("nan")), "guidance=nan: must be a finite number, 1"),
        (dict(guidance_schedule="cosine"), "guidance_schedule=cosine: must be linear, constant or"),
        (dict(temperature=-0.1), "temperature=-0.1: must be a finite number, 0 or more"),
        (dict(clip_denoised=-1.0), "clip_denoised=-1.0: must be a finite number, 0"),
        (dict(diffusion_steps="1"), "diffusion_steps=1: give one number, 2 … 1000"),
        (dict(diffusion_steps="50:x"), "diffusion_steps=50:x: give one number"),
        (dict(diffusion_steps="5:1001"), "diffusion_steps=5:1001: give one number"),
        (dict(diffusion_steps="50:5:sine"), "SCHEDULE is linear, cosine, two_stage"),
        (dict(diffusion_steps="50:5:cosine:"), "diffusion_steps=50:5:cosine:: give one number"),
    ],
)
def test_options_out_of_range_are_refused(options, says):
    with pytest.raises(InputError, match=says):
        check_sampling(TINY, MAROptions(**options))


def test_integer_options_share_a_compilation_with_floats():
    setup = make_setup(TINY, MAROptions(guidance=3, steps=4.0, diffusion_steps=10).check())
    same = make_setup(TINY, MAROptions(guidance=3.0, steps=4, diffusion_steps="10").check())
    assert jax.tree.structure(setup) == jax.tree.structure(same)


@pytest.mark.slow
def test_codes_from_nan_logits_are_marked():
    """An argmax would choose a valid code, and the image would look like any other."""
    config = tiny(CATEGORICAL)
    bad = jax.tree.map(lambda x: np.full_like(x, np.nan), params(config)["head"])
    setup = make_setup(config, FEW.check(), None, 2)
    tokens_BL = compiled(config)(params(config) | {"head": bad}, LABEL_B, KEY_B, setup, None)
    assert (np.asarray(tokens_BL) == NOT_FINITE).all()


def test_images_with_marked_codes_are_nan():
    class Gray(VQConfig):
        def decode(self, params, latents, compute):
            return jnp.ones((len(latents["tokens_BL"]), 2, 2, 1))

    tokens_BL = jnp.array([[0, 5, 6], [0, NOT_FINITE, 6]])
    images_BHWC = np.asarray(decode_tokens(Gray(), tiny(CATEGORICAL), {}, tokens_BL))
    assert (images_BHWC[0] == 1).all() and np.isnan(images_BHWC[1]).all()
