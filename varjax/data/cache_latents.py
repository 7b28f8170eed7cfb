"""Runs the tokenizer of a config over its images once, so that training reads tokens instead.

python -m varjax.data.cache_latents --config=FILE.py[:ARGUMENT] --out=DIR [--augmentations=10]

`data=tokens:DIR` (or Tokens("DIR") in a config) then trains on them. Settings of the config are
changed by --config.FIELD=VALUE, as for train.py. The same command goes on after a kill, and does
nothing when all is done. Several processes share the work: --distributed where JAX finds them by
itself, else --processes=COUNT --process=NUMBER.
"""

import argparse
import pathlib
import sys
from collections.abc import Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from varjax.core import config_tree
from varjax.core.errors import InputError
from varjax.data.latent_shards import Encode, Shard, begin, fill
from varjax.data.latents import Tokens
from varjax.data.loader import Loader
from varjax.data.stream import Dataset

IN_SHARD = 4096  # images
WHERE = ("reading", "root", "name", "data_dir")  # fields that do not tell which images there are


class Tokenizer(Protocol):
    """The settings of one: the number of its codes, and the images that it takes."""

    @property
    def vocab(self) -> int: ...

    @property
    def image_shape(self) -> tuple[int, int, int]: ...


class Task(Protocol):
    """What trains on tokens."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def frozen(self) -> Any:
        """The tokenizer's weights."""
        ...

    def tokenized_by(self, frozen: Any) -> dict[str, Any]:
        """What tells two tokenizers apart, as flat JSON data; {} where the task takes no tokens."""
        ...

    def tokens(self, frozen: Any, image_BHWC: jax.Array) -> jax.Array:
        """uint8 images -> (B, L) int32."""
        ...


class Data(Dataset, Protocol):
    """Images to make tokens of."""

    def make(self, batch_size: int, seed: int) -> Loader: ...

    def describe(self) -> dict[str, Any]: ...


def tokenize(
    task: Task,
    data: Data,
    seed: int,
    batch_size: int,
    out: str,
    augmentations: int = 1,
    shards: int = 0,
    process: tuple[int, int] = (0, 1),
) -> str:
    """Fills `out`, or what is left of it; returns a line that sums it up.

    Augmentation e of an image is the one that epoch e of a training run with this seed shows; of
    the held-out images there is one view. batch_size: images at a time on all devices of this
    process. shards: files of the training split, 0 for one per 4,096 images. process: (number,
    count) of those that share the work.

    Tokens do not depend on anything but task, data, seed and, by rounding, batch_size and devices.
    Raises InputError for settings without sense, and where `out` holds other tokens.
    """
    index, count = process
    if augmentations < 1 or shards < 0:
        raise InputError(
            f"augmentations is {augmentations}, shards {shards}; give 1 or more, shards may be 0"
        )
    if not 0 <= index < count:
        raise InputError(f"process {index} is none of {count}; they are numbered from 0")
    if isinstance(data, Tokens):
        raise InputError(f"the config's data are tokens already, in {data.root}; give its images")
    if batch_size < 1 or batch_size % len(jax.local_devices()):
        raise InputError(
            f"batch_size is {batch_size}, but must be a multiple of the {len(jax.local_devices())} "
            "devices of this process"
        )
    frozen = task.frozen()
    if not (tokenized_by := task.tokenized_by(frozen)):
        raise InputError(f"a {type(task).__name__} trains on images; give a transformer's config")
    if data.image_shape != task.tokenizer.image_shape:
        raise InputError(
            f"the data's images are {data.image_shape}, but the tokenizer takes "
            f"{task.tokenizer.image_shape}"
        )
    loader = data.make(batch_size, seed)
    images = {"train": len(loader.train_source), "held_out": len(loader.held_out_source)}
    used = {k: v for k, v in config_tree.to_dict(data).items() if k not in WHERE}
    shape = jax.ShapeDtypeStruct((batch_size, *data.image_shape), np.uint8)
    about = {
        "tokenized_by": tokenized_by,
        "data": data.describe(),
        "settings": {"kind": type(data).__name__} | used,
        "classes": data.classes,
        "image_shape": list(data.image_shape),
        "seed": seed,
        "vocab": task.tokenizer.vocab,
        "length": jax.eval_shape(task.tokens, frozen, shape).shape[1],
        "images": images,
        "augmentations": {"train": augmentations, "held_out": 1},
        "shards": {split: _shards(images, split, shards) for split in images},
    }
    path = pathlib.Path(out)
    begin(path, about)
    shards_here = Shard.all(path, about)
    if mine := [shard for shard in shards_here[index::count] if not shard.path.exists()]:
        fill(mine, loader, _encoder(task, frozen))
    if missing := sum(not shard.path.exists() for shard in shards_here):
        return f"{out}: this process is done, {missing} of {len(shards_here)} files are missing"
    return (
        f"{out} is complete: tokens of {augmentations} augmentations of {images['train']} images, "
        f"and of {images['held_out']} held out"
    )


def _encoder(task: Task, frozen: Any) -> Encode:
    """uint8 images (B, H, W, C) -> (B, L), over all devices of this process."""
    mesh = Mesh(np.array(jax.local_devices()), ("data",))
    rows, everywhere = (NamedSharding(mesh, PartitionSpec(*a)) for a in (("data",), ()))
    frozen = jax.device_put(frozen, everywhere)
    tokens = jax.jit(task.tokens, in_shardings=(everywhere, rows), out_shardings=rows)
    return lambda image_BHWC: tokens(frozen, image_BHWC)


def _shards(images: Mapping[str, int], split: str, asked: int) -> int:
    per_shard = images["train"] / asked if asked else IN_SHARD
    return min(images[split], max(1, round(images[split] / per_shard)))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a transformer's")
    parser.add_argument("--out", required=True, help="the directory for the tokens")
    parser.add_argument("--augmentations", type=int, default=1, help="of each training image")
    parser.add_argument("--batch_size", type=int, default=0, help="0: the config's, shared")
    parser.add_argument("--shards", type=int, default=0, help="0: one per 4,096 images")
    parser.add_argument("--distributed", action="store_true", help="one of several processes")
    parser.add_argument("--processes", type=int, default=1, help="how many share the work")
    parser.add_argument("--process", type=int, default=0, help="the number of this one, from 0")
    flags, others = parser.parse_known_args(arguments)
    try:
        if strange := [o for o in others if not o.startswith("--config.")]:
            raise InputError(f"cannot read {strange}; settings are --config.FIELD=VALUE")
        experiment = config_tree.load_config(flags.config)
        experiment = config_tree.override(experiment, [o.removeprefix("--config.") for o in others])
        process = flags.process, flags.processes
        if flags.distributed:
            jax.distributed.initialize()
            process = jax.process_index(), jax.process_count()
        said = tokenize(
            experiment.task,
            experiment.data,
            experiment.seed,
            flags.batch_size or experiment.batch_size // process[1],
            flags.out,
            flags.augmentations,
            flags.shards,
            process,
        )
    except (ValueError, OSError) as error:
        print(f"varjax.data.cache_latents: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        return 130
    print(said)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
