"""Runs the tokenizer of a config over its images once, so that training reads latents instead.

varjax cache-latents --config=FILE.py[:ARGUMENT] --out=DIR [--augmentations=10]

A KL tokenizer's latents are stored as means and standard deviations, from which training draws new
samples in each epoch. --dtype=float16 halves their size, and prints the rounding errors.

To train on the latents, use `data=latents:DIR`, or CachedLatents("DIR") in a config. As for
train.py, --config.FIELD=VALUE changes fields of the config. If the command is interrupted, run it
again to continue; when everything is done, it does nothing. Several processes can share the work
without exchanging data: use --distributed if JAX finds them automatically, otherwise
--processes=COUNT --process=NUMBER.
"""

from collections.abc import Mapping
from typing import Any, Literal, get_args

import jax

from varjax import trees
from varjax.checkpoints.weights import frozen_tokenizer
from varjax.cli.train import with_named_tokenizer
from varjax.config import config_tree
from varjax.config.config_flags import add_config_flags, config_from_flags
from varjax.config.numbers import seed_number, whole_number
from varjax.convert.pretrained import resolve_weights
from varjax.data.latent_shards import (
    ABOUT_FILE,
    EncodeBatch,
    LatentShard,
    spec_to_json,
    write_shards,
)
from varjax.data.latents import CachedLatents
from varjax.data.loader import make_loader
from varjax.data.sources import Folder
from varjax.data.stream import LOCATION_FIELDS, MAX_AUGMENTATIONS, ImageDataset
from varjax.errors import InputError, check_setting
from varjax.runtime.commands import command_parser, run_command
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.runtime.data_parallel import batch_mesh, data_parallel, replicate
from varjax.runtime.distributed import add_process_flags, connect_by_flags
from varjax.runtime.first_call import FirstCall, announce_compilation
from varjax.storage import folders
from varjax.storage.buckets import as_path
from varjax.tokenizers.contract import Tokenizer
from varjax.trees import PyTree

IMAGES_PER_SHARD = 4096
IMAGES_PER_DEVICE = 32  # in a batch
FloatDtype = Literal["float16", "float32"]

INTERRUPTED = "stopped; run the same command again to continue"


