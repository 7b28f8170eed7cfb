"""Attention implementations against plain products, their choice by platform, and dropout."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import runs
from varjax.errors import InputError
from varjax.mar.task import MARTask
from varjax.nn import attention, splash_attention
from varjax.nn.attention import (
    Dropout,
    block_causal_mask,
    cached_attention,
    dot_product_attention,
    mask_segments,
)
from varjax.nn.compute import ComputeConfig
from varjax.nn.stack import KVCache, LayerCache
from varjax.tokenizers.vq.pyramid import SCALES_256, Pyramid
from varjax.var.task import VARTask

SCALES = 1, 4, 7, 9  # the last two are separate segments if MIN_SEGMENT is 49
MASK_LL = block_causal_mask(Pyramid(SCALES).level_L)
LENGTH = len(MASK_LL)
KEYS = jax.random.split(jax.random.key(0), 4)
Q, K, V = (jax.random.normal(key, (3, LENGTH, 2, 8)) for key in KEYS[:3])
KEY_MASK_BL = jax.random.bernoulli(KEYS[3], 0.7, (3, LENGTH)).at[:, 0].set(True)


def by_hand(q, k, v, mask_lL, key_mask_BL=None):
    logits_BAlL = jnp.einsum("BlAD,BLAD->BAlL", q, k, precision="highest") * 0.3
    mask_BAlL = jnp.broadcast_to(mask_lL, logits_BAlL.shape)
    if key_mask_BL is not None:
        mask_BAlL = mask_BAlL & key_mask_BL[:, None, None]
    weights = jax.nn.softmax(jnp.where(mask_BAlL, logits_BAlL, -jnp.inf))
    return jnp.einsum("BAlL,BLAD->BlAD", weights, v, precision="highest")


def test_segments_are_the_scales_with_short_ones_merged():
    segments = mask_segments(block_causal_mask(Pyramid(SCALES_256).level_L))
    assert [(rows.stop - rows.start, seen) for rows, seen, _ in segments] == [
        (155, 155), (100, 255), (169, 424), (256, 680)
    ]  # fmt: skip
    assert [mask is None for _, _, mask in segments] == [False, True, True, True]


@pytest.mark.parametrize("mask_lL", [np.tri(70, dtype=bool), np.tri(90, 130, 40) > 0, MASK_LL])
def test_segments_reproduce_the_mask(mask_lL):
    again_lL = np.zeros_like(mask_lL)
    for rows, seen, mask in mask_segments(mask_lL):
        again_lL[rows, :seen] = True if mask is None else mask
    np.testing.assert_array_equal(again_lL, mask_lL)


@pytest.mark.parametrize("key_mask_BL", [None, KEY_MASK_BL])
@pytest.mark.parametrize("implementation", ["xla", "loop", "splash"])
def test_every_implementation_matches_masked_products_and_their_gradient(
    implementation, key_mask_BL, monkeypatch
):
    monkeypatch.setattr(attention, "MIN_SEGMENT", 49)
    assert len(mask_segments(MASK_LL)) == 3
    monkeypatch.setattr(splash_attention, "MAX_BLOCK", 128)  # two blocks of keys and of queries
    monkeypatch.setattr(attention, "splash_fits", lambda q_BlAD: True)  # also for float32
    attend = functools.partial(dot_product_attention, scale=0.3, implementation=implementation)

    def total(f, q, k, v):
        y = f(q, k, v, MASK_LL, key_mask_BL=key_mask_BL)
        return jnp.sum(y * jnp.cos(jnp.arange(y.size)).reshape(y.shape)), y

    def run(f):
        differentiate = jax.value_and_grad(functools.partial(total, f), (0, 1, 2), has_aux=True)
        return jax.jit(differentiate)(Q, K, V)

    (_, found), grads = run(attend)
    (_, expected), expected_grads = run(by_hand)
    np.testing.assert_allclose(found, expected, atol=5e-7)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        np.testing.assert_allclose(grad, expected_grad, atol=3e-6)


@pytest.mark.parametrize("batch", [6, 7])
@pytest.mark.parametrize("key_mask", [False, True])
def test_grouped_attention_reads_the_cache_group_by_group(batch, key_mask, monkeypatch):
    key_KB = jax.random.split(jax.random.key(3), 4)
    cache = KVCache(*(jax.random.normal(k, (2, batch, 9, 8)) for k in key_KB[:2]))
    q_BlAD = jax.random.normal(key_KB[2], (batch, 3, 2, 4))
    new_BlC = jax.random.normal(key_KB[3], (batch, 3, 8))
    past = LayerCache(cache, 1, 4, 7).write(new_BlC, -new_BlC)
    key_mask_BL = jnp.arange(7)[None] < 1 + jnp.arange(batch)[:, None] if key_mask else None

    def attend(implementation):
        return lambda q_BlAD: cached_attention(
            q_BlAD, past, scale=0.5, implementation=implementation, key_mask_BL=key_mask_BL
        )

    monkeypatch.setattr(attention, "FAST_MEMORY", 4 * 2 * 3 * 7 * 3)  # logits of three images
    found, expected = (jax.jit(attend(i))(q_BlAD) for i in ("grouped", "xla"))
    np.testing.assert_allclose(found, expected, atol=5e-7)
    np.testing.assert_array_equal(past.read(0, batch)[1][:, 4:], -new_BlC)
    loops = str(jax.make_jaxpr(attend("grouped"))(q_BlAD)).count("scan[")
    assert loops == (0 if key_mask else 1)
    monkeypatch.setattr(attention, "FAST_MEMORY", 2**25)
    assert "scan[" not in str(jax.make_jaxpr(attend("grouped"))(q_BlAD))


@pytest.fixture
def stand_in(monkeypatch):
    """Replaces cuDNN's kernel by XLA's; returns a list of the lengths that it is called with."""
    calls = []

    def play(q, k, v, *, mask, scale, implementation, **lengths):
        assert implementation == "cudnn" and q.dtype == jnp.bfloat16
        calls.append((q.shape[1], k.shape[1], mask is not None))
        return kernel(q, k, v, mask=mask, scale=scale, implementation="xla", **lengths)

    kernel = jax.nn.dot_product_attention
    monkeypatch.setattr(jax.nn, "dot_product_attention", play)
    return calls


@pytest.mark.slow
@pytest.mark.parametrize("key_mask_BL", [None, KEY_MASK_BL])
def test_cudnn_gets_even_lengths_and_matches_xla(stand_in, key_mask_BL):
    half = [x.astype(jnp.bfloat16) for x in (Q, K, V)]

    def total(implementation, q, k, v):
        y = dot_product_attention(
            q, k, v, MASK_LL, scale=0.3, implementation=implementation, key_mask_BL=key_mask_BL
        )
        return jnp.sum(y.astype(jnp.float32) * jnp.cos(jnp.arange(y.size)).reshape(y.shape))

    with jax.numpy_dtype_promotion("standard"):  # for JAX's own functions
        results = [jax.value_and_grad(total, (1, 2, 3))(i, *half) for i in ("cudnn", "xla")]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        scale = np.abs(np.asarray(b, np.float32)).max()
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), atol=0.02 * scale)
    # The first scales are one segment with a mask; the last one attends to everything.
    assert stand_in == [(66, 66, True), (82, 148, key_mask_BL is not None)]


def test_xla_replaces_cudnn_for_unsupported_inputs(stand_in):
    half = [x.astype(jnp.bfloat16) for x in (Q, K, V)]
    few = [x[:, :63] for x in half]
    odd_head = [jnp.pad(x, ((0, 0), (0, 0), (0, 0), (0, 1))) for x in half]
    for arrays in ((Q, K, V), few, odd_head):
        dot_product_attention(*arrays, scale=0.3, implementation="cudnn")
    assert stand_in == []


def lowered_for_cuda(f, *arrays):
    return jax.jit(f).trace(*arrays).lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(100, 255), (169, 424), (155, 155)])
def test_gpus_use_cudnn_by_default(queries, keys, gradient, monkeypatch):
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91000)  # as in JAX's CUDA wheels
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda _: True)
    implementation = ComputeConfig(platform="gpu").attention_implementation()
    mask = np.tri(queries, keys, dtype=bool) if queries == keys else None

    def attend(q, k, v):
        y = dot_product_attention(q, k, v, mask, scale=1.0, implementation=implementation)
        return jnp.sum(y.astype(jnp.float32))

    shapes = [(2, n, 4, 64) for n in (queries, keys, keys)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    f = jax.grad(attend, (0, 1, 2)) if gradient else attend
    text = lowered_for_cuda(f, *arrays)
    assert "__cudnn$fmha" in text and ("Backward" in text) == gradient
    assert f"x{queries}x{keys}xf32" not in text  # no logits in memory


def kernels_for_tpus(dtype, **options):
    """Counts the kernels in attention and its gradient, compiled for a TPU."""

    def attend(q, k, v):
        y = dot_product_attention(q, k, v, MASK_LL, scale=0.3, implementation="splash", **options)
        return jnp.sum(y.astype(jnp.float32))

    arrays = [x.astype(dtype) for x in (Q, K, V)]
    traced = jax.jit(jax.grad(attend, (0, 1, 2))).trace(*arrays)
    return traced.lower(lowering_platforms=("tpu",)).as_text().count("@tpu_custom_call")


def test_tpus_use_the_splash_kernel_where_it_fits():
    assert kernels_for_tpus("bfloat16") == 3  # forward, the gradient of q, and that of k and v
    assert kernels_for_tpus("float32") == 0
    assert kernels_for_tpus("bfloat16", dropout=Dropout(jax.random.split(KEYS[0], 3), 0.5)) == 0


@pytest.mark.parametrize(
    ("length", "block", "padded"),
    [(1, 128, 128), (680, 384, 768), (1024, 512, 1024), (2240, 384, 2304)],
)
def test_blocks_of_the_splash_kernel_need_little_padding(length, block, padded):
    assert splash_attention._block(length) == block
    assert splash_attention._whole_blocks(length) == padded


def test_splash_attention_is_not_used_with_a_cache():
    on_tpu = ComputeConfig(attention_impl="splash", platform="tpu")
    assert on_tpu.attention_implementation() == "splash"
    assert on_tpu.attention_implementation(cached=True) == "grouped"


@pytest.mark.parametrize("kernel", ["splash", "cudnn"])
def test_fused_kernels_are_refused_on_machines_without_them(kernel):
    compute = ComputeConfig(dtype="bfloat16", attention_impl=kernel)
    says = f"attention_impl={kernel}: .* not for .*cpu"
    with pytest.raises(InputError, match=says):
        compute.attention_implementation()
    tasks = [VARTask(runs.VAR, runs.TOKENIZER, "random", compute=compute)]
    options = dict(attention_dropout=0.0, sampling=runs.MAR_SAMPLING, compute=compute)
    tasks.append(MARTask(runs.MAR, runs.KL, "random", **options))
    for task in tasks:
        with pytest.raises(InputError, match=says):
            task.check((8, 8, 1), 10)


@pytest.mark.parametrize(
    "setting", [{"attention_impl": "flash"}, {"dtype": "float16"}, {"remat": "Block"}]
)
def test_unknown_settings_are_refused(setting):
    ((name, value),) = setting.items()
    with pytest.raises(InputError, match=f"^{name} must be one of .*, not '{value}'"):
        ComputeConfig(**setting)


def test_auto_settings_depend_on_the_platform():
    assert ComputeConfig(platform="gpu", dtype="float32").attention_implementation() == "xla"
    assert ComputeConfig(platform="tpu").attention_implementation() == "xla"
    assert ComputeConfig(platform="tpu").attention_implementation(cached=True) == "grouped"
    assert ComputeConfig(platform="cpu").attention_implementation() == "loop"
    assert ComputeConfig(platform="tpu").jax_dtype == jnp.bfloat16
    assert [ComputeConfig(platform=p).frozen_encoder for p in ("cpu", "gpu", "tpu")] == [
        "highest", "tf32_3x", "bfloat16_3x"
    ]  # fmt: skip


@pytest.mark.parametrize("rate", [0.1, 0.5])
@pytest.mark.parametrize("rows", [1, 300, 301])
def test_dropout_drops_its_fraction_independently_and_scales_the_rest(rate, rows):
    x_BlC = jnp.ones((3, rows, 20_000 // rows))
    dropout = Dropout(jax.random.split(jax.random.key(0), 3), rate)
    y_BlC = np.asarray(dropout(x_BlC))
    kept_BlC = y_BlC > 0
    np.testing.assert_allclose(y_BlC[kept_BlC], 1 / (1 - rate), rtol=1e-5)
    deviation = (rate * (1 - rate) / kept_BlC.size) ** 0.5  # standard error of the mean
    assert kept_BlC.mean() == pytest.approx(1 - rate, abs=5 * deviation)
    shifts = [(1, 0), (0, (rows + 1) // 2)]  # another example; the other half of the rows
    for shift in shifts[: min(rows, 2)]:
        both_BlC = kept_BlC & np.roll(kept_BlC, shift, axis=(0, 1))
        assert both_BlC.mean() == pytest.approx((1 - rate) ** 2, abs=0.01)


def test_dropout_of_nearly_everything_is_finite():
    dropout = Dropout(jax.random.split(jax.random.key(0), 2), rate=1 - 1e-6)
    assert np.isfinite(dropout(jnp.ones((2, 100, 1000)))).all()
