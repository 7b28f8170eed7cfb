"""A ladder of small VARs of depth 2 to 10, to fit a scaling law on your own images.

    python train.py --config=configs/small_tokenizer.py:data=idx:DIR
    varjax cache-latents --config=configs/small.py:data=idx:DIR --out=runs/tokens
    for d in 2 3 4 5 6 7 8 9 10; do
        python train.py --config=configs/ladder.py:d=$d,data=latents:runs/tokens,tokenizer=RUN
    done
    varjax scaling runs/ladder_d* --out=scaling

RUN is the run of the tokenizer. Every size sees each image once, in the same order. Depth sets
the size by the rule of the VAR paper (width 64 d, d heads), with a quarter of its width: 16 d. So
N = 4,608 d³ parameters in the layers, 37 k to 4.6 M, which is a factor of 125. Other settings are
those of configs/small.py, without EMA weights, which lag behind in short runs. docs/scaling.md
has the results on Fashion-MNIST.

60,000 images of 28 pixels, on one of two busy CPU cores: 34 minutes for d=7. On two free cores,
half an hour for d=10 and an hour and a half for all nine (estimates).
"""

from varjax.data.sources import parse_dataset
from varjax.errors import InputError
from varjax.models import read_tokenizer_config
from varjax.nn.compute import ComputeConfig
from varjax.tokenizers.vq.model import VQConfig
from varjax.training.experiment import Experiment
from varjax.training.optimizer import AdamW
from varjax.var.model import VARConfig
from varjax.var.sample import VAROptions
from varjax.var.task import VARTask

from ._arguments import COMMA_HINT, split_words

DEPTHS = range(2, 11)
CHANNELS_OF_HEAD = 16  # 64 in the paper


def get_config(arg: str = "") -> Experiment:
    settings = {name: value for name, _, value in (w.partition("=") for w in split_words(arg))}
    depths = [str(depth) for depth in DEPTHS]
    if settings.keys() != {"d", "data", "tokenizer"} or settings["d"] not in depths:
        raise InputError(
            f"cannot read {arg!r}; give d={depths[0]} … {depths[-1]}, data and tokenizer, as in "
            f"configs/ladder.py:d=4,data=latents:runs/tokens,tokenizer=runs/tokenizer{COMMA_HINT}"
        )
    depth = int(settings["d"])
    tokenizer = read_tokenizer_config(settings["tokenizer"])
    if not isinstance(tokenizer, VQConfig):
        raise InputError(
            f"tokenizer={settings['tokenizer']} has a {type(tokenizer).__name__}; VAR needs the "
            "token maps of a VQ tokenizer"
        )
    height, width, channels = tokenizer.image_shape
    data = parse_dataset(settings["data"], (height, width), channels)
    model = VARConfig(
        depth=depth,
        width=CHANNELS_OF_HEAD * depth,
        heads=depth,
        classes=data.classes,
        scales=tokenizer.scales,
        vocab=tokenizer.vocab,
        code_channels=tokenizer.code_channels,
        gate_init=1e-2,
    )
    return Experiment(
        task=VARTask(
            model=model,
            tokenizer=tokenizer,
            tokenizer_weights=settings["tokenizer"],
            optimizer=AdamW(base_lr=6e-3, schedule="cos", warmup=0.05),
            compute=ComputeConfig(unroll=True),
            sampling=VAROptions(guidance=2.0, top_k=0, top_p=0.0),
        ),
        data=data,
        run_dir=f"runs/ladder_d{depth}",
        batch_size=64,
        epochs=1,
        eval_every=100,
        eval_images=2000,  # each evaluation then costs a tenth of the steps between two
        save_every=500,
    )
