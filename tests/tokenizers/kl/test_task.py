import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers.adversarial import QUICKLY
from tests.tokenizers.kl.test_model import small_config
from varjax import trees
from varjax.errors import InputError
from varjax.tokenizers.kl.model import KLTokenizer, latent_moments, sample_posterior
from varjax.tokenizers.kl.task import LATENT_STD_DECAY, KLTask
from varjax.tokenizers.losses.gan import GANConfig
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan

CONFIG = small_config(image_size=(8, 8), image_channels=1)
TASK = KLTask(CONFIG, AdamW(base_lr=2e-3, schedule="constant", warmup=0.0), ema_decay=0.5, kl=1e-2)
IMAGE_BHWC = np.random.default_rng(0).integers(0, 256, (6, *CONFIG.image_shape), dtype=np.uint8)
BATCH, KEY = {"image_BHWC": IMAGE_BHWC}, jax.random.key(1)


@pytest.fixture(scope="module")
def state():
    return jax.jit(TASK.init)(jax.random.key(0))


@pytest.fixture(scope="module")
def train_step():
    """Returns a training step that is compiled once for all tests with its settings."""
    return jax.jit(functools.partial(TASK.train_step, plan=Plan()))


def evaluate(state, batch_size):
    totals, step = None, jax.jit(TASK.eval_step)
    for start in range(0, 6, batch_size):
        rows = np.arange(start, start + batch_size)
        batch = {"image_BHWC": IMAGE_BHWC[np.minimum(rows, 5)], "valid_B": rows < 6}
        sums = jax.device_get(step(state, {}, batch))
        totals = sums if totals is None else jax.tree.map(np.add, totals, sums)
    return TASK.eval_metrics(totals)


@pytest.mark.slow
def test_evaluation_does_not_depend_on_the_batch_size(state):
    expected, found = evaluate(state, 6), evaluate(state, 4)
    assert expected.keys() == found.keys() == {"loss", "l1", "l2", "kl", "psnr", "latent_std"}
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


@pytest.mark.slow
def test_loss_is_the_weighted_sum_of_its_terms(state):
    task = dataclasses.replace(TASK, l1=0.3, l2=0.7, kl=0.5)
    losses, _ = jax.jit(task.losses)(state.params, {}, IMAGE_BHWC)
    expected = 0.3 * losses["l1"] + 0.7 * losses["l2"] + 0.5 * losses["kl"] / 64
    np.testing.assert_allclose(losses["loss"], expected, rtol=1e-5)


@pytest.mark.slow
def test_latent_std_matches_that_of_posterior_samples(state):
    """Measures the deviation of many samples; the task computes it from moments."""
    latents = jax.jit(CONFIG.encode)(state.params, IMAGE_BHWC)
    noise = np.random.default_rng(0).standard_normal((500, 6, *CONFIG.latent_shape), np.float32)
    samples = np.asarray(jax.vmap(lambda x: sample_posterior(latents, x))(jnp.asarray(noise)))
    np.testing.assert_allclose(evaluate(state, 6)["latent_std"], samples.std(), rtol=0.02)


@pytest.mark.slow
def test_latent_std_is_a_moving_average_from_the_first_batch_on(state, train_step):
    @jax.jit
    def spread(params):
        moments = latent_moments(CONFIG.encode(params, IMAGE_BHWC))
        mean, square = (jnp.mean(x_B) for x_B in moments.values())
        return jnp.sqrt(square - mean**2)

    # A run that starts from another's weights ignores their latent_std.
    state = dataclasses.replace(state, params=state.params | {"latent_std": jnp.float32(7)})
    first, _ = train_step(state, {}, BATCH, KEY)
    np.testing.assert_allclose(first.params["latent_std"], spread(state.params), rtol=1e-4)
    second, metrics = train_step(first, {}, BATCH, KEY)
    expected = LATENT_STD_DECAY * spread(state.params) + 0.01 * spread(first.params)
    np.testing.assert_allclose(second.params["latent_std"], expected, rtol=1e-4)
    assert metrics["latent_std"] == second.params["latent_std"] == second.ema["latent_std"]
    moments = second.opt_state[1]
    assert moments.mu["latent_std"] == moments.nu["latent_std"] == 0


