"""Tests `skip_nonfinite`, which skips steps with gradients that are not finite."""

import dataclasses
import functools
import itertools
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.helpers import adversarial, tiny
from tests.helpers.tiny import assert_same_run, lines
from varjax import trees
from varjax.checkpoints.saved_steps import STATE_TREES, SavedSteps
from varjax.data.loader import make_loader
from varjax.data.sources.digits import Digits
from varjax.errors import InputError
from varjax.training import loop
from varjax.training.loop_state import LoopState
from varjax.training.run_dir import CHANGEABLE_FIELDS
from varjax.training.setup import jit_train_step
from varjax.training.sharding import Prefetcher, make_mesh, shardings
from varjax.training.task import Plan, TrainState
from varjax.training.train_step import DECISIVE_METRICS, SKIPPED, skip_nonfinite_updates

OFTEN = dict(steps=8, log_every=1, eval_every=4, save_every=1, keep=99, keep_best="eval/loss")


def state_after(run_dir, step):
    task = tiny.experiment(run_dir).task
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    placement = shardings(abstract, make_mesh(tiny.experiment(run_dir).mesh))
    trees, where = ({n: getattr(s, n) for n in STATE_TREES} for s in (abstract, placement))
    return SavedSteps(run_dir / "checkpoints").arrays(step, trees, where)[0]


@pytest.fixture(scope="module")
def skipping(tmp_path_factory):
    """Trains a run that skips its steps 4 and 5, counted from 0."""
    run_dir = tmp_path_factory.mktemp("runs") / "skipping"
    changes = dict(explode_at=4, explode_steps=2, accumulate=2, skip_nonfinite=2)
    experiment = tiny.experiment(run_dir, **OFTEN, **changes)
    loop.train(experiment)
    return experiment, run_dir


@pytest.mark.slow
def test_a_skipped_step_changes_only_the_step_number(skipping):
    experiment, run_dir = skipping
    before, skipped, after = (state_after(run_dir, step) for step in (4, 6, 7))
    chex.assert_trees_all_equal(skipped, before)
    assert not np.array_equal(after["params"]["up"]["kernel"], before["params"]["up"]["kernel"])
    chex.assert_tree_all_finite(state_after(run_dir, 8))
    counts = {x["step"]: x["skipped_steps"] for x in lines(run_dir) if "skipped_steps" in x}
    assert counts == {1: 0, 2: 0, 3: 0, 4: 0, 5: 1, 6: 2, 7: 2, 8: 2}
    by_step = {x["step"]: x for x in lines(run_dir) if "grad_norm" in x}
    assert by_step[5]["grad_norm"] is None and by_step[7]["grad_norm"] > 0
    assert SKIPPED not in by_step[5]
    optimizer, plan = experiment.task.optimizer, Plan(steps=8, batch_size=experiment.batch_size)
    rates = [optimizer.lr(update, plan) for update in (0, 1, 2, 3, 4, 4, 4, 5)]
    np.testing.assert_allclose([by_step[step + 1]["lr"] for step in range(8)], rates, rtol=1e-5)


@pytest.mark.slow
def test_a_run_stopped_between_two_skipped_steps_ends_bit_identically(
    skipping, tmp_path, monkeypatch
):
    """The number of skips in a row is restored, too, so with a lower limit the run gives up."""
    experiment, whole = skipping
    experiment = dataclasses.replace(experiment, run_dir=str(tmp_path / "run"))
    with monkeypatch.context() as patch:
        take, numbers = Prefetcher.__next__, itertools.count(1)

        def take_and_signal(batches):
            if next(numbers) == 5:
                signal.raise_signal(signal.SIGTERM)
            return take(batches)

        patch.setattr(Prefetcher, "__next__", take_and_signal)
        with pytest.raises(SystemExit):
            loop.train(experiment)
    stopped_at = SavedSteps(tmp_path / "run" / "checkpoints").steps()[-1]
    assert stopped_at == 5, "between the two"
    stricter = dataclasses.replace(experiment, skip_nonfinite=1)
    with pytest.raises(FloatingPointError, match="after step 6, .*checkpoint of step 5 is good"):
        loop.train(stricter)
    loop.train(experiment)
    assert_same_run(whole, tmp_path / "run")


