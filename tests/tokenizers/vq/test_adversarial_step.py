import dataclasses
import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import forked
from tests.helpers.adversarial import BATCH, GAN, KEY, PLAN, QUICKLY, TASK, frozen, state
from tests.helpers.paths import ROOT
from varjax import trees
from varjax.nn.autoencoder import to_model_range
from varjax.tokenizers.losses.gan import GANConfig, gan_gradients
from varjax.tokenizers.losses.image_losses import image_losses
from varjax.tokenizers.losses.lpips import LPIPSConfig
from varjax.tokenizers.vq.codebook import CodebookConfig
from varjax.tokenizers.vq.model import VQTokenizer

PLAIN = dataclasses.replace(TASK, gan=None)
EARLY, LATE = 1, 6  # steps before the discriminator's start, and with its full weight


@functools.cache
def compiled(task):
    return jax.jit(functools.partial(task.train_step, plan=PLAN), compiler_options=QUICKLY)


def after(task, step=LATE):
    """Returns (state, metrics) after update number `step`."""
    return compiled(task)(state(task, step), frozen(), BATCH, KEY)


def discriminator_of(state):
    return state.opt_state["discriminator"]


@pytest.mark.slow
def test_adaptive_weight_matches_finite_differences():
    """Differentiates both losses numerically with respect to the decoder's last kernel."""
    params, discriminator = state(TASK, LATE).params, discriminator_of(state(TASK, LATE))
    key = jax.random.fold_in(KEY, LATE)
    key_B = jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(8))
    x_BHWC = to_model_range(BATCH["image_BHWC"])
    last = params["decoder"]["conv_out"]

    @functools.partial(jax.jit, compiler_options=QUICKLY)
    def losses(change):
        conv_out = last | {"kernel": last["kernel"] + change}
        changed = params | {"decoder": params["decoder"] | {"conv_out": conv_out}}
        y_BHWC, _, _ = VQTokenizer(TASK.model).apply({"params": changed}, x_BHWC)
        reconstruction = jnp.mean(image_losses(TASK, {}, x_BHWC, y_BHWC)["loss"])
        found = gan_gradients(GAN, discriminator, x_BHWC, y_BHWC, key_B)
        return jnp.stack([reconstruction, found.metrics["adversarial"]])

    shape = last["kernel"].shape
    changes = 0.02 * np.eye(np.prod(shape), dtype=np.float32).reshape(-1, *shape)
    slopes = [(losses(change) - losses(-change)) / 0.04 for change in changes]
    reconstruction, adversarial = np.linalg.norm(slopes, axis=0)
    _, metrics = after(TASK)
    expected = GAN.weight * reconstruction / (adversarial + 1e-4)
    np.testing.assert_allclose(metrics["adversarial_weight"], expected, rtol=0.01)
    assert reconstruction > 1e-3 and adversarial > 1e-3


@pytest.mark.slow
def test_the_discriminator_changes_nothing_before_its_start():
    (alone, alone_metrics), (both, metrics) = after(PLAIN, EARLY), after(TASK, EARLY)
    assert metrics["adversarial_weight"] == 0 and metrics["discriminator/lr"] == 0
    assert metrics["discriminator/grad_norm"] > 0
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-6)
    jax.tree.map(close, both.opt_state["tokenizer"], alone.opt_state)
    for name in alone_metrics:
        close(metrics[name], alone_metrics[name], err_msg=name)
    before = discriminator_of(state(TASK, EARLY))
    jax.tree.map(np.testing.assert_array_equal, discriminator_of(both), before)
    assert jax.tree.structure(both.params) == jax.tree.structure(alone.params)


