"""A masked autoregressive transformer for handwritten digits, over configs/digits_kl_tokenizer.py.

    python train.py --config=configs/digits_mar.py

The tokenizer must be trained first. Two CPU cores: 7 minutes, 2 GB. Expected at the end:
eval_ema/loss 0.261; `make demo-mar` reports on the samples. After the colon, separated by commas:
one of the first three and one of the last two, which are the rows of docs/comparison.md.

    masked       several tokens a step, in a random order (MAR; the default)
    random       one token a step, in a random order, causal attention
    raster       one token a step, row by row, causal attention
    continuous   tokens are latents of the KL tokenizer, drawn by diffusion (the default)
    codes        tokens are codes of configs/digits_tokenizer.py:single_scale, drawn from a softmax
"""

import dataclasses

from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.mar.heads import CategoricalHead, DiffusionHead
from varjax.mar.model import MARConfig
from varjax.mar.sample import MAROptions
from varjax.mar.task import MARTask
from varjax.nn.compute import ComputeConfig
from varjax.tokenizers.kl.task import KLTask
from varjax.tokenizers.vq.model import VQConfig
from varjax.tokenizers.vq.task import VQTask
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW

from . import digits_kl_tokenizer, digits_tokenizer
from ._arguments import exclusive_word
from ._small_mar import ORDERS, TOKENS


def get_config(arg: str = "masked,continuous") -> Experiment:
    words = arg.split(",")
    if unknown := [word for word in words if word not in (*ORDERS, *TOKENS)]:
        raise InputError(f"cannot read {unknown}; allowed are {', '.join((*ORDERS, *TOKENS))}")
    order = exclusive_word(words, ORDERS) or "masked"
    codes = exclusive_word(words, TOKENS) == "codes"
    tokenizer_run = (
        digits_tokenizer.get_config("single_scale") if codes else digits_kl_tokenizer.get_config()
    )
    assert isinstance(tokenizer_run.task, KLTask | VQTask)
    tokenizer = tokenizer_run.task.model
    # After a short run, samples are too alike; a temperature above 1 makes up for some of it.
    temperature = 1.0 if codes else 1.1
    sampling = MAROptions(
        guidance=1.5,
        temperature=temperature,
        steps=8,
        diffusion_steps="100",
        clip_denoised=4.0,
    )
    if isinstance(tokenizer, VQConfig):
        head, latent_map = CategoricalHead(tokenizer.vocab), tokenizer.pyramid.finest
    else:
        h, w, channels = tokenizer.latent_shape
        latent_map, head = (h, w), DiffusionHead(channels=channels, depth=2, width=128)
    model = MARConfig(
        width=96,
        encoder_depth=1,
        decoder_depth=1,
        encoder_heads=4,
        decoder_heads=4,
        head=head,
        classes=10,
        latent_map=latent_map,
        buffer_size=4,
        embed_init=0.5,
    )
    parts = ["runs/digits_mar", *[order] * (order != "masked"), *["codes"] * codes]
    return Experiment(
        task=MARTask(
            model=dataclasses.replace(model, **ORDERS[order]),
            tokenizer=tokenizer,
            tokenizer_weights=tokenizer_run.run_dir,
            optimizer=AdamW(base_lr=4e-3, weight_decay=0.02, clip=3.0, schedule="cos", warmup=0.05),
            attention_dropout=0.0,
            dropout=0.0,
            min_mask_ratio=0.1,
            diffusion_batch_mul=2,
            ema_decay=0.99,
            compute=ComputeConfig(attention_impl="xla", unroll=True),
            sampling=sampling,
        ),
        data=Digits(shift=0.15, rotate=3.0, zoom=0.03),
        run_dir="_".join(parts),
        batch_size=128,
        steps=1500,
        eval_every=500,
        eval_images=2000,  # more than there are
        save_every=500,
        preview_every=750,
    )
