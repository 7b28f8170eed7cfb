"""Runs training steps on several meshes of eight devices, for test_sharding.py."""

import dataclasses
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.helpers import cudnn_on_cpu, runs, tiny
from varjax.data.loader import make_loader
from varjax.data.sources.digits import Digits
from varjax.mar.task import MARTask
from varjax.nn.attention import dot_product_attention
from varjax.nn.compute import ComputeConfig
from varjax.nn.splash_attention import splash_attention, splash_fits
from varjax.training import sharding
from varjax.training.optimizer import AdamW
from varjax.training.setup import jit_train_step
from varjax.training.sharding import MeshShape, put_batch
from varjax.training.task import Plan
from varjax.training.train_step import SKIPPED
from varjax.var.task import VARTask

BATCH = 24  # the transformer has no width of 24 or of 24 · 21, the tokens of a batch
PLAN = Plan(9, BATCH)
# A large epsilon, because Adam would otherwise amplify rounding errors to full steps.
OPTIMIZER = AdamW(base_lr=0.1, eps=1e-2)
SMALL = tiny.Tiny(optimizer=OPTIMIZER)
TRANSFORMER = VARTask(
    dataclasses.replace(runs.VAR, width=32, heads=4),
    runs.TOKENIZER,
    tokenizer_weights="",
    optimizer=OPTIMIZER,
    drop_path=0.2,
    ema_decay=0.9,
    compute=ComputeConfig(remat="block"),
)
MAR = MARTask(
    runs.MAR, runs.KL, "", OPTIMIZER, diffusion_batch_mul=1, ema_decay=0.9,
    sampling=runs.MAR_SAMPLING,
)  # fmt: skip


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    whole = train(SMALL, {}, MeshShape(), jax.devices()[:1])
    for sizes, accumulate in ((8, 1, 1), 3), ((1, 8, 1), 1), ((2, 2, 2), 3):
        task, shape = dataclasses.replace(SMALL, accumulate=accumulate), MeshShape(*sizes)
        state, metrics, compiled = train(task, {}, shape, skip=True)
        assert metrics.pop(SKIPPED) == 0
        check_layout(shape, state, "up")
        jax.tree.map(close, (state, metrics), whole[:2])
        check_skipping(compiled, state)

    tokenizer = jax.eval_shape(runs.TOKENIZER.init, jax.random.key(0))
    frozen, shape = numbers(tokenizer), MeshShape(1, 4, 2)
    whole = train(TRANSFORMER, frozen, MeshShape(), jax.devices()[:1])
    state, metrics, compiled = train(TRANSFORMER, frozen, shape)
    check_layout(shape, state, "blocks", "attn", "q")
    jax.tree.map(close, (state, metrics), whole[:2])
    assert not (shapes := full_batch(compiled)), shapes

    frozen = numbers(jax.eval_shape(runs.KL.init, jax.random.key(0)))
    whole = train(MAR, frozen, MeshShape(), jax.devices()[:1])
    state, metrics, _ = train(MAR, frozen, shape)
    check_layout(shape, state, "decoder_blocks", "attn", "q")
    jax.tree.map(close, (state, metrics), whole[:2])
    check_splash(MeshShape(2, 2, 2))
    for sizes in (2, 4, 1), (2, 2, 2), (1, 1, 8):  # eight devices do not divide four heads
        check_cudnn(MeshShape(*sizes))


