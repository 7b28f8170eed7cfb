"""VAR in bfloat16 against float32. Each bound is three times the measured error."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import golden_cases as golden
from varjax import trees
from varjax.nn.compute import ComputeConfig
from varjax.sampling.sampler import image_keys
from varjax.tokenizers.vq.model import bound_quantizer, decode_features
from varjax.training.optimizer import AdamW
from varjax.training.task import Plan
from varjax.var.model import VAR
from varjax.var.network import VARModels
from varjax.var.sample import VAROptions, sample_tokens
from varjax.var.task import VARTask

pytestmark = pytest.mark.slow

TOKENIZER, CONFIG = golden.configs("base")
LABEL_B = jnp.arange(16) % CONFIG.classes
BOTH = [ComputeConfig(dtype, attention_impl="xla") for dtype in ("float32", "bfloat16")]


@pytest.fixture(scope="module")
def params():
    return {"tokenizer": golden.tokenizer_params("base"), "var": golden.var_params("base")}


@pytest.fixture(scope="module")
def tokens_BL():
    shape = 16, CONFIG.pyramid.length
    return jax.random.randint(jax.random.key(1), shape, 0, CONFIG.vocab, jnp.int32)


def in_both(function):
    return [jax.device_get(jax.jit(lambda c=c: function(c))()) for c in BOTH]


def test_bfloat16_logits_are_close(params, tokens_BL):
    quantizer = bound_quantizer(TOKENIZER, params["tokenizer"])
    input_BlZ = quantizer.teacher_forcing_input(quantizer.accumulated_scales(tokens_BL))

    def logits(compute):
        model = VAR(CONFIG, compute).bind({"params": params["var"]})
        cond, cache, found = model.condition(LABEL_B), model.empty_cache(len(LABEL_B)), []
        for k, scale in enumerate(CONFIG.pyramid.slices):
            now = input_BlZ[:, scale.start - 1 : scale.stop - 1] if k else None
            logits_BlV, cache = model.predict(now, cond, k, cache)
            found.append(logits_BlV)
        return jnp.concatenate(found, axis=1)

    exact, half = in_both(logits)
    error = np.std(half - exact) / np.std(exact)
    assert 0 < error < 0.0105, error


def test_bfloat16_tokens_and_images_are_close(params):
    options, key_B = VAROptions(guidance=2.5, top_k=20, top_p=0.9), image_keys(0, jnp.arange(16))

    def sampled(compute):
        models = VARModels(TOKENIZER, CONFIG, compute)
        return sample_tokens(models, params, LABEL_B, key_B, options)

    (exact, f_hats), (half, _) = in_both(sampled)
    # After a first different token, all others may differ, so only their fraction is bounded.
    same_L = (exact == half).mean(axis=0)
    assert 1 - same_L.mean() < 0.06, same_L
    a, b = in_both(
        lambda compute: decode_features(TOKENIZER, params["tokenizer"], f_hats[-1], compute)
    )
    assert 0 < np.abs(a - b).max() < 0.4 and np.abs(a - b).mean() < 0.033


def test_a_bfloat16_training_step_is_close(params, tokens_BL):
    def step(compute):
        task = VARTask(CONFIG, TOKENIZER, "none", AdamW(), compute=compute)
        state = dataclasses.replace(task.init(jax.random.key(0)), params=params["var"])
        batch = {"tokens_BL": tokens_BL, "label_B": LABEL_B}
        after, metrics = task.train_step(
            state, params["tokenizer"], batch, jax.random.key(2), Plan(10, 16)
        )
        moved = jax.tree.map(jnp.subtract, after.params, state.params)
        return metrics["loss"], metrics["grad_norm"], after.opt_state[1].mu, moved

    (loss, norm, grads, moved), (half_loss, half_norm, half_grads, half_moved) = in_both(step)
    assert 0 < abs(half_loss / loss - 1) < 1e-4
    assert abs(half_norm / norm - 1) < 1.2e-3
    half_grads, half_moved = trees.paths(half_grads), trees.paths(half_moved)
    for path, grad in trees.paths(grads).items():
        assert grad.dtype == half_grads[path].dtype == np.float32
        error = np.linalg.norm(half_grads[path] - grad) / np.linalg.norm(grad)
        # The gradient of a bias is a sum over tokens that nearly cancels.
        assert 0 < error < (0.12 if path.endswith("bias") else 0.035), (path, error)
    for path, change in trees.paths(moved).items():
        same = np.mean(np.sign(half_moved[path]) == np.sign(change))  # of Adam's first step
        assert same > 0.98 and half_moved[path].dtype == np.float32, (path, same)
