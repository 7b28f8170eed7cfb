import dataclasses
import functools
import pathlib
import sys

import chex
import jax
import numpy as np
import pytest

from tests.helpers import forked, runs, tiny
from tests.helpers.paths import ROOT
from varjax import trees
from varjax.checkpoints.saved_steps import SavedSteps
from varjax.checkpoints.weights import restore_weights, split_step
from varjax.errors import InputError
from varjax.models import read_model
from varjax.storage import files
from varjax.training import loop
from varjax.training.checkpoint import Checkpoints
from varjax.training.initial_weights import warm_start_state
from varjax.training.sharding import MeshShape, make_mesh, shardings
from varjax.training.task import Plan
from varjax.var.model import VARConfig
from varjax.var.task import VARTask, matching_rows

KEY = jax.random.key(3)


def begin(task, location, mesh=None):
    mesh = mesh or make_mesh(MeshShape())
    return warm_start_state(task, location, KEY, shardings(jax.eval_shape(task.init, KEY), mesh))


@pytest.fixture
def saved(tmp_path):
    """Writes weights that fit in part: "up/kernel", rows 1 and 3 of "up/bias", but not "down"."""
    rng = np.random.default_rng(0)
    shapes = {"up": {"kernel": (64, 16), "bias": (7,)}, "down": {"kernel": (16, 9)}, "old": (2,)}
    tree = jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(np.float32),
        shapes,
        is_leaf=lambda x: isinstance(x, tuple),
    )
    files.write_tensors(tmp_path / "saved", tree, {})
    return str(tmp_path / "saved"), tree


def test_parameters_that_fit_are_kept_and_others_are_listed(saved, capsys):
    location, tree = saved
    fresh = tiny.Tiny().init(KEY)
    state = begin(tiny.Tiny(), location)
    for params in (state.params, state.ema):
        np.testing.assert_array_equal(params["up"]["kernel"], tree["up"]["kernel"])
        np.testing.assert_array_equal(params["up"]["bias"][:2], tree["up"]["bias"][[1, 3]])
        np.testing.assert_array_equal(params["up"]["bias"][2:], fresh.params["up"]["bias"][2:])
        np.testing.assert_allclose(params["down"]["kernel"], fresh.params["down"]["kernel"], 1e-6)
    said = capsys.readouterr().err
    assert "kept 1 of 3 parameters whole, 85.50% of all numbers" in said
    assert "2 of 16 rows kept: up/bias (16,), there (7,)" in said
    assert "new: down/kernel (16, 10), there (16, 9)" in said
    assert "not used: old (2,)" in said


def test_training_does_not_change_the_file_it_started_from(saved):
    """JAX may use a memory map without a copy, and the step donates its arguments."""
    location, tree = saved
    task, batch = tiny.Tiny(), tiny.Digits().make(8, seed=0).train_batch(0)
    step = jax.jit(functools.partial(task.train_step, plan=Plan()), donate_argnums=0)
    state, _ = step(begin(task, location), {}, batch, KEY)
    assert (np.asarray(state.params["up"]["kernel"]) != tree["up"]["kernel"]).any()
    assert (np.asarray(state.ema["up"]["kernel"]) != np.asarray(state.params["up"]["kernel"])).any()
    chex.assert_trees_all_equal(files.read_tensors(location)[0], tree)


def test_another_model_is_refused(tmp_path):
    files.write_tensors(tmp_path / "saved", {"up": {"other": np.zeros((64, 16), "f4")}}, {})
    with pytest.raises(
        ValueError, match="(?s)almost no parameter.*new: up/kernel .64, 16., not there"
    ):
        begin(tiny.Tiny(), str(tmp_path / "saved"))


@pytest.mark.slow
def test_a_run_continues_after_its_init_from_is_deleted(saved, tmp_path):
    location, _ = saved
    run = tmp_path / "run"
    with pytest.raises(ValueError, match="does not exist"):
        loop.train(tiny.experiment(run, steps=4, init_from=str(tmp_path / "misspelt")))
    loop.train(tiny.experiment(tmp_path / "whole", steps=4, init_from=location))
    part = tiny.experiment(run, steps=4, save_every=2, init_from=location)
    loop.train(part)
    pathlib.Path(location).unlink()
    (run / "checkpoints" / "4").rename(tmp_path / "gone")
    loop.train(part)
    both = (restore_weights(tmp_path / name) for name in ("whole", "run"))
    chex.assert_trees_all_equal(*both)


@pytest.mark.slow
def test_init_from_takes_the_ema_and_matching_rows_of_classes_and_scales(capsys):
    _, there, average, _ = read_model(runs.var(), ema=True)
    average, here = jax.device_get(average), dataclasses.replace(there, classes=4, scales=(1, 3, 4))
    tokenizer = dataclasses.replace(runs.TOKENIZER, scales=(1, 3, 4))
    state = begin(VARTask(here, tokenizer, ""), str(runs.var()))
    fresh, params = here.init(KEY), jax.device_get(state.params)
    kept = set(trees.paths(params)) - {"class_embed", "level_embed", "pos_embed"}
    for path in kept:
        a, b = trees.paths(params)[path], trees.paths(average)[path]
        np.testing.assert_array_equal(a, b, err_msg=path)
    np.testing.assert_array_equal(params["class_embed"][4], average["class_embed"][10])
    np.testing.assert_array_equal(params["level_embed"][[0, 2]], average["level_embed"][[0, 2]])
    for here_rows, there_rows in ((slice(0, 1), slice(0, 1)), (slice(10, 26), slice(5, 21))):
        np.testing.assert_array_equal(
            params["pos_embed"][here_rows], average["pos_embed"][there_rows]
        )
    np.testing.assert_allclose(params["level_embed"][1], fresh["level_embed"][1], rtol=1e-6)
    np.testing.assert_allclose(params["pos_embed"][1:10], fresh["pos_embed"][1:10], rtol=1e-6)
    assert "17 of 26 rows kept: pos_embed (26, 16), there (21, 16)" in capsys.readouterr().err