@pytest.mark.slow
def test_the_first_step_is_never_skipped(tmp_path):
    with pytest.raises(FloatingPointError, match="after step 1, .*nothing was saved yet"):
        loop.train(tiny.experiment(tmp_path, **OFTEN, explode_at=0, skip_nonfinite=9))


@pytest.mark.parametrize("broken", ["loss", "grad_norm", "discriminator/grad_norm", None])
def test_both_optimizers_skip_a_step_if_one_is_not_finite(broken):
    def train_step(state, frozen, batch, key):
        metrics = {"loss": 1.0, "grad_norm": 1.0, "discriminator/grad_norm": 1.0, "psnr": jnp.inf}
        metrics = {name: jnp.asarray(x) for name, x in metrics.items()} | batch
        return jax.tree.map(lambda x: x + 1, state), metrics

    opt_state = {"tokenizer": jnp.zeros(2), "discriminator": (jnp.zeros(()), jnp.int32(3))}
    state = TrainState(jnp.int32(7), {"w": jnp.zeros(3)}, None, opt_state)
    batch = {broken: jnp.float32(np.nan)} if broken else {}
    step = jax.jit(skip_nonfinite_updates(train_step))
    after, metrics = step(state, {}, batch, jax.random.key(1))
    assert float(metrics[SKIPPED]) == float(broken is not None) and after.step == 8
    moved = 0 if broken else 1
    expected = jax.tree.map(lambda x: x + moved, state)
    chex.assert_trees_all_equal(after.replace(step=7), expected.replace(step=7))


@pytest.mark.slow
def test_the_tokenizer_task_reports_both_gradient_norms():
    """`skip_nonfinite_updates` finds them by these names."""
    task = adversarial.TASK
    step = skip_nonfinite_updates(functools.partial(task.train_step, plan=adversarial.PLAN))
    state = adversarial.state(task, 5)
    after, metrics = jax.eval_shape(step, state, {}, adversarial.BATCH, adversarial.KEY)
    decisive = {name for name in metrics if name.rpartition("/")[2] in DECISIVE_METRICS}
    assert decisive == {"loss", "grad_norm", "discriminator/loss", "discriminator/grad_norm"}
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


@pytest.mark.slow
def test_skipping_takes_less_memory_than_a_second_state():
    """At most the parameters and updates exist twice, but not the EMA and the moments."""
    task = tiny.Tiny(width=2**14)
    abstract = jax.eval_shape(task.init, jax.random.key(0))
    batch = make_loader(Digits(), 4).train_batch(0)
    mesh = make_mesh(tiny.experiment("x").mesh)
    placement = shardings(abstract, mesh)
    bytes_used = [
        jit_train_step(task, Plan(), mesh, placement, skip)
        .lower(abstract, {}, batch, jax.random.key(0))
        .compile()
        .memory_analysis()
        .temp_size_in_bytes
        for skip in (False, True)
    ]
    assert bytes_used[1] - bytes_used[0] < 2.1 * trees.nbytes(abstract.params)


def test_skip_counts_are_saved_only_if_there_are_any():
    assert LoopState("eval/loss", 1.0).to_meta().keys() == {
        "keep_best",
        "best",
        "evaluations_since_best",
        "metrics",
        "evaluation_due",
    }
    counted = LoopState()
    counted.count_step(skipped=True)
    assert LoopState.from_meta(counted.to_meta(), "", {}) == counted
    counted.count_step(skipped=False)
    assert (counted.skipped_steps, counted.skipped_in_row) == (1, 0)
    assert "skip_nonfinite" in CHANGEABLE_FIELDS


def test_a_task_without_the_metric_grad_norm_is_refused():
    step = skip_nonfinite_updates(lambda state, frozen, batch, key: (state, {"loss": jnp.ones(())}))
    with pytest.raises(InputError, match="no metric grad_norm"):
        jax.eval_shape(step, tiny.Tiny().init(jax.random.key(0)), {}, {}, jax.random.key(0))