@pytest.mark.slow
def test_accumulation_changes_only_rounding(state, train_step):
    expected_state, expected = train_step(state, {}, BATCH, KEY)
    task = dataclasses.replace(TASK, accumulate=3)
    found_state, found = jax.jit(functools.partial(task.train_step, plan=Plan()))(
        state, {}, BATCH, KEY
    )
    for name in expected:
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-3, err_msg=name)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0.01, atol=1e-5)  # noqa: E731
    jax.tree.map(close, found_state.opt_state[1].mu, expected_state.opt_state[1].mu)


@pytest.mark.slow
def test_gradients_match_the_whole_loss(state, train_step):
    """Differentiates pixel loss and KL at once, with the noise that the step draws."""
    step_key = jax.random.fold_in(KEY, 0)
    key_B = [jax.random.fold_in(step_key, i) for i in range(6)]
    keys = [jax.random.fold_in(key, 102) for key in key_B]
    noise_BhwZ = jnp.stack([jax.random.normal(key, CONFIG.latent_shape) for key in keys])
    x_BHWC = IMAGE_BHWC.astype(np.float32) / 127.5 - 1

    @jax.jit
    @jax.grad
    def grads(params):
        y_BHWC, latents = KLTokenizer(CONFIG).apply({"params": params}, x_BHWC, noise_BhwZ)
        mean, std = latents["mean_BhwZ"], latents["std_BhwZ"]
        kl = 0.5 * jnp.sum(mean**2 + std**2 - 1 - 2 * jnp.log(std)) / 6
        return jnp.mean(jnp.abs(y_BHWC - x_BHWC)) + 1e-2 * kl / 64

    expected = grads(state.params)
    after, metrics = train_step(state, {}, BATCH, KEY)
    clip = min(1, 2.0 / metrics["grad_norm"])
    mu = jax.tree.map(lambda x: x / (0.1 * clip), after.opt_state[1].mu)  # b1 is 0.9
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)  # noqa: E731
    jax.tree.map(close, mu, expected)


@pytest.mark.slow
def test_training_reduces_the_loss_and_updates_every_parameter(state, train_step):
    first, losses = state, []  # constant learning rate, so the plan's length does not matter
    for _ in range(40):
        state, metrics = train_step(state, {}, BATCH, KEY)
        losses.append(float(metrics["l1"]))
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    changed = jax.tree.map(lambda a, b: bool(jnp.any(a != b)), state.params, first.params)
    moved = trees.paths(changed)
    assert all(moved.values()), [path for path, m in moved.items() if not m]


GAN_TASK = dataclasses.replace(
    TASK, gan=GANConfig("patch", 8, 1, start=0.0, ramp=0.0), ema_decay=0.0
)


@pytest.fixture(scope="module")
def gan_step():
    return jax.jit(
        functools.partial(GAN_TASK.train_step, plan=Plan(8, 6)), compiler_options=QUICKLY
    )


def gan_state(state, logit_factor):
    """Makes the tokenizer's state with a discriminator whose logits are scaled by a factor."""
    fresh = jax.eval_shape(GAN_TASK.init, KEY)
    rng = np.random.default_rng(3)

    def fill(path, leaf):
        if not path.startswith("opt_state/discriminator/train_state/params"):
            return np.zeros(leaf.shape, leaf.dtype)
        factor = logit_factor if "conv_out" in path else 1
        return (factor * rng.normal(path.endswith("scale"), 0.2, leaf.shape)).astype(leaf.dtype)

    return dataclasses.replace(trees.map_with_path(fill, fresh), params=state.params)


