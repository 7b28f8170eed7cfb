"""Tests fits of scaling laws on synthetic runs with known laws."""

import functools
import json
import re

import jax
import numpy as np
import pytest
from PIL import Image

from varjax import trees
from varjax.analysis.ladder import front_points, model_size, read_ladder
from varjax.analysis.power_law import Points, PowerLaw, fit_power_law, pareto_front
from varjax.analysis.pyplot import load_pyplot
from varjax.analysis.run_log import RunLog
from varjax.analysis.scaling import main, parse_floors, scaling_json, scaling_tables
from varjax.analysis.scaling_fits import COMPUTE, PARAMETERS, fit_scaling
from varjax.analysis.scaling_plot import PAPER_EXPONENTS, draw_scaling, has_paper_tokens
from varjax.config import config_tree
from varjax.errors import InputError
from varjax.tokenizers.vq.pyramid import SCALES_256
from varjax.var.model import VARConfig

BATCH, STEPS = 64, 20_000
DEPTHS = (2, 3, 4, 5, 6, 8, 10, 12)
# floor + (x0 / N)^exponent + (x1 / D)^exponent
LAWS = {
    "loss": PowerLaw(2.0, (1e6, 5e4), (0.30, 0.35)),
    "loss_last": PowerLaw(1.8, (2e6, 5e4), (0.25, 0.35)),
}


def parameters(depth):
    return 18 * depth * (64 * depth) ** 2


def make_run(folder, depth, laws=LAWS, noise=0.001, change=None, extra="", steps=STEPS):
    """Writes the log of a VAR run at this depth whose losses follow the laws."""
    size, rng = parameters(depth), np.random.default_rng(depth)
    config = {
        "batch_size": BATCH,
        "steps": STEPS,
        "task": {
            "_type": "VARTask",
            "model": {"depth": depth, "width": 64 * depth},
            "tokenizer": {"scales": [1, 2, 3], "vocab": 256},
        },
        "data": {"_type": "CachedLatents", "root": f"/data/{depth}"},
    }
    (change or (lambda config: None))(config)
    run = folder / f"d{depth}"
    run.mkdir(parents=True)
    (run / "config.json").write_text(json.dumps(config))
    lines = []
    for step in np.unique(np.geomspace(200, steps, 16).astype(int)).tolist():
        line = {"step": step}
        for name, law in laws.items():
            value = float(law(size, step * BATCH)) * np.exp(noise * rng.normal())
            line[f"eval/{name}"] = value
        lines.append(json.dumps(line))
        flop = 6 * size * BATCH  # C = 6 N D, with one token per image
        lines.append(json.dumps({"step": step, "loss": 1.0, "step_tflop": flop / 1e12}))
    (run / "metrics.jsonl").write_text("\n".join([*lines, extra]))
    return str(run)


def make_ladder(folder, depths=DEPTHS, **kwargs):
    return [make_run(folder, depth, **kwargs) for depth in depths]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return make_ladder(tmp_path_factory.mktemp("runs"))


def test_intervals_contain_the_known_constants(runs):
    report = fit_scaling(read_ladder(runs), resamples=60, sizes=[3e8])
    images = STEPS * BATCH
    for name, fit in report.fits["parameters"].items():
        law = LAWS[name]
        floor = float(law(np.inf, images))  # lower bound for any size at this many images
        for found, known in (
            (fit.interval(lambda law: law.exponents[0]), law.exponents[0]),
            (fit.interval(lambda law: law.x0[0]), law.x0[0]),
            (fit.interval(lambda law: law.floor), floor),
        ):
            assert found[0] < known < found[1], (name, found, known)
            assert found[1] < 1.6 * found[0]  # narrow enough to be useful
        assert fit.correlation < -0.999
        left_out, larger = report.predictions[name]
        known = law(parameters(12), images)
        assert left_out.size == parameters(12) and left_out.low < known < left_out.high
        assert left_out.measured == pytest.approx(known, rel=0.003)
        assert larger.loss == pytest.approx(law(3e8, images), rel=0.003)
        assert larger.low < larger.loss < larger.high < 1.02 * larger.low