def test_the_released_256_px_models_share_six_scales_with_512_px():
    small, large = (VARConfig.preset(name) for name in ("d16", "d36"))
    rows = matching_rows(large, small)
    assert rows["level_embed"] == ([0, 1, 2, 3, 4, 6], [0, 1, 2, 3, 5, 8])
    sides = [1, 2, 3, 4, 6, 13]
    assert [len(r) for r in rows["pos_embed"]] == [sum(s * s for s in sides)] * 2
    assert not matching_rows(small, small)


SHARDED = """
import sys
import jax, numpy as np
jax.config.update("jax_num_cpu_devices", 8)
from tests.helpers import tiny
from tests.training.test_warm_start import begin
from varjax.training.sharding import MeshShape, make_mesh
state = begin(tiny.Tiny(), sys.argv[1], make_mesh(MeshShape(data=2, fsdp=2, tensor=2)))
kernel = state.params["up"]["kernel"]
assert kernel.addressable_shards[0].data.shape == (32, 8)
np.save(sys.argv[2], np.asarray(kernel))
np.save(sys.argv[3], np.asarray(state.params["up"]["bias"]))
"""


@pytest.mark.slow
def test_a_sharded_state_starts_from_the_same_values(saved, tmp_path):
    location, tree = saved
    paths = [str(tmp_path / name) for name in ("kernel.npy", "bias.npy")]
    command = [sys.executable, "-c", SHARDED, location, *paths]
    root = ROOT
    forked.run(command, check=True, timeout=120, cwd=root)
    kernel, bias = (np.load(path) for path in paths)
    np.testing.assert_array_equal(kernel, tree["up"]["kernel"])
    np.testing.assert_array_equal(bias[:2], tree["up"]["bias"][[1, 3]])


@pytest.mark.slow
def test_a_fork_continues_like_its_source_or_with_other_settings(whole, tmp_path):
    run_dir, _ = whole
    loop.train(tiny.experiment(tmp_path / "same", fork_from=f"{run_dir}@20", keep_best="eval/loss"))
    for ema in (False, True):
        both = [tiny.weights(directory, ema) for directory in (run_dir, tmp_path / "same")]
        chex.assert_trees_all_equal(*both)
    assert tiny.lines(tmp_path / "same") == [
        line for line in tiny.lines(run_dir) if line["step"] > 20
    ]
    loop.train(
        tiny.experiment(tmp_path / "longer", fork_from=str(run_dir), steps=34, batch_size=32)
    )
    assert tiny.weights(tmp_path / "longer")[0] == 34


def test_invalid_forks_are_refused(tmp_path):
    e = tiny.experiment(tmp_path / "other", fork_from=str(tmp_path))
    with pytest.raises(InputError, match="has no checkpoint"):
        loop.train(e)
    task = tiny.Tiny()
    state = task.init(KEY)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, state)
    for location, message in (
        (f"{tmp_path}@8", r"has checkpoints of steps \[7\]"),
        (f"{tmp_path}@best", r"has checkpoints of steps \[7\]"),
        (f"{tmp_path}@last", "@last has no checkpoint; give RUN or RUN@STEP"),
    ):
        with pytest.raises(InputError, match=message):
            loop.train(dataclasses.replace(e, fork_from=location))
    for steps in (5, 7):  # with 7, nothing would be left to do
        short = dataclasses.replace(e, steps=steps, run_dir=str(tmp_path / f"short{steps}"))
        with pytest.raises(InputError, match=f"has 7 steps, and this run ends at {steps}"):
            loop.train(dataclasses.replace(short, fork_from=str(tmp_path)))
    wider = dataclasses.replace(e, task=tiny.Tiny(width=4), run_dir=str(tmp_path / "wider"))
    with pytest.raises(InputError, match="has different params than this config"):
        loop.train(dataclasses.replace(wider, fork_from=str(tmp_path)))
    with pytest.raises(InputError, match="give one of them"):
        dataclasses.replace(e, init_from="a").check()


def test_the_name_of_a_run_may_contain_an_at_sign(whole, tmp_path):
    """A step follows the last @, unless the whole text is the name of a run."""
    run_dir, _ = whole
    step = SavedSteps(run_dir / "checkpoints").steps()[0]
    for name in ("me@host/run", "run@3", f"run@{step}"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).symlink_to(run_dir)
        assert split_step(f"{tmp_path}/{name}") == (f"{tmp_path}/{name}", None)
        assert split_step(f"{tmp_path}/{name}@{step}") == (f"{tmp_path}/{name}", step)
    assert split_step("me@host/run") == ("me@host/run", None)  # a relative path
    assert split_step("runs/a@²") == ("runs/a@²", None)
    assert split_step("@5") == ("@5", None)
