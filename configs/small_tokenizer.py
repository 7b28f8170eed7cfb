"""A multi-scale tokenizer for your own small images, 8 to 64 pixels, gray or color.

    python train.py --config=configs/small_tokenizer.py:data=folder:DIR,size=28
    python train.py --config=configs/small.py:data=folder:DIR,size=28    # then: the transformer

    configs/small_tokenizer.py:data=idx:DIR        MNIST's files, 28 pixels as they are
    configs/small_tokenizer.py:…,quality=good      trains up to 10 times as long
    configs/small_tokenizer.py:…,held_out=0.3      holds out 30 % of a folder without val/, not 5 %
    configs/small_tokenizer.py:…,single_scale      one token map, for configs/small_mar.py:codes

DIR has a subfolder for each class, or just images; docs/data.md lists other kinds of data. Images
are resized to `size` pixels a side: an even number up to 16, a multiple of 4 up to 32, and of 8 up
to 64. The files determine whether images are gray. Write a comma in a path as `\\,`.

Scales, codebook and length of the run follow from the size and the number of images by the rules of
configs/_small.py: 28 pixels become 104 tokens at 6 scales in 1,200 steps, or fewer for fewer than
1,536 images.

Two CPU cores, 28 pixels: 10 to 20 minutes, 2 GB. 4,500 handwritten digits: eval/psnr 26.6.
"""

from varjax.training.experiment import Experiment

from ._small import small_tokenizer
from ._small_data import read_small_run


def get_config(arg: str = "") -> Experiment:
    run = read_small_run(arg, options=("single_scale",))
    single_scale = "single_scale" in run.options
    run_dir = f"runs/{run.name}_tokenizer" + "_single_scale" * single_scale
    return small_tokenizer(run.data, run_dir, run.quality, single_scale)