def test_without_a_floor_the_fit_is_a_log_log_regression(tmp_path):
    law = {"loss": PowerLaw(0.0, (1e9, 1.0), (0.08, 40.0))}  # images have almost no effect
    ladder = read_ladder(make_ladder(tmp_path, laws=law))
    report = fit_scaling(ladder, floors=parse_floors("loss=0"), resamples=60)
    fit = report.fits["parameters"]["loss"]
    low, high = fit.interval(lambda law: law.exponents[0])
    assert low < 0.08 < high < 1.1 * low and fit.law.floor == 0
    x, y = np.log(fit.points.x_TP[0]), np.log(fit.points.loss_P)
    assert fit.law.exponents[0] == pytest.approx(-np.polyfit(x, y, 1)[0], rel=1e-6)
    assert fit.correlation == pytest.approx(np.corrcoef(x, y)[0, 1])


@pytest.mark.filterwarnings("error")
def test_measured_points_are_fitted_without_numerical_warnings():
    """Uses the token errors of the ladder in docs/scaling.md, which are best fitted by floor 0."""
    parameters_P = 4608.0 * np.arange(2, 8) ** 3
    error_P = np.array([0.9191, 0.8950, 0.8748, 0.8572, 0.8421, 0.8313])
    law = fit_power_law(Points(parameters_P[None], error_P, np.ones(6)))
    assert law.floor < 1e-6 and law.exponents == pytest.approx((0.0271,), rel=0.01)
    np.testing.assert_allclose(law(parameters_P), error_P, rtol=0.01)


def test_a_joint_fit_finds_the_law_of_size_and_images(runs):
    ladder = read_ladder(runs)
    ladder.curves.pop("loss_last")
    report = fit_scaling(ladder, joint=True, resamples=20)
    fit, law = report.fits["joint"]["loss"], LAWS["loss"]
    assert fit.law.floor == pytest.approx(law.floor, rel=0.03)
    np.testing.assert_allclose(fit.law.exponents, law.exponents, rtol=0.1)
    for i in range(2):
        low, high = fit.interval(lambda law, i=i: law.exponents[i])
        assert low < law.exponents[i] < high
    (left_out,) = report.predictions["loss"]
    assert left_out.loss == pytest.approx(left_out.measured, rel=0.005)


def test_the_compute_front_has_the_exponent_implied_by_the_law(runs):
    # Minimizing (a/N)^α + (b/D)^β at C = 6 N D gives C^(-αβ/(α+β)) (Hoffmann et al. 2022).
    ladder = read_ladder(runs)
    floors = {name: law.floor for name, law in LAWS.items()}
    report = fit_scaling(ladder, floors=floors, resamples=0)
    for name, law in LAWS.items():
        a, b = law.exponents
        assert report.fits["compute"][name].law.exponents[0] == pytest.approx(
            a * b / (a + b), rel=0.1
        )
    points = front_points(ladder.curves["loss"])
    assert (np.diff(points.x_TP[0]) > 0).all() and (np.diff(points.loss_P) < 0).all()
    smallest = ladder.curves["loss"][0]
    assert np.isin(points.loss_P, smallest.loss_P).sum() <= len(smallest.loss_P) - 3


def test_a_pareto_front_has_all_points_that_are_not_dominated():
    rng = np.random.default_rng(0)
    x, loss = rng.integers(1, 9, 60) / 4, rng.integers(1, 9, 60) / 4
    front = pareto_front(x, loss)
    beaten = [any((x <= x[i]) & (loss <= loss[i]) & ((x < x[i]) | (loss < loss[i])))
              for i in range(60)]  # fmt: skip
    pairs = {(x[i], loss[i]) for i in range(60) if not beaten[i]}
    assert {(x[i], loss[i]) for i in front} == pairs and len(front) == len(pairs)


def test_sizes_are_counted_as_in_the_paper_or_read_from_the_log():
    def size(model, kind="VARTask", lines=()):
        return model_size(RunLog("run", 1, list(lines), 1, {"task": {"_type": kind, **model}}))

    for shared in (False, True):  # one AdaLN for all layers
        config = VARConfig(3, 48, 3, scales=(1, 2), shared_adaln=shared)
        params = trees.paths(jax.eval_shape(config.init, jax.random.key(0)))
        kernel = re.compile("(blocks/.*|shared_adaln)/kernel")
        kernels = sum(x.size for path, x in params.items() if kernel.fullmatch(path))
        assert size({"model": config_tree.to_dict(config)}) == kernels
    assert size({"model": {"depth": 16, "width": 1024}}) == 73_728 * 16**3
    logged = [{"step": 1, "parameters": 5}, {"step": 2, "parameters": 7}]
    assert size({"model": {"depth": 2, "width": 8}}, "MARTask", logged) == 7
    assert size({}, lines=logged) == 7
    for lines in ([], [{"step": 1, "parameters": 0}], [{"step": 1, "parameters": -5}]):
        for model in ({}, {"model": {"depth": 10**400, "width": -1}}, {"model": [1]}):
            with pytest.raises(InputError, match="number of parameters is not known"):
                size(model, lines=lines)


