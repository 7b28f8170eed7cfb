"""A masked autoregressive transformer (MAR) that draws your own small images by class.

    python train.py --config=configs/small_kl_tokenizer.py:data=idx:DIR    # first: the tokenizer
    python train.py --config=configs/small_mar.py:data=idx:DIR
    python sample.py --weights=runs/DIR_28_mar --labels=all

The text after the colon is that of configs/small.py, and optionally an order (one of the first
three words) and a kind of token (one of the last two). The six combinations, with VAR, are the rows
of docs/comparison.md:

    masked       several tokens a step, in a random order (MAR; the default)
    random       one token a step, in a random order, causal attention
    raster       one token a step, row by row, causal attention
    continuous   tokens are latents of the KL tokenizer, drawn by diffusion (the default)
    codes        tokens are codes of configs/small_tokenizer.py:…,single_scale, drawn from a softmax

At 28 pixels, the transformer has 3 + 3 layers (over codes 4 + 4) of width 192 and about as many
parameters as configs/small.py's. The rules are in configs/_small_mar.py. Two CPU cores: about 35
minutes (1,500 steps at 47 images/s), 2 GB.
"""

import dataclasses

from varjax.training.experiment import Experiment

from ._arguments import exclusive_word
from ._small import small_tokenizer
from ._small_data import read_small_run
from ._small_mar import ORDERS, TOKENS, small_kl_tokenizer, small_mar


def get_config(arg: str = "") -> Experiment:
    run = read_small_run(arg, options=(*ORDERS, *TOKENS))
    order = exclusive_word(run.options, ORDERS) or "masked"
    codes = exclusive_word(run.options, TOKENS) == "codes"
    if codes:
        tokenizer_dir = run.tokenizer_run("tokenizer_single_scale")
        tokenizer_run = small_tokenizer(run.data, tokenizer_dir, single_scale=True)
    else:
        tokenizer_run = small_kl_tokenizer(run.data, run.tokenizer_run("kl_tokenizer"))
    parts = [f"runs/{run.name}_mar", *[order] * (order != "masked"), *["codes"] * codes]
    experiment = small_mar(run.data, tokenizer_run, "_".join(parts), order, run.quality)
    # A tokenizer that is named here is used also where init_from has another one.
    return dataclasses.replace(experiment, init_tokenizer=not run.tokenizer)
