import math

from varjax.training.results import results_line, results_table

METRICS = {
    "eval/loss_last": 3.27017567,
    "eval/loss": 3.25877363,
    "eval/accuracy": 0.09422572,
    "eval/loss_at_scale/0": 2.92,
    "eval_ema/loss": 3.85736129,
    "eval_ema/fid": 12345.678,
}


def test_the_line_has_the_most_important_metrics():
    line = "loss 3.259, accuracy 0.09423; EMA weights: loss 3.857, fid 1.235e+04"
    assert results_line(METRICS) == line
    assert results_line(METRICS, 3.2) == f"{line}; training loss 3.2"
    assert results_line({"eval/entropy": 1.0}, math.nan) == ""


def test_the_table_has_every_scalar_metric():
    assert results_table(METRICS).splitlines() == [
        "           held out  EMA weights",
        "loss          3.259        3.857",
        "accuracy    0.09423",
        "fid                    1.235e+04",
        "loss_last      3.27",
    ]