def test_ema_losses_and_token_errors_are_read_if_all_runs_have_them(tmp_path):
    line = '{"step": 20000, "eval_ema/loss": 2.5, "eval_ema/accuracy": 0.25}'
    runs = make_ladder(tmp_path, (2, 3), extra=line)
    ladder = read_ladder(runs)
    assert (ladder.prefix, list(ladder.curves)) == ("eval_ema", ["loss", "error"])
    assert [curve.loss_P.tolist() for curve in ladder.curves["error"]] == [[0.75], [0.75]]
    assert list(read_ladder(runs, "eval").curves) == ["loss", "loss_last"]
    assert read_ladder([*runs, make_run(tmp_path, 4)]).prefix == "eval"


def change_vocab(config):
    config["task"]["tokenizer"]["vocab"] = 512


def change_data(config):
    config["data"]["_type"] = "Digits"


def change_task(name, config):
    *path, last = name.split(".")
    settings = config["task"]
    for part in path:
        settings = settings.setdefault(part, {})
    settings[last] = 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (change_vocab, r"task.tokenizer.vocab: 256 in .*d2, 512 in .*d3"),
        (change_data, r"data: 'CachedLatents' in .*d2, 'Digits' in .*d3"),
        *(
            (functools.partial(change_task, name), rf"task.{name}: None in .*d2, 7 in .*d3")
            for name in (
                "min_mask_ratio",
                "model.order",
                "model.head.patch",
                "kl",
                "l1",
                "perceptual.weight",
            )
        ),
    ],
)
def test_runs_whose_losses_measure_different_things_are_refused(tmp_path, change, message):
    runs = [make_run(tmp_path, 2), make_run(tmp_path, 3, change=change)]
    with pytest.raises(InputError, match=message):
        read_ladder(runs)


def test_runs_with_different_tokenizers_or_images_are_refused(tmp_path):
    runs = make_ladder(tmp_path, (2, 3))
    for run, digest in zip(runs, "ab", strict=True):
        (tmp_path / run / "frozen.json").write_text(json.dumps({"digest": digest}))
        (tmp_path / run / "data.json").write_text(json.dumps({"train": {"images": len(run)}}))
    with pytest.raises(InputError, match="tokenizer's weights: 'a' in .*d2, 'b' in .*d3"):
        read_ladder(runs)
    for run, crop in zip(runs, ("random", "center"), strict=True):
        (tmp_path / run / "frozen.json").unlink()
        (tmp_path / run / "data.json").write_text(json.dumps({"settings": {"crop": crop}}))
    with pytest.raises(InputError, match="latents.crop: 'random' in .*d2, 'center' in .*d3"):
        read_ladder(runs)
    (tmp_path / runs[0] / "data.json").write_text('{"train": {"images": 2}}')
    (tmp_path / runs[1] / "data.json").write_text('{"train": {"images": 3}}')
    with pytest.raises(InputError, match=r"images.train.images: 2 in .*d2, 3 in .*d3"):
        read_ladder(runs)


def test_invalid_requests_give_an_error_and_no_output(tmp_path, capsys):
    runs = make_ladder(tmp_path, (2, 3, 4))

    def error(*arguments):
        assert main([*arguments, "--out=out", "--resamples=0"]) == 1
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    message = error(*runs)
    assert "runs of 3 sizes are too few: a fit of loss needs 4" in message
    assert "589.8 k, 1.991 M, 4.719 M" in message
    (tmp_path / "link").symlink_to(runs[0])
    for again in (runs[0], f"{runs[0]}/", str(tmp_path / "link")):
        assert "given more than once" in error(*runs, again)
    assert "floor of 'error': the runs have loss, loss_last" in error(*runs, "--floor=error=0.1")
    assert "below the lowest loss, 2.9" in error(*runs, "--floor=loss=9")
    assert "allowed are free, 0, and NAME=NUMBER" in error(*runs, "--floor=low")
    never = make_run(tmp_path / "never", 5, laws={})
    assert "d5 has no eval/loss in its metrics.jsonl; set eval_every" in error(*runs, never)
    averages = error(*runs, "--weights=eval_ema")
    assert "no eval_ema/loss in its metrics.jsonl; it has eval/loss, so use" in averages
    assert "one less with --floor=0" in message
    assert "one less" not in error(*runs[:2], "--floor=0")
    assert "is not a run" in error(str(tmp_path), runs[0])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("joint", [False, True])