def cache_latents(
    task: Any,
    data: ImageDataset,
    seed: int,
    batch_size: int,
    out: str,
    augmentations: int | None = None,
    shards: int = 0,
    process: tuple[int, int] = (0, 1),
    dtype: FloatDtype | None = None,
) -> str:
    """Fills the folder `out` with latents, or continues an interrupted call.

    The latents depend on task, data and seed. Batch size and devices change only their rounding.

    Args:
        task: task of a transformer (VARTask, MARTask), whose tokenizer encodes the images.
        data: dataset of the images.
        seed: random seed. Augmentation e of an image is the one that a run with this seed shows in
            epoch e.
        batch_size: images in a batch, over all devices of this process.
        out: folder to write, for `CachedLatents`.
        augmentations: number of augmentations of each training image. None for the fewest that show
            both flips of a center crop, or 1 if flips do not alternate. Held-out images are not
            augmented.
        shards: number of files of the training split; 0 for one per 4,096 images.
        process: (index, count) of the processes that divide the work.
        dtype: dtype of stored floats; None for the tokenizer's.

    Returns:
        A summary in a few lines, with the rounding errors of `dtype`.

    Raises:
        InputError: invalid settings, or `out` was started with other settings.
    """
    index, count = process
    seed_number("seed", seed)
    whole_number("shards", shards, 0, allowed="1 or more, or 0 to choose")
    if isinstance(data, CachedLatents):
        raise InputError(
            f"the config's data are already latents, in {data.root}; use a dataset of images"
        )
    if isinstance(data, Folder):
        data.check_outside("out", as_path(out))
    views = data.alternating_views
    augmentations = views if augmentations is None else augmentations
    valid = augmentations >= 1 and augmentations % views == 0
    allowed = (
        "1 or more" if views == 1 else f"a multiple of {views}, because flips alternate by epoch"
    )
    whole_number("augmentations", augmentations, 1, MAX_AUGMENTATIONS, allowed)
    check_setting("augmentations", augmentations, valid, allowed)
    devices = len(jax.local_devices())
    valid = batch_size > 0 and batch_size % devices == 0
    allowed = f"a multiple of this process's {devices} devices"
    check_setting("batch_size", batch_size, valid, allowed)
    tokenizer_params = frozen_tokenizer(task.frozen())
    if not (tokenizer_identity := task.tokenizer_identity(tokenizer_params)):
        raise InputError(f"{type(task).__name__} trains on images; use the config of a transformer")
    if bad := trees.nonfinite(tokenizer_params):  # tokens, which are integers, would not reveal it
        raise InputError(
            f"the tokenizer's weights contain NaN or infinity ({', '.join(bad[:3])}); use an "
            "earlier checkpoint, or train or convert the tokenizer again"
        )
    if data.image_shape != task.tokenizer.image_shape:
        raise InputError(
            f"the dataset has images of {data.image_shape}, but the tokenizer needs "
            f"{task.tokenizer.image_shape}"
        )
    loader = make_loader(data, batch_size, seed)
    images = {"train": len(loader.train_source), "held_out": len(loader.held_out_source)}
    fields = {k: v for k, v in config_tree.to_dict(data).items() if k not in LOCATION_FIELDS}
    description = data.describe()
    pixels = description.pop("pixels", None)
    about = {
        "tokenizer_identity": tokenizer_identity,
        "latent_spec": spec_to_json(task.tokenizer.latent_spec, dtype),
        "data": description,
        "settings": {"kind": type(data).__name__} | fields,
        "classes": data.classes,
        "image_shape": list(data.image_shape),
        "seed": seed,
        "images": images,
        "augmentations": {"train": augmentations, "held_out": 1},
        "shards": {split: _shards(images, split, shards) for split in images},
        "pixels": pixels,
    }
    path = as_path(out)
    folders.claim_folder(path, ABOUT_FILE, about)
    all_shards = LatentShard.all(path, about)
    lines = []
    if unwritten := [shard for shard in all_shards[index::count] if not shard.path.exists()]:
        encode = _encoder(task.tokenizer, tokenizer_params)
        for name, error in write_shards(unwritten, loader, encode).items():
            stored = about["latent_spec"][name]["dtype"]
            lines.append(
                f"{name} as {stored}: the largest error is {error.absolute:.2g}, or "
                f"{error.relative:.2g} relative to the number"
            )
    if missing := sum(not shard.path.exists() for shard in all_shards):
        lines.append(
            f"{out}: this process is done; {missing} of {len(all_shards)} files are missing"
        )
    else:
        lines.append(
            f"{out} is complete: latents of {augmentations} augmentations of {images['train']} "
            f"images, and of {images['held_out']} held-out images"
        )
    return "\n".join(lines)


def _encoder(tokenizer: Tokenizer, params: PyTree) -> EncodeBatch:
    """Returns a function that encodes uint8 images on all devices of this process."""
    mesh = batch_mesh()
    params = replicate(params, mesh)
    encode = data_parallel(lambda params, _, images: tokenizer.encode(params, images), mesh)
    encode = FirstCall(encode, lambda: announce_compilation("the tokenizer's encoder"))
    return lambda image_BHWC: encode(params, None, image_BHWC)


def _shards(images: Mapping[str, int], split: str, train_shards: int) -> int:
    per_shard = images["train"] / train_shards if train_shards else IMAGES_PER_SHARD
    return min(images[split], max(1, round(images[split] / per_shard)))


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = command_parser("varjax cache-latents", __doc__)
    add_config_flags(parser)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder for the latents")
    add(
        "--augmentations",
        type=int,
        help="augmentations of each training image (1; 2 if center crops are flipped)",
    )
    add("--batch_size", type=int, default=0, help="images in a batch (32 per device)")
    add("--shards", type=int, default=0, help="number of training files (one per 4,096 images)")
    add(
        "--dtype",
        choices=get_args(FloatDtype),
        help="dtype of stored floats (the tokenizer's)",
    )
    add_process_flags(parser)

    def action() -> None:
        flags, experiment = config_from_flags(parser, arguments)
        process = connect_by_flags(flags, communicate=False)
        use_compilation_cache()
        if experiment.init_from:
            resolve_weights(experiment.init_from)
        task = with_named_tokenizer(experiment, arguments).with_init_tokenizer().task
        if tokenizer := config_tree.to_dict(task).get("tokenizer_weights"):
            resolve_weights(tokenizer)
        summary = cache_latents(
            task,
            experiment.data,
            experiment.seed,
            batch_size=flags.batch_size or IMAGES_PER_DEVICE * len(jax.local_devices()),
            out=flags.out,
            augmentations=flags.augmentations,
            shards=flags.shards,
            process=process,
            dtype=flags.dtype,
        )
        print(summary)

    return run_command("varjax cache-latents", action, interrupted=INTERRUPTED)
