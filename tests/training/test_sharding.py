import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.helpers.paths import ROOT
from varjax.core import trees
from varjax.nn.compute import BATCH_AXES, shard_batch
from varjax.training import sharding
from varjax.training.sharding import MeshShape, make_mesh, rows_of_process, shardings
from varjax.var.model import VARConfig

pytestmark = pytest.mark.slow

QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


def test_a_sharded_step_equals_the_single_device_one_and_no_device_computes_the_whole_batch():
    command = [sys.executable, "-m", "tests.helpers.eight_devices"]
    subprocess.run(
        command, check=True, timeout=300, cwd=ROOT, env=os.environ | {"XLA_FLAGS": QUICK}
    )


def test_rows_are_spread_over_the_axes_that_share_out_a_batch():
    """Model files may not import the mesh's module, so they say these names again."""
    assert P(BATCH_AXES) == sharding.batch_sharding(mesh(data=2)).spec
    assert shard_batch(x := np.ones((4, 2))) is x


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
        ("params/class_embed", (12, 8), P(None, None)),
        ("params/pos_embed", (11, 8), P(None, "fsdp")),
        ("params/encoder/conv_in/kernel", (3, 3, 3, 8), P(None, None, None, None)),
        ("frozen/encoder/mid_attn_1/proj/kernel", (1, 1, 8, 8), P(None, None, "fsdp", None)),
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
    init = VARConfig.preset(preset).init
    abstract = jax.eval_shape(init, jax.random.key(0))
    specs = shardings(abstract, mesh(fsdp=4, tensor=2))
    found, sizes = trees.paths(specs), {p: x.size for p, x in trees.paths(abstract).items()}
    whole = {path for path, sharding in found.items() if sharding.is_fully_replicated}
    assert sum(sizes[path] for path in whole) < 0.005 * sum(sizes.values()), whole
    split_twice = {path for path, s in found.items() if {"fsdp", "tensor"} <= set(s.spec)}
    heavy = ("q/kernel", "k/kernel", "v/kernel", "up/kernel", "proj/kernel", "down/kernel")
    assert split_twice == {path for path in found if path.endswith(heavy)}


def test_a_mesh_that_divides_next_to_nothing_is_told():
    init = VARConfig.preset("d30").init
    params = jax.eval_shape(init, jax.random.key(0))
    assert sharding.replicated_parameters_note(params, mesh(data=256)) == ""
    assert sharding.replicated_parameters_note(params, mesh(fsdp=128)) == ""
    assert "% of the parameters lie whole" in sharding.replicated_parameters_note(
        params, mesh(fsdp=256)
    )


def test_a_mesh_takes_all_devices_and_refuses_what_does_not_fit():
    assert make_mesh(MeshShape()).size == jax.device_count()
    with pytest.raises(ValueError, match=f"asks for 7 devices or a multiple.*{jax.device_count()}"):
        make_mesh(MeshShape(fsdp=7))
    with pytest.raises(ValueError, match="at most one of them -1"):
        make_mesh(MeshShape(data=-1, fsdp=-1))
    with pytest.raises(ValueError, match="asks for 3 devices, but"):
        make_mesh(MeshShape(data=3))


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    assert rows_of_process(make_mesh(MeshShape()), 6) == range(6)
    with pytest.raises(ValueError, match="batch_size 12 does not divide over 8 .*data 2, fsdp 4"):
        sharding.check_batch_size(mesh(data=2, fsdp=4, tensor=2), 12)