def test_a_constant_loss_has_no_law(tmp_path, joint):
    runs = make_ladder(tmp_path, (2, 3, 4, 5), laws={"loss": lambda n, d: 0.9}, noise=0)
    ladder = read_ladder(runs)
    report = fit_scaling(ladder, joint, sizes=[1e9], resamples=2)
    assert not report.fits and not report.predictions
    assert any(note.startswith("loss does not fall") for note in report.notes)
    assert len(scaling_tables(ladder, report)) > len(runs)
    scaling_json(ladder, report)


def test_caveats_about_a_fit_are_noted(tmp_path):
    runs = [*make_ladder(tmp_path, (2, 3)), make_run(tmp_path, 4, steps=5000)]

    ladder, floors = read_ladder(runs), parse_floors("loss=0,loss_last=0")
    (ended,) = ladder.notes
    assert ended.endswith("d4 ended at step 5,000 of 20,000 and is used as it is")
    unequal = "the runs saw 320,000 to 1,280,000 images"
    notes = fit_scaling(ladder, floors=floors, resamples=0).notes
    assert any(note.startswith(unequal) for note in notes)
    notes = fit_scaling(ladder, joint=True, floors=floors, resamples=0).notes
    assert notes == [ended]  # a joint fit takes the images seen into account
    flat = make_ladder(tmp_path / "flat", (2, 3, 4, 5), laws={"loss": lambda n, d: 2.0 + n / 1e9})
    report = fit_scaling(read_ladder(flat), floors={"loss": 0.0}, resamples=0)
    assert "loss does not fall against parameters N" in report.notes
    assert any(note.startswith("no fit of loss against petaFLOP") for note in report.notes)
    unknown = make_run(tmp_path / "unknown", 5, extra='{"step": 20000, "step_tflop": 0}')
    assert any("no step_tflop" in note for note in read_ladder([runs[0], unknown]).notes)
    once = '{"step": 20000, "eval_ema/loss": 2.5}'  # one evaluation says nothing about images
    ladder = read_ladder(make_ladder(tmp_path / "once", (2, 3, 4, 5), extra=once))
    report = fit_scaling(ladder, joint=True, resamples=0)
    (note,) = report.notes
    assert note.startswith("no fit of loss against parameters N and images seen D: 4 points with 1")
    assert not report.fits and not report.predictions


def test_four_points_are_too_few_for_five_constants(tmp_path):
    runs = [make_run(tmp_path, depth, steps=2000 * depth) for depth in (2, 3, 4, 5)]
    for run in runs:  # keep only the last evaluation
        metrics = tmp_path / run / "metrics.jsonl"
        metrics.write_text("\n".join(metrics.read_text().splitlines()[-2:]))
    report = fit_scaling(read_ladder(runs), joint=True, resamples=2)
    assert (
        "images seen D: 4 points with 4 distinct values of a variable are too few"
        in report.notes[-2]
    )
    assert not report.fits


def test_repeated_points_of_a_resample_count_once():
    size_P, images_P = np.repeat([[1e5, 1e6, 1e7], [1e4, 2e4, 3e4]], 3, axis=1)
    points = Points(np.stack([size_P, images_P]), np.ones(9), np.ones(9))
    assert points.spare(None) == 3 - 5 and points.spare(0.0) == 3 - 4


def test_the_measured_loss_of_the_largest_size_is_the_mean_of_its_runs(tmp_path):
    runs = make_ladder(tmp_path, (2, 3, 4, 5, 6))
    runs += [make_run(tmp_path / name, 8, laws={"loss": lambda n, d, loss=loss: np.asarray(loss)})
             for name, loss in (("a", 2.5), ("b", 2.7))]  # fmt: skip
    report = fit_scaling(read_ladder(runs), floors={"loss": 0.0}, resamples=0)
    assert report.predictions["loss"][0].measured == pytest.approx(2.6, rel=0.01)


