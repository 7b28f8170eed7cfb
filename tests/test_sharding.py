import functools
import pathlib
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from varjax import trees
from varjax.training.sharding import MeshShape, make_mesh, shardings
from varjax.var.model import VARConfig, init_var

ROOT = pathlib.Path(__file__).parents[1]
EIGHT_DEVICES = """
import jax
jax.config.update("jax_num_cpu_devices", 8)
import dataclasses
import numpy as np
from jax.sharding import PartitionSpec as P
from tests import tiny
from varjax.data.loader import Loader
from varjax.data.sources import Digits
from varjax.training.feed import place
from varjax.training.sharding import MeshShape, make_mesh, over_batch, shardings

task = dataclasses.replace(tiny.Tiny(accumulate=2), plan=dataclasses.replace(tiny.Plan(), steps=9))
init_key, key = jax.random.split(jax.random.key(0))
loader = Loader(Digits(), 32)

def train(shape, devices):
    mesh = make_mesh(shape, devices)
    placement = shardings(jax.eval_shape(task.init, init_key), mesh)
    state = jax.jit(task.init, out_shardings=placement)(init_key)
    step = jax.jit(task.train_step, out_shardings=(placement, None), donate_argnums=0)
    for number in range(3):
        batch = place(loader.train_batch(number), over_batch(mesh))
        state, metrics = step(state, {}, batch, key)
    return state, metrics

one = train(MeshShape(), jax.devices()[:1])
state, metrics = train(MeshShape(data=-1, fsdp=2, tensor=2), None)
up = state.params["up"]["kernel"]
assert up.sharding.spec == P("fsdp", "tensor") and up.addressable_shards[0].data.shape == (32, 8)
moments = state.opt_state[1].mu["up"]["kernel"]
assert moments.sharding.spec == P("fsdp", "tensor")
def close(a, b):
    np.testing.assert_allclose(jax.device_get(a), jax.device_get(b), rtol=2e-4, atol=2e-6)
jax.tree.map(close, one, (state, metrics))
"""


def test_a_sharded_step_equals_the_single_device_one():
    subprocess.run([sys.executable, "-c", EIGHT_DEVICES], check=True, timeout=120, cwd=ROOT)


def mesh(**sizes):
    """An abstract mesh: rules need sizes, not devices."""
    shape = {"data": 1, "fsdp": 1, "tensor": 1} | sizes
    types = (AxisType.Auto,) * 3
    return jax.sharding.AbstractMesh(tuple(shape.values()), tuple(shape), axis_types=types)


@pytest.mark.parametrize(
    ("path", "shape", "spec"),
    [
        ("params/blocks/attn/q/kernel", (30, 8, 16), P(None, "fsdp", "tensor")),
        ("opt_state/1/0/mu/blocks/mlp/down/kernel", (30, 8, 16), P(None, "tensor", "fsdp")),
        ("ema/head/kernel", (8, 6), P("fsdp", None)),
        ("params/class_embed", (11, 8), P(None, "fsdp")),
        ("params/encoder/conv_in/kernel", (3, 3, 3, 8), P(None, None, None, None)),
        ("params/blocks/attn/q/bias", (30, 8), P(None, None)),
        ("params/blocks/mlp/up/kernel", (2, 7, 16), P(None, None, "tensor")),
        ("params/unq/kernel", (8, 16), P("fsdp", None)),
        ("step", (), P()),
    ],
)
def test_rules_shard_the_last_dimensions_that_divide(path, shape, spec):
    tree = {path: jax.ShapeDtypeStruct(shape, np.float32)}
    assert shardings(tree, mesh(fsdp=4, tensor=2))[path].spec == spec


@pytest.mark.parametrize("preset", ["d16", "d36"])
def test_nearly_all_of_a_transformer_is_shared_out(preset):
    init = functools.partial(init_var, VARConfig.preset(preset))
    abstract = jax.eval_shape(init, jax.random.key(0))
    specs = shardings(abstract, mesh(fsdp=4, tensor=2))
    found, sizes = trees.paths(specs), {p: x.size for p, x in trees.paths(abstract).items()}
    whole = {path for path, sharding in found.items() if sharding.is_fully_replicated}
    assert sum(sizes[path] for path in whole) < 0.005 * sum(sizes.values()), whole
    split_twice = {path for path, s in found.items() if {"fsdp", "tensor"} <= set(s.spec)}
    heavy = ("q/kernel", "k/kernel", "v/kernel", "up/kernel", "proj/kernel", "down/kernel")
    assert split_twice == {path for path in found if path.endswith(heavy)}


def test_a_mesh_takes_all_devices_and_refuses_what_does_not_fit():
    assert make_mesh(MeshShape()).size == jax.device_count()
    with pytest.raises(ValueError, match=f"asks for 7 devices or a multiple.*{jax.device_count()}"):
        make_mesh(MeshShape(fsdp=7))
    with pytest.raises(ValueError, match="at most one of them -1"):
        make_mesh(MeshShape(data=-1, fsdp=-1))
    with pytest.raises(ValueError, match="asks for 3 devices, but"):
        make_mesh(MeshShape(data=3))
