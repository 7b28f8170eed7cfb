"""Tests sweeps of the seed: a report for each seed, and means with standard deviations."""

import numpy as np
import pytest

from tests.helpers.fake_sampler import FakeSampler
from varjax.errors import InputError
from varjax.evaluation import __main__ as command
from varjax.evaluation.sweep import SweepPoint, join_seeds, split_sweep, sweep_table
from varjax.storage import files

FLAGS = ["--weights=fake", "--reference=real.npz", "--features=pixels", "--batch_size=8"]


@pytest.fixture
def jobs(monkeypatch):
    """Replaces sampling and measuring; returns the jobs that the command asks for."""
    asked = []

    def evaluate_model(settings, model, name, jobs, classifier):
        asked.extend(jobs.items())
        return [
            {"metrics": {"fid": 10 * job.options.guidance + job.seed**2}} for job in jobs.values()
        ]

    monkeypatch.setattr(command, "evaluate_model", evaluate_model)
    monkeypatch.setattr(command, "load", lambda *_, **__: FakeSampler())
    monkeypatch.setattr(command, "use_compilation_cache", lambda: None)
    return asked


def test_each_seed_is_sampled_and_the_table_shows_mean_and_deviation(jobs, tmp_path, capsys):
    sweep = ["--sweep", "guidance=1,2", "seed=0,1,2", "--out=sweep.json"]
    assert command.main([*FLAGS, *sweep]) == 0
    assert [(job.options.guidance, job.seed) for _, job in jobs] == [
        (guidance, seed) for guidance in (1, 2) for seed in (0, 1, 2)
    ]
    assert jobs[0][0].name == "sweep.guidance=1,seed=0.json"
    deviation = np.std([0, 1, 4], ddof=1)
    printed = capsys.readouterr().out
    assert f"1  11.6667 ± {deviation:.4f}   lowest FID" in printed
    assert f"2  21.6667 ± {deviation:.4f}\n" in printed and "seed" not in printed
    content = files.read_json("sweep.json")
    assert [point["options"]["seed"] for point in content["points"]] == [0, 1, 2, 0, 1, 2]
    assert content["over_seeds"][1] == {
        "options": {"guidance": 2.0},
        "means": {"fid": pytest.approx(65 / 3)},
        "standard_deviations": {"fid": pytest.approx(deviation)},
    }
    assert (tmp_path / "sweep.png").is_file()


def test_a_sweep_of_seeds_alone_is_one_line(jobs, capsys):
    assert command.main([*FLAGS, "--sweep", "seed=1,3", "--out=seeds.json"]) == 0
    assert "30.0000 ± 5.6569\n" in capsys.readouterr().out
    assert len(files.read_json("seeds.json")["points"]) == 2


def test_a_single_seed_has_no_deviation():
    points = [SweepPoint({"guidance": (1.0, 2.0), "seed": 7}, {"metrics": {"fid": 3.0}})]
    (joined,) = join_seeds(points)
    assert joined.options == {"guidance": (1.0, 2.0)} and joined.deviations == {}
    assert sweep_table(points).endswith("1:2            3.0000")


def test_split_sweep_separates_seeds_and_acceptances_from_options():
    assert split_sweep(["seed=3,1", "top_k=5", "accept=1"]) == ([1.0], [3, 1], ["top_k=5"])


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["seed=1,1"], "sweep seed=1,1: a value is given twice"),
        (["seed=1,01"], "sweep seed=1,01: a value is given twice"),
        (["seed=1", "seed=2"], "sweep seed=2: seed is swept twice"),
        (["seed=-1"], "seed=-1"),
        (["seed=1.5"], "sweep seed=1.5: give a int"),
    ],
)
def test_invalid_seeds_are_refused(texts, message):
    with pytest.raises(InputError, match=message):
        split_sweep(texts)


def test_a_seed_together_with_a_sweep_of_seeds_is_refused(jobs, capsys):
    assert command.main([*FLAGS, "--seed=3", "--sweep", "seed=1,2"]) == 1
    assert "seed=3 and a sweep of seed: give one of them" in capsys.readouterr().err
    assert jobs == []