def test_a_joint_fit_predicts_a_short_run_of_the_largest_size_at_its_length(tmp_path):
    law = {"loss": LAWS["loss"]}
    runs = make_ladder(tmp_path, (2, 3, 4, 5, 6), laws=law, noise=0)
    runs.append(make_run(tmp_path, 8, laws=law, noise=0, steps=STEPS // 10))
    report = fit_scaling(read_ladder(runs), joint=True, resamples=0, sizes=[parameters(8)])
    left_out, asked = report.predictions["loss"]
    assert left_out.loss == pytest.approx(left_out.measured, rel=1e-3)
    assert asked.loss == pytest.approx(law["loss"](parameters(8), STEPS * BATCH), rel=1e-3)


@pytest.mark.parametrize("text", ["abc", "1e6,-1", "inf", "1e6;2e6"])
def test_sizes_to_predict_must_be_positive_numbers(text, capsys):
    with pytest.raises(SystemExit):
        main(["run", "--out=out", f"--predict={text}"])
    assert f"{text!r}: give numbers of parameters above 0" in capsys.readouterr().err


def test_without_resamples_there_are_no_intervals(runs):
    ladder = read_ladder(runs)
    report = fit_scaling(ladder, floors=parse_floors("loss=0,loss_last=0"), resamples=0)
    text = json.dumps(scaling_json(ladder, report), allow_nan=False)
    fit = json.loads(text)["fits"]["parameters"]["loss"]
    assert fit["floor_interval"] == [None, None] and fit["exponents"][0] > 0
    lines = scaling_tables(ladder, report)
    assert not any("[" in line or "nan" in line for line in lines)


def test_lines_of_the_paper_are_drawn_only_for_its_tokens(tmp_path, monkeypatch):
    def paper(config):
        config["task"]["tokenizer"] = {"scales": list(SCALES_256), "vocab": 4096}

    runs = make_ladder(tmp_path / "a", (2, 3, 4), change=paper)
    assert has_paper_tokens(ladder := read_ladder(runs))
    report = fit_scaling(ladder, floors=parse_floors("loss=0,loss_last=0"), resamples=0)
    shown = []
    monkeypatch.setattr(load_pyplot(), "close", shown.append)
    for variables in (PARAMETERS, COMPUTE):
        fits = report.fits[variables.name]
        draw_scaling(ladder, variables, fits, tmp_path / "picture.png")
        for panel, (name, fit) in zip(shown[-1].axes, fits.items(), strict=False):
            exponent = PAPER_EXPONENTS[variables.symbols[0]][name]
            label = f"exponent {exponent} of the VAR paper"
            (line,) = [line for line in panel.lines if line.get_label() == label]
            x, y = np.log(line.get_data())
            assert np.polyfit(x, y, 1)[0] == pytest.approx(-exponent)
            assert y.mean() == pytest.approx(np.log(fit.law(np.exp(x.mean()))))
    assert not has_paper_tokens(read_ladder([make_run(tmp_path / "b", 2)]))


def test_fits_do_not_depend_on_the_order_of_runs(runs):
    reports = [
        fit_scaling(read_ladder(order), floors={"loss": 0.0, "loss_last": 0.0}, resamples=3)
        for order in (runs, runs[::-1])
    ]
    first, second = (report.fits[PARAMETERS.name]["loss"].resampled for report in reports)
    assert first == second and len(first) == 3


@pytest.mark.slow
@pytest.mark.parametrize("fit", ["separate", "joint"])
def test_the_command_prints_tables_and_writes_pictures(runs, tmp_path, capsys, fit):
    assert main([*runs, "--out=out", f"--fit={fit}", "--resamples=3", "--predict=1e9"]) == 0
    out = capsys.readouterr().out
    assert "8 runs, last losses" in out and "127.4 M" in out and "(left out of the fit)" in out
    data = json.loads((tmp_path / "out" / "scaling.json").read_text())
    names = {"separate": {"parameters", "compute"}, "joint": {"joint"}}[fit]
    assert data["fits"].keys() == names and len(data["predictions"]["loss"]) == 2
    for name in names:
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert picture.format == "PNG" and picture.width > 1000
    other = {"separate": "joint", "joint": "separate"}[fit]
    assert main([*runs, "--out=out", f"--fit={other}", "--resamples=0"]) == 0
    assert not any((tmp_path / "out" / f"{name}.png").exists() for name in names)
    own = tmp_path / "own" / {"separate": "joint.png", "joint": "compute.png"}[fit]
    own.parent.mkdir()
    own.write_text("not of this command")
    assert main([*runs, "--out=own", f"--fit={fit}", "--resamples=0"]) == 0
    assert own.exists()