def check_cudnn(shape: MeshShape) -> None:
    """Checks gradients by cuDNN's kernel, which each device runs on its own images and heads."""
    B, heads, C = 8, 4, 32
    rng = np.random.default_rng(0)
    x_BlC = rng.normal(size=(B, 67, C)).astype(jnp.bfloat16)
    params = {name: rng.normal(0, 0.2, (C, C)).astype(np.float32) for name in ("q", "k", "v", "o")}
    known_BL = np.arange(67) < np.arange(60, 68)[:, None]
    mesh = sharding.make_mesh(shape)
    layout = {name: P("fsdp", "tensor") for name in "qkv"} | {"o": P("tensor", "fsdp")}
    layout = {name: NamedSharding(mesh, spec) for name, spec in layout.items()}
    params = sharding.put(params, layout)
    x_BlC = put_batch({"x": x_BlC}, mesh, B)["x"]

    def gradients(implementation, key_mask_BL):
        def loss(params, x_BlC):
            q, k, v = (
                (x_BlC @ params[name].astype(jnp.bfloat16)).reshape(B, -1, heads, C // heads)
                for name in "qkv"
            )
            y_BlAD = dot_product_attention(
                q, k, v, scale=0.3, implementation=implementation, key_mask_BL=key_mask_BL
            )
            y_BlC = y_BlAD.reshape(x_BlC.shape) @ params["o"].astype(jnp.bfloat16)
            return jnp.sum(jnp.sin(y_BlC.astype(jnp.float32)))

        gradient = jax.jit(sharding.on_mesh(jax.grad(loss), mesh), out_shardings=layout)
        return jax.device_get(gradient(params, x_BlC))

    for key_mask_BL in (None, known_BL):
        cudnn_on_cpu.calls.clear()
        found, expected = (gradients(name, key_mask_BL) for name in ("cudnn", "xla"))
        for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
            np.testing.assert_allclose(a, b, atol=0.03 * np.abs(b).max())
        # Odd lengths are padded. Where devices do not divide the heads, the kernel is not used.
        one = (B // (shape.data * shape.fsdp), 68, heads // shape.tensor, C // heads)
        assert set(cudnn_on_cpu.calls) == ({one} if shape.tensor <= heads else set())


def check_splash(shape: MeshShape) -> None:
    """Checks that each device runs the kernel on its own images and heads."""
    q_BlAD = np.random.default_rng(0).normal(size=(8, 9, 4, 8)).astype(np.float32)
    known_BL = np.arange(9) < np.arange(1, 9)[:, None]
    attend = jax.jit(functools.partial(splash_attention, scale=0.3))
    expected_BlAD = attend(q_BlAD, q_BlAD + 1, 2 * q_BlAD, None, known_BL)
    with jax.set_mesh(sharding.make_mesh(shape)):
        y_BlAD = attend(q_BlAD, q_BlAD + 1, 2 * q_BlAD, None, known_BL)
        fits = [
            splash_fits(jax.ShapeDtypeStruct((B, 9, A, 8), "bfloat16"))
            for B, A in ((8, 4), (6, 4), (8, 3))
        ]
    assert y_BlAD.addressable_shards[0].data.shape == (2, 9, 2, 8)
    close(y_BlAD, expected_BlAD)
    with jax.set_mesh(jax.sharding.Mesh(np.array(jax.devices()), "data")):  # a single axis
        close(attend(q_BlAD, q_BlAD + 1, 2 * q_BlAD, None, known_BL), expected_BlAD)
    assert fits == [True, False, False], fits


def train(task, frozen, shape: MeshShape, devices=None, skip=False):
    """Returns the state and metrics after three steps, and the compiled step."""
    key = jax.random.key(0)
    mesh, loader = sharding.make_mesh(shape, devices), make_loader(Digits(), BATCH)
    state = jax.eval_shape(task.init, key)
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), state)
    params = numbers(state.params)
    placement = sharding.shardings(state, mesh)
    state = sharding.put(zeros.replace(params=params, ema=params), placement)
    frozen = sharding.put(frozen, sharding.shardings(frozen, mesh))
    batches = [put_batch(loader.train_batch(n), mesh, BATCH) for n in range(3)]
    step = jit_train_step(task, PLAN, mesh, placement, skip)
    compiled = step.lower(state, frozen, batches[0], key).compile()
    for batch in batches:
        state, metrics = compiled(state, frozen, batch, key)
    return state, metrics, compiled


def check_skipping(compiled, state) -> None:
    """Checks that a single NaN on one device skips the step on all devices."""
    mesh, bias_C = state.step.sharding.mesh, np.array(state.params["up"]["bias"])
    bias_C[-1] = np.nan
    state.params["up"]["bias"] = jax.device_put(bias_C, state.params["up"]["bias"].sharding)
    before = jax.device_get(state)
    batch = put_batch(make_loader(Digits(), BATCH).train_batch(3), mesh, BATCH)
    after, metrics = compiled(state, {}, batch, jax.random.key(0))
    assert metrics[SKIPPED] == 1 and after.step == before.step + 1
    jax.tree.map(np.testing.assert_array_equal, after.replace(step=before.step), before)


def numbers(tree):
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda x: rng.normal(0, 0.1, x.shape).astype(x.dtype), tree)


def close(a, b):
    np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), rtol=1e-3, atol=1e-5)


def check_layout(shape: MeshShape, state, *path: str) -> None:
    """Checks that parameters, EMA and Adam's moments are split over the fsdp and tensor axes."""
    for tree in (state.params, state.ema, state.opt_state[1].mu, state.opt_state[1].nu):
        for name in (*path, "kernel"):
            tree = tree[name]
        assert tree.addressable_shards[0].data.size * shape.fsdp * shape.tensor == tree.size


def full_batch(compiled) -> set[str]:
    """Returns the shapes of per-device arrays that hold activations of the whole batch."""
    shapes = set()
    for shape in re.findall(r"(?:f32|bf16)\[([\d,]+)\]", compiled.as_text()):
        sizes = [int(size) for size in shape.split(",")]
        rows = {BATCH, BATCH * TRANSFORMER.model.pyramid.length} & set(sizes)
        if rows and math.prod(sizes) >= BATCH * TRANSFORMER.model.width:
            shapes.add(shape)
    return shapes


if __name__ == "__main__":
    main()
