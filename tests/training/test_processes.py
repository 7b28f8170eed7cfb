"""Tests that two processes with four devices each train, stop and continue like one."""

import functools
import signal

import chex
import jax
import pytest

from tests.helpers import tiny
from tests.helpers.several_processes import together
from tests.helpers.tiny import lines, weights
from varjax.checkpoints.saved_steps import SavedSteps
from varjax.training import loop

pytestmark = pytest.mark.slow

FID = {"every": 15, "images": 20, "features": "pixels"}
SETTINGS = {"keep_best": "eval/loss", "eval_every": 15, "mesh": [2, 4, 1], "fid": FID}
ACROSS = SETTINGS | {"mesh": [1, 1, 8]}  # both processes hold all rows of the batch


def job(run, settings=SETTINGS, **faults):
    return {"run": str(run), "settings": settings} | faults


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Trains three runs in two processes: uninterrupted, killed in a save, stopped by SIGTERM."""
    folder = tmp_path_factory.mktemp("runs")
    codes, said = together(2, job(folder / "whole"), job(folder / "killed", die_in_save=20))
    assert codes == [1, -signal.SIGKILL], said
    (folder / "other/checkpoints/10").mkdir(parents=True)
    (folder / "other" / "config.json").write_text("{}")
    codes, said = together(
        2,
        job(folder / "other"),
        job(folder / "killed"),
        job(folder / "stopped", ACROSS, terminate_in=17),
    )
    assert codes == [128 + signal.SIGTERM] * 2, said
    return folder, said


def last_checkpoint(run):
    """Reads all arrays of the newest checkpoint, and its meta."""
    saved, step = SavedSteps(run / "checkpoints"), lines(run)[-1]["step"]
    state = jax.eval_shape(tiny.Tiny().init, jax.random.key(0))
    abstract = {name: getattr(state, name) for name in ("params", "ema", "opt_state")}
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return saved.arrays(step, abstract, jax.tree.map(lambda _: here, abstract))


def test_processes_killed_during_a_save_continue_bit_identically(runs):
    folder, said = runs
    assert "continuing" in said[0] and "after step 10" in said[0]
    chex.assert_trees_all_equal(*map(last_checkpoint, (folder / "whole", folder / "killed")))
    assert lines(folder / "whole") == lines(folder / "killed")
    assert weights(folder / "whole", kind="best")[0] == weights(folder / "killed", kind="best")[0]


def test_only_the_first_process_prints_but_all_refuse(runs):
    _, said = runs
    assert "finished" in said[0] and "finished" not in said[1]
    assert all(
        "refused: " in words and "holds a run with other settings" in words for words in said
    )


def test_a_signal_to_one_process_stops_both_and_one_device_continues(runs):
    folder, said = runs
    step = SavedSteps(folder / "stopped" / "checkpoints").steps()[-1]
    assert 17 <= step <= 19
    assert f"saved after step {step}" in said[0]
    loop.train(tiny.experiment(folder / "stopped", keep_best="eval/loss", eval_every=15, fid=FID))
    assert_same_but_for_rounding(folder / "whole", folder / "stopped")


def test_one_process_with_eight_devices_trains_and_evaluates_the_same(runs):
    folder, _ = runs
    codes, said = together(1, job(folder / "one", SETTINGS | {"mesh": [1, 8, 1]}))
    assert codes == [0], said
    assert_same_but_for_rounding(folder / "whole", folder / "one")


def test_a_save_that_fails_in_one_process_ends_both(tmp_path):
    codes, said = together(2, job(tmp_path / "run", fail_in_save=20))
    # JAX aborts a process whose coordinator (the first one) is gone. A hang would be None.
    assert codes[0] == 1 and codes[1] in (1, -signal.SIGABRT), said
    assert "failed: saving to" in said[0] and "good: [10]" in said[0], said
    assert SavedSteps(tmp_path / "run" / "checkpoints").steps() == [10]


def assert_same_but_for_rounding(a, b):
    """Compares the last states and all logged metrics of two runs."""
    close = functools.partial(chex.assert_trees_all_close, rtol=1e-4, atol=1e-6)
    close(last_checkpoint(a)[0], last_checkpoint(b)[0])
    assert len(lines(a)) == 8  # six of training, two of evaluation
    assert sum("eval/fid" in line for line in lines(a)) == 2
    for one, other in zip(lines(a), lines(b), strict=True):
        close(one, other)