@functools.partial(jax.jit, compiler_options=QUICKLY)
def ldm_gradients(params, discriminator, noise_BhwZ):
    """Computes gradients of all losses, summed over an image's values and weighted as in LDM.

    Returns:
        The gradients and the adversarial loss's weight, both for means instead of sums, and the
        ratio of norms before clipping.
    """
    x_BHWC = jnp.asarray(IMAGE_BHWC.astype(np.float32) / 127.5 - 1)

    def terms(params):
        y_BHWC, latents = KLTokenizer(CONFIG).apply({"params": params}, x_BHWC, noise_BhwZ)
        mean, std = latents["mean_BhwZ"], latents["std_BhwZ"]
        kl = 0.5 * jnp.sum(mean**2 + std**2 - 1 - 2 * jnp.log(std)) / 6
        logits = GAN_TASK.gan.discriminator().apply({"params": discriminator}, y_BHWC)
        return jnp.sum(jnp.abs(y_BHWC - x_BHWC)) / 6, kl, -jnp.mean(logits)

    pixels, kl, adversarial = jax.jacrev(terms)(params)
    norms = [jnp.linalg.norm(g["decoder"]["conv_out"]["kernel"]) for g in (pixels, adversarial)]
    ratio = norms[0] / (norms[1] + 1e-4)
    weight = 0.5 * jnp.clip(ratio, 0, 1e4)
    total = jax.tree.map(lambda p, k, a: p + 1e-2 * k + weight * a, pixels, kl, adversarial)
    return jax.tree.map(lambda g: g / 64, total), weight / 64, ratio


@pytest.mark.slow
@pytest.mark.parametrize(("logit_factor", "bounded"), [(1.0, False), (1e-4, True)])
def test_a_step_with_a_discriminator_matches_ldm(state, gan_step, logit_factor, bounded):
    before = gan_state(state, logit_factor)
    discriminator = before.opt_state["discriminator"].train_state.params
    keys = [jax.random.fold_in(jax.random.fold_in(KEY, 0), i) for i in range(6)]
    noise_BhwZ = jnp.stack(
        [jax.random.normal(jax.random.fold_in(key, 102), CONFIG.latent_shape) for key in keys]
    )
    grads, weight, ratio = ldm_gradients(state.params, discriminator, noise_BhwZ)
    assert (ratio > 1e4) == bounded
    after, metrics = gan_step(before, {}, BATCH, KEY)
    np.testing.assert_allclose(metrics["adversarial_weight"], weight, rtol=1e-3)
    clip = min(1, 2.0 / metrics["grad_norm"])
    mu = jax.tree.map(lambda x: x / (0.1 * clip), after.opt_state["tokenizer"][1].mu)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-5), mu, grads)
    assert after.params.keys() == state.params.keys()  # without the discriminator
    trained = after.opt_state["discriminator"].train_state.params
    moved = trees.paths(jax.tree.map(lambda a, b: bool(jnp.any(a != b)), trained, discriminator))
    assert all(moved[path] for path in moved if path.endswith("kernel"))


def test_previews_show_the_images_and_their_reconstructions(state):
    rows = jax.jit(TASK.preview)(state, {}, BATCH)["reconstructions"]
    assert rows.shape == (2, 6, *CONFIG.image_shape)
    np.testing.assert_allclose(rows[0], IMAGE_BHWC / 255, atol=1e-6)
    decoded = jax.jit(lambda p: CONFIG.decode(p, CONFIG.encode(p, IMAGE_BHWC)))(state.params)
    np.testing.assert_allclose(rows[1], decoded, atol=1e-5)


@pytest.mark.parametrize("field, value", [("ema_decay", 1.5), ("l1", -1.0), ("kl", -0.1)])
def test_settings_out_of_range_are_refused(field, value):
    with pytest.raises(InputError, match=field):
        dataclasses.replace(TASK, **{field: value})


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(InputError, match=r"\(16, 16, 1\), but the tokenizer takes \(8, 8, 1\)"):
        TASK.check((16, 16, 1), 10)
    with pytest.raises(InputError, match="too small for gan.kind"):
        dataclasses.replace(TASK, gan=GANConfig(layers=3)).check((8, 8, 1), 10)