@pytest.mark.slow
def test_both_networks_are_updated_and_all_losses_are_logged():
    gan = dataclasses.replace(GAN, r1=0.1)
    task = dataclasses.replace(TASK, perceptual=LPIPSConfig(), gan=gan, dtype="bfloat16")
    with jax.numpy_dtype_promotion("standard"):  # Flax's norms promote
        new, metrics = after(task)
    old = state(task, LATE)
    for a, b in ((new.params, old.params), (discriminator_of(new), discriminator_of(old))):
        moved = jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.any(a != b)), a, b))
        assert sum(moved) > 0.8 * len(moved)
    terms = {"loss", "l1", "l2", "psnr", "perceptual", "quantizer", "adversarial"}
    terms |= {"adversarial_weight", "grad_norm", "update_norm", "param_norm", "lr", "perplexity"}
    own = {"loss", "lecam", "r1", "real", "fake", "accuracy", "grad_norm", "lr"}
    assert metrics.keys() == terms | {f"discriminator/{name}" for name in own}
    assert all(x.dtype == jnp.float32 and np.all(np.isfinite(x)) for x in metrics.values())
    total = metrics["l2"] + metrics["perceptual"] + metrics["quantizer"]
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)
    _, exact = after(TASK)  # in float32, and without the perceptual loss
    for name in ("l1", "l2", "quantizer", "adversarial", "discriminator/loss"):
        np.testing.assert_allclose(metrics[name], exact[name], rtol=0.05, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("kind, accumulate", [("patch", 2), ("style", 1), ("style", 4)])
def test_a_step_keeps_state_shapes_with_every_kind_of_discriminator(kind, accumulate):
    gan = GANConfig(kind, 8, 1, "non_saturating", adaptive=kind == "patch", r1=1.0)
    task = dataclasses.replace(TASK, gan=gan, accumulate=accumulate)
    before = jax.eval_shape(task.init, KEY)
    new, metrics = jax.eval_shape(
        functools.partial(task.train_step, plan=PLAN), before, {}, BATCH, KEY
    )
    assert not trees.difference(before, new)
    assert all(x.dtype == jnp.float32 for x in metrics.values())


@pytest.mark.slow
def test_accumulation_changes_only_rounding():
    task = dataclasses.replace(TASK, codebook=CodebookConfig(scale_dropout=0.5, scales_kept=1))
    (whole, metrics), (parts, parts_metrics) = (
        after(task),
        after(dataclasses.replace(task, accumulate=2)),
    )
    for name in metrics:
        np.testing.assert_allclose(parts_metrics[name], metrics[name], rtol=1e-3, err_msg=name)
    close = functools.partial(np.testing.assert_allclose, rtol=0.01, atol=1e-5)
    for of in (
        lambda s: s.opt_state["tokenizer"],
        lambda s: discriminator_of(s).train_state.opt_state,
    ):
        jax.tree.map(close, of(parts)[1].mu, of(whole)[1].mu)


EIGHT_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import functools
import sys
import numpy as np
from tests.helpers.adversarial import BATCH, KEY, PLAN, QUICKLY, TASK, state
from varjax import trees
from varjax.training.sharding import put_batch
from varjax.training.sharding import MeshShape, make_mesh, on_mesh, shardings

mesh = make_mesh(MeshShape(data=4, fsdp=2))
before = state(TASK, 6)
placement = shardings(before, mesh)
step = jax.jit(
    on_mesh(functools.partial(TASK.train_step, plan=PLAN), mesh),
    out_shardings=(placement, None), compiler_options=QUICKLY,
)
new, metrics = step(jax.device_put(before, placement), {}, put_batch(BATCH, mesh, 8), KEY)
kernel = new.opt_state["discriminator"].train_state.params["conv_1"]["kernel"]
assert kernel.addressable_shards[0].data.shape[2] == kernel.shape[2] // 2
found = {path.replace("/", "."): x for path, x in trees.paths((new, metrics)).items()}
np.savez(sys.argv[1], **jax.device_get(found))
"""


@pytest.mark.slow
def test_a_sharded_step_equals_a_step_on_one_device(tmp_path):
    command = [sys.executable, "-c", EIGHT_DEVICES, str(tmp_path / "sharded.npz")]
    forked.run(command, check=True, timeout=300, cwd=ROOT)
    expected = trees.paths(after(TASK))
    with np.load(tmp_path / "sharded.npz") as found:
        assert len(found.files) == len(expected)
        for path, x in expected.items():
            if "/mu/" in path or path.startswith("1/"):  # gradients and metrics
                there = found[path.replace("/", ".")]
                np.testing.assert_allclose(there, x, rtol=0.01, atol=1e-5, err_msg=path)
