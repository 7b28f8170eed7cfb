"""A multi-scale tokenizer for your own small images, 8 to 64 pixels, gray or color.

    python train.py --config=configs/small_tokenizer.py:data=folder:DIR,size=28
    python train.py --config=configs/small.py:data=folder:DIR,size=28    # then: the transformer

DIR holds images in a folder for each class, or without classes; docs/data.md lists other kinds of
data. Images are resized to `size` pixels a side: an even number up to 16, a multiple of 4 up to 32,
and of 8 up to 64. The files determine whether images are gray. Scales, codebook and length of the
run follow from the size by the rules of configs/_small.py: 28 pixels become 104 tokens at 6 scales
in 1,200 steps. `,held_out=0.3` holds out more than 5 % of a small folder without val/. Write a
comma in a path as `\\,`.

Two CPU cores, 28 pixels: about 10 minutes, 2 GB. 4,500 handwritten digits: eval/psnr 26.6.
"""

from varjax.training.experiment import Experiment

from ._small import small_dataset, small_tokenizer


def get_config(arg: str = "") -> Experiment:
    data, name = small_dataset(arg)
    return small_tokenizer(data, run_dir=f"runs/{name}_tokenizer")
