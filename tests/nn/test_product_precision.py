"""The precision of products in traced programs, which are not run."""

import collections

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core

from tests.helpers import runs
from varjax.data.sources import Digits
from varjax.mar.task import MARTask
from varjax.metrics.inception import Inception, init_inception
from varjax.nn.attention import block_causal_mask, mask_segments
from varjax.nn.compute import EXACT, ComputeConfig
from varjax.tokenizers.vq.model import image_features, make_quantizer
from varjax.var.model import VAR
from varjax.var.task import VARTask
from varjax.var.teacher_forcing import targets_and_inputs


def products(function, *args):
    """Counts the products of a function by (dtype of the operands, dtype of the result, precision).

    The precision is "HIGH" and so on, or None if none is requested.
    """
    found = collections.Counter()

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name in ("dot_general", "conv_general_dilated"):
                asked = equation.params["precision"]
                asked = asked[0] if isinstance(asked, tuple) else asked
                name = None if asked is None else asked.name
                operand, result = equation.invars[0].aval.dtype, equation.outvars[0].aval.dtype
                found[operand.name, result.name, name] += 1
            for value in equation.params.values():
                for item in value if isinstance(value, tuple | list) else (value,):
                    if isinstance(item, core.ClosedJaxpr | core.Jaxpr):
                        walk(getattr(item, "jaxpr", item))

    walk(jax.make_jaxpr(function)(*args).jaxpr)
    return found


CONFIG = runs.TOKENIZER
PARAMS = jax.eval_shape(CONFIG.init, jax.random.key(0))
IMAGE_BHWC = jax.ShapeDtypeStruct((2, *CONFIG.image_shape), jnp.float32)
EXACTLY = ("float32", "float32", "HIGHEST")


def tokens(compute):
    def encode(params, image_BHWC):
        return targets_and_inputs(CONFIG, params, {"image_BHWC": image_BHWC}, compute)

    return encode


def test_exact_tokens_use_only_float32_products():
    assert products(tokens(EXACT), PARAMS, IMAGE_BHWC).keys() == {EXACTLY}


@pytest.mark.parametrize(
    ("platform", "asked", "times"), [("tpu", "HIGH", 1), ("gpu", "DEFAULT", 3)]
)
def test_convolutions_of_a_frozen_encoder_take_three_passes(platform, asked, times):
    compute = ComputeConfig(platform=platform)
    found = products(tokens(compute), PARAMS, IMAGE_BHWC)
    exact = products(tokens(EXACT), PARAMS, IMAGE_BHWC)
    encoder = products(lambda p, x: image_features(CONFIG, p, x, EXACT), PARAMS, IMAGE_BHWC)
    fast = ("float32", "float32", asked)
    assert found.keys() == {EXACTLY, fast}
    # The encoder's attention, its last convolution, and the quantizer are exact.
    assert found[fast] / times == exact[EXACTLY] - found[EXACTLY] < encoder[EXACTLY]
    assert found[EXACTLY] > exact[EXACTLY] - encoder[EXACTLY]


def test_the_search_for_codes_is_in_float32():
    quantizer = make_quantizer(CONFIG)
    f_BhwZ = jax.ShapeDtypeStruct((2, *CONFIG.pyramid.finest, CONFIG.code_channels), jnp.float32)
    params = {"params": PARAMS["quantizer"]}
    assert products(quantizer.apply, params, f_BhwZ).keys() == {EXACTLY}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformer_products_are_in_its_dtype_and_the_head_sums_in_float32(dtype):
    model = VAR(runs.VAR, ComputeConfig(dtype, attention_impl="xla"))
    params = jax.eval_shape(runs.VAR.init, jax.random.key(0))

    def logits(params, input_BlZ, label_B):
        return model.apply({"params": params}, input_BlZ, label_B)

    input_BlZ = jax.ShapeDtypeStruct((2, 20, runs.VAR.code_channels), jnp.float32)
    found = products(logits, params, input_BlZ, jax.ShapeDtypeStruct((2,), jnp.int32))
    if dtype == "float32":
        assert found.keys() == {EXACTLY}
        return
    # Only the head's AdaLN is in float32; it has one row per image.
    assert found.pop(EXACTLY) == 1
    assert found.keys() == {("bfloat16", "bfloat16", None), ("bfloat16", "float32", None)}
    assert found["bfloat16", "float32", None] == 1 + len(
        mask_segments(block_causal_mask(runs.VAR.pyramid.level_L))
    )


@pytest.mark.parametrize("model", ["var", "mar"])
def test_exact_evaluation_uses_only_float32_products(model):
    exact = dict(tokenizer_weights="random", compute=EXACT)
    if model == "var":
        task = VARTask(runs.VAR, runs.TOKENIZER, **exact)
    else:
        task = MARTask(runs.MAR, runs.KL, sampling=runs.MAR_SAMPLING, **exact)
    key = jax.random.key(0)
    state, frozen = jax.eval_shape(task.init, key), jax.eval_shape(task.tokenizer.init, key)
    batch = Digits().make(2, seed=0).train_batch(0) | {"valid_B": np.ones(2, bool)}
    assert products(task.eval_step, state, frozen, batch).keys() == {EXACTLY}


def test_inception_uses_only_float32_products():
    params = jax.eval_shape(init_inception, jax.random.key(0))
    image_BHWC = jax.ShapeDtypeStruct((1, 299, 299, 3), jnp.float32)
    found = products(lambda p, x: Inception().apply({"params": p}, x), params, image_BHWC)
    assert found.keys() == {EXACTLY}
