import argparse
import re
import sys

import jax
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from tests.helpers import forked
from tests.helpers.paths import ROOT
from tests.helpers.topologies import CLUSTERS
from varjax import trees
from varjax.config.config_flags import add_config_flags, config_from_flags
from varjax.errors import InputError
from varjax.nn.compute import BATCH_AXES, shard_batch
from varjax.runtime.distributed import add_process_flags
from varjax.training import sharding
from varjax.training.sharding import MeshShape, make_mesh, rows_of_process, shardings
from varjax.var.model import VARConfig

pytestmark = pytest.mark.slow


def test_a_sharded_step_equals_a_single_device_step_and_splits_the_batch():
    command = [sys.executable, "-m", "tests.helpers.eight_devices"]
    forked.run(command, check=True, timeout=300, cwd=ROOT)


def test_the_batch_axes_of_models_and_mesh_agree():
    """Model files may not import the mesh's module, so they repeat the names of the axes."""
    assert P(BATCH_AXES) == sharding.batch_sharding(mesh(data=2)).spec
    assert shard_batch(x := np.ones((4, 2))) is x


def mesh(**sizes):
    """Makes an abstract mesh, because rules need only sizes, not devices."""
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
def test_rules_shard_the_last_dimensions_if_they_divide(path, shape, spec):
    tree = {path: jax.ShapeDtypeStruct(shape, np.float32)}
    assert shardings(tree, mesh(fsdp=4, tensor=2))[path].spec == spec


@pytest.mark.parametrize("preset", ["d16", "d36"])
def test_nearly_all_parameters_of_a_transformer_are_sharded(preset):
    init = VARConfig.preset(preset).init
    abstract = jax.eval_shape(init, jax.random.key(0))
    specs = shardings(abstract, mesh(fsdp=4, tensor=2))
    found, sizes = trees.paths(specs), {p: x.size for p, x in trees.paths(abstract).items()}
    whole = {path for path, sharding in found.items() if sharding.is_fully_replicated}
    assert sum(sizes[path] for path in whole) < 0.005 * sum(sizes.values()), whole
    split_twice = {path for path, s in found.items() if {"fsdp", "tensor"} <= set(s.spec)}
    heavy = tuple(f"/{name}/kernel" for name in ("q", "k", "v", "up", "proj", "down"))
    assert split_twice == {path for path in found if path.endswith(heavy)}


def test_a_note_warns_of_a_mesh_that_replicates_parameters():
    init = VARConfig.preset("d30").init
    params = jax.eval_shape(init, jax.random.key(0))
    assert sharding.replicated_parameters_note(params, mesh(data=256)) == ""
    assert sharding.replicated_parameters_note(params, mesh(fsdp=128)) == ""
    assert "% of the parameters are replicated" in sharding.replicated_parameters_note(
        params, mesh(fsdp=256)
    )


def test_a_note_advises_fsdp_for_a_mesh_with_only_tensor():
    params = jax.eval_shape(VARConfig.preset("d16").init, jax.random.key(0))
    note = sharding.replicated_parameters_note(params, mesh(tensor=2))
    assert "a larger mesh.fsdp" in note and "divisors" not in note  # 2 divides the width
    assert sharding.replicated_parameters_note(params, mesh(fsdp=2)) == ""


def test_a_mesh_uses_all_devices_and_refuses_sizes_that_do_not_fit():
    assert make_mesh(MeshShape()).size == jax.device_count()
    with pytest.raises(ValueError, match=f"asks for 7 .*{jax.device_count()}; choose a smaller"):
        make_mesh(MeshShape(fsdp=7))
    with pytest.raises(ValueError, match="at most one of them -1"):
        make_mesh(MeshShape(data=-1, fsdp=-1))
    with pytest.raises(ValueError, match="asks for 3 devices, but"):
        make_mesh(MeshShape(data=3))


def test_a_batch_that_the_devices_do_not_divide_is_refused():
    assert rows_of_process(make_mesh(MeshShape()), 6).tolist() == [*range(6)]
    with pytest.raises(ValueError, match="12 does not divide over 8 .*data 2, fsdp 4.*mesh.tensor"):
        sharding.check_batch_size(mesh(data=2, fsdp=4, tensor=2), 12)
    sharding.check_batch_size(mesh(data=2, fsdp=4), 32, accumulate=4)
    with pytest.raises(ValueError, match="32 in 8 microbatches does not divide over 8 devices"):
        sharding.check_batch_size(mesh(data=2, fsdp=4), 32, accumulate=8)


