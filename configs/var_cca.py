"""Fine-tunes VAR by condition contrastive alignment (CCA), after which it needs no guidance.

    python train.py --config=configs/var_cca.py:d16

After the colon: d16, d20, d24 or d30, data=… as in configs/var.py, and the trained model:

    configs/var_cca.py:d16                              the official weights, fetched once
    configs/var_cca.py:d16,from=runs/var_d16            a run
    configs/var_cca.py:d16,from=weights/d16             a directory that varjax convert wrote, with
                                                        --var and --tokenizer

The model is trained, a frozen copy of it is the reference, and its tokenizer makes the tokens. To
change only one of them, set --config.init_from (with --config.init_tokenizer=false, or its
tokenizer is used as well), --config.task.cca.reference or --config.task.tokenizer_weights.

Hyper-parameters are those of the authors' commands (github.com/thu-ml/CCA): one epoch, batch 256,
β = 0.02, 10 % of the labels dropped, reference with drop path. Published by the authors:

    FID / Inception Score (50,000 samples, top-k 900, top-p 0.96)

    model   λ    before, guided   before, not guided   after, not guided
    d16      50  3.36 / 280.1     12.00 / 105.5        4.03 / 271.1
    d20      50  2.59 / 279.1      8.48 / 129.5        3.02 / 282.6
    d24     100  2.11 / 291.6      6.20 / 154.3        2.63 / 298.8
    d30    1000  1.94 / 325.1      5.26 / 175.6        2.54 / 264.2

A step costs as much as 2.7 steps of configs/var.py with the same batch, because the trained model
and the reference see each image with two labels. A run needs memory for one more copy of the
parameters, sharded like them. Sampling, evaluation and conversion treat it like any VAR run.
"""

import dataclasses

from varjax.training.experiment import Experiment
from varjax.var.cca import CCAConfig
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask

from . import var
from ._arguments import read_argument, split_words


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Holds the settings that differ between sizes."""

    negative_weight: float  # λ
    accumulate: int  # microbatches in a batch
    end: float  # of the learning rate, as a fraction of its peak
    weight_decay_end: float
    drop_path: float


RECIPES = {
    "d16": Recipe(
        negative_weight=50.0, accumulate=4, end=0.1, weight_decay_end=0.05, drop_path=0.0
    ),
    "d20": Recipe(
        negative_weight=50.0, accumulate=8, end=0.1, weight_decay_end=0.05, drop_path=0.1 * 20 / 24
    ),
    "d24": Recipe(
        negative_weight=100.0, accumulate=8, end=0.01, weight_decay_end=0.05, drop_path=0.1
    ),
    "d30": Recipe(
        negative_weight=1000.0,
        accumulate=16,
        end=0.01,
        weight_decay_end=0.08,
        drop_path=0.1 * 30 / 24,
    ),
}


def get_config(arg: str = "d16") -> Experiment:
    words = split_words(arg)
    starts = [word for word in words if word.startswith("from=") and word != "from="]
    words = [word for word in words if word not in starts]
    size, data, _ = read_argument(words, RECIPES, ["from=MODEL"])
    start = starts[-1].removeprefix("from=") if starts else f"var_{size}"
    recipe = RECIPES[size]
    pretraining = var.experiment(size, var.RECIPES[size], data, tokenizer_weights=start)
    assert isinstance(pretraining.task, VARTask)
    optimizer = dataclasses.replace(
        pretraining.task.optimizer,
        base_lr=2e-5,  # for a batch of 256
        end=recipe.end,
        weight_decay_end=recipe.weight_decay_end,
    )
    task = dataclasses.replace(
        pretraining.task,
        optimizer=optimizer,
        class_dropout=0.1,
        drop_path=recipe.drop_path,
        accumulate=recipe.accumulate,
        sampling=VAROptions(guidance=1.0, top_k=900, top_p=0.96),
        cca=CCAConfig(reference=start, negative_weight=recipe.negative_weight, beta=0.02),
    )
    return dataclasses.replace(
        pretraining,
        task=task,
        run_dir=f"runs/var_{size}_cca",
        init_from=start,
        batch_size=256,
        epochs=1,
        eval_every=1000,
        save_every=500,
        preview_every=1000,
    )
