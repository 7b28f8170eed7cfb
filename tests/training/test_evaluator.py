import jax
import pytest

from tests.helpers.tiny import Tiny
from varjax.data.sources import Digits
from varjax.training.evaluator import Evaluator
from varjax.training.sharding import MeshShape, make_mesh

WIDTH, BATCH = 512, 64


def evaluator(accumulate):
    task, mesh = Tiny(width=WIDTH, accumulate=accumulate), make_mesh(MeshShape())
    loader = Digits().make(BATCH, seed=0)
    state = task.init(jax.random.key(0))
    return Evaluator(task, loader, {}, mesh, BATCH), state


def test_microbatches_reduce_the_memory_of_an_evaluation():
    def temporaries(accumulate):
        found, state = evaluator(accumulate)
        return found.compile(state).memory_analysis().temp_size_in_bytes

    assert temporaries(8) < temporaries(1) / 4


def test_microbatches_do_not_change_metrics():
    found = [e.metrics(state) for e, state in map(evaluator, (1, 8))]
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    assert {"eval/loss", "eval_ema/accuracy"} <= found[0].keys()