@pytest.mark.parametrize(
    ("cluster", "shape"),
    [
        ("v4-512", MeshShape(fsdp=128)),
        ("v6e-256", MeshShape(fsdp=128)),
        ("v4-128", MeshShape(8, 8)),
        ("v5p-128", MeshShape(8, 8)),
        ("v6e-256", MeshShape(32, 8)),
        ("two v5e-64", MeshShape(2, 64)),
        ("two v4-128", MeshShape(1, -1)),
        ("32 GPUs", MeshShape(fsdp=8)),
        ("16 GPUs", MeshShape(fsdp=4, tensor=2)),
    ],
)
def test_a_mesh_is_laid_out_on_every_cluster(cluster, shape):
    devices = CLUSTERS[cluster]
    laid_out = make_mesh(shape, devices)
    assert set(laid_out.devices.flat) == set(devices)
    # a copy of the model spans as few slices or machines as possible
    copies = laid_out.devices.reshape(laid_out.shape["data"], -1)
    slice_size = sum(device.slice_index == 0 for device in devices)
    for copy in copies:
        fewest = -(-len(copy) // slice_size)
        assert len({device.slice_index for device in copy}) == fewest


@pytest.mark.parametrize(
    ("cluster", "fsdp"),
    [("8 GPUs", 8), ("32 GPUs", 8), ("v4-32", 16), ("v6e-256", 64), ("two v5e-64", 64)],
)
def test_fsdp_0_shards_a_copy_over_devices_with_fast_connections(cluster, fsdp):
    laid_out = make_mesh(MeshShape(fsdp=0), CLUSTERS[cluster])
    assert laid_out.shape["fsdp"] == fsdp
    for copy in laid_out.devices.reshape(laid_out.shape["data"], -1):
        assert len({device.slice_index for device in copy}) == 1
    assert make_mesh(MeshShape(fsdp=0, tensor=2), CLUSTERS["8 GPUs"]).shape["fsdp"] == 4
    wide = make_mesh(MeshShape(fsdp=0, tensor=16), CLUSTERS["32 GPUs"])
    assert dict(wide.shape) == {"data": 2, "fsdp": 1, "tensor": 16}


def test_a_mesh_that_cannot_be_laid_out_is_refused_with_a_reason():
    uneven = CLUSTERS["two v5e-64"][:-4]
    with pytest.raises(InputError, match="data=31, fsdp=4, tensor=1 cannot be laid out on 124"):
        make_mesh(MeshShape(fsdp=4), uneven)


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_a_process_gets_the_rows_of_its_devices_and_no_others(cluster):
    devices = CLUSTERS[cluster]
    processes = {device.process_index for device in devices}
    for shape in MeshShape(), MeshShape(fsdp=0), MeshShape(fsdp=4, tensor=2):
        laid_out = make_mesh(shape, devices)
        groups = laid_out.devices.reshape(-1, laid_out.shape["tensor"])
        count = 3 * len(groups)
        found = {p: rows_of_process(laid_out, count, p).tolist() for p in processes}
        for process, rows in found.items():
            mine = [any(device.process_index == process for device in group) for group in groups]
            assert rows == [row for row in range(count) if mine[row // 3]]
        if shape.tensor == 1:  # each row is decoded by only one process
            assert sorted(sum(found.values(), [])) == [*range(count)]


TRAIN_COMMAND = re.compile(r"train\.py((?: --[\w.]+(?:=[^\s`'#]+)?)*)")
# Commands on a user's own files read a folder that does not exist here.
OWN_FILES = re.compile(r"\b(ROW|DIR)\b|idx:|latents:")
TRAIN_COMMANDS = [
    (path.relative_to(ROOT).as_posix(), words)
    for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for words in TRAIN_COMMAND.findall(re.sub(r" *\\\n *", " ", path.read_text()))
    if "--config=configs/" in words and not OWN_FILES.search(words)
]


def test_the_mesh_of_every_documented_training_command_exists(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert len(TRAIN_COMMANDS) > 20
    for path, words in TRAIN_COMMANDS:
        parser = argparse.ArgumentParser()
        add_config_flags(parser)
        add_process_flags(parser)
        parser.add_argument("--dry_run", action="store_true")
        _, experiment = config_from_flags(parser, words.split())
        for cluster, devices in CLUSTERS.items():
            if len(devices) < max(experiment.mesh.fsdp, 1):
                continue
            laid_out = make_mesh(experiment.mesh, devices)
            assert laid_out.size == len(devices), (path, words, cluster)
            if experiment.batch_size in (768, 1024):  # recipes for ImageNet, made for clusters
                sharding.check_batch_size(laid_out, experiment.batch_size)
