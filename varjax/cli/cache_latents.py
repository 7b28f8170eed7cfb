"""Runs the tokenizer of a config over its images once, so that training reads latents instead.

varjax cache-latents --config=FILE.py[:ARGUMENT] --out=DIR [--augmentations=10]

A KL tokenizer's latents are stored as means and standard deviations, from which training draws new
samples in each epoch. --dtype=float16 halves their size, and the rounding errors are printed.

`data=latents:DIR` (or CachedLatents("DIR") in a config) then trains on them. --config.FIELD=VALUE
changes fields of the config, as for train.py. The command continues where it was interrupted if you
run it again, and does nothing when all is done. Several processes share the work, without
exchanging data: --distributed if JAX finds them automatically, else --processes=COUNT
--process=NUMBER.
"""

import sys
from collections.abc import Mapping
from typing import Any, Literal, Protocol, get_args

import jax

from varjax import trees
from varjax.config import config_tree
from varjax.config.config_flags import add_config_flags, config_from_flags
from varjax.config.numbers import seed_number, whole_number
from varjax.data.latent_shards import (
    ABOUT_FILE,
    EncodeBatch,
    LatentShard,
    ShapeAndDtype,
    spec_to_json,
    write_shards,
)
from varjax.data.latents import CachedLatents
from varjax.data.loader import make_loader
from varjax.data.stream import ImageDataset
from varjax.errors import InputError, check_setting
from varjax.runtime.commands import command_parser, run_command
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.runtime.data_parallel import batch_mesh, data_parallel, replicate
from varjax.runtime.distributed import add_process_flags, connect_by_flags
from varjax.storage import files, folders
from varjax.storage.buckets import as_path

IMAGES_PER_SHARD = 4096
MOST_AUGMENTATIONS = 10_000  # of which all rows are listed; no run has more epochs
IMAGES_PER_DEVICE = 32  # at a time
# Fields of a dataset that do not tell which images there are.
LOCATION_FIELDS = ("reading", "root", "name", "data_dir")
FloatDtype = Literal["float16", "float32"]

INTERRUPTED = "stopped; the same command goes on from here"


class LatentEncoder(Protocol):
    """Describes the part of a tokenizer (`varjax.tokenizers.contract`) that a cache needs."""

    @property
    def image_shape(self) -> tuple[int, int, int]: ...

    @property
    def latent_spec(self) -> Mapping[str, ShapeAndDtype]: ...

    def encode(self, params: Any, images_BHWC: jax.Array) -> dict[str, jax.Array]:
        """Encodes uint8 images into the arrays of `latent_spec`, each with a leading batch axis."""
        ...


class LatentTask(Protocol):
    """Describes the part of a latents' task (`varjax.training.task`) that a cache needs."""

    @property
    def tokenizer(self) -> LatentEncoder: ...

    def frozen(self) -> Any:
        """Returns the tokenizer's parameters."""
        ...

    def tokenizer_identity(self, frozen: Any) -> dict[str, Any]:
        """Returns flat JSON data of the tokenizer; {} where the task trains on images only."""
        ...


def cache_latents(
    task: LatentTask,
    data: ImageDataset,
    seed: int,
    batch_size: int,
    out: str,
    augmentations: int | None = None,
    shards: int = 0,
    process: tuple[int, int] = (0, 1),
    dtype: FloatDtype | None = None,
) -> str:
    """Fills the folder `out` with latents, or does what is left of that.

    They depend on nothing but task, data, seed and, by rounding, batch_size and devices.

    Args:
        task: task whose tokenizer encodes the images.
        data: dataset of the images.
        seed: random seed. Augmentation e of an image is the one that epoch e of a run with this
            seed shows.
        batch_size: images at a time on all devices of this process.
        out: folder to write, for `CachedLatents`.
        augmentations: number of augmentations of each training image. None for the fewest that show
            both flips of a center crop, or 1 if flips do not alternate. Held-out images have one
            view.
        shards: number of files of the training split; 0 for one per 4,096 images.
        process: (number, count) of the processes that divide the work.
        dtype: number format in which floats are stored; None for the tokenizer's.

    Returns:
        Lines that sum it up, with the error that `dtype` makes.

    Raises:
        InputError: settings without sense, or `out` was begun for another request.
    """
    index, count = process
    seed_number("seed", seed)
    whole_number("shards", shards, 0, allowed="1 or more, or 0 to choose")
    allowed = get_args(FloatDtype)
    check_setting("dtype", dtype, dtype in (None, *allowed), " or ".join(allowed))
    check_setting("process", index, 0 <= index < count, f"from 0 to {count - 1}")
    if isinstance(data, CachedLatents):
        raise InputError(f"the config's data are latents already, in {data.root}; give its images")
    views = data.alternating_views
    augmentations = views if augmentations is None else augmentations
    fits = augmentations >= 1 and augmentations % views == 0
    allowed = "1 or more" if views == 1 else f"a multiple of {views}, for flips alternate by epoch"
    whole_number("augmentations", augmentations, 1, MOST_AUGMENTATIONS, allowed)
    check_setting("augmentations", augmentations, fits, allowed)
    devices = len(jax.local_devices())
    fits = batch_size > 0 and batch_size % devices == 0
    check_setting("batch_size", batch_size, fits, f"a multiple of this process's {devices} devices")
    frozen = task.frozen()
    if not (tokenizer_identity := task.tokenizer_identity(frozen)):
        raise InputError(f"a {type(task).__name__} trains on images; give a transformer's config")
    if bad := trees.nonfinite(frozen):  # integers made by such weights would not show it
        raise InputError(
            f"the tokenizer's weights hold NaN or infinite numbers ({', '.join(bad[:3])}); take an "
            "earlier checkpoint of it, or train or convert it again"
        )
    if data.image_shape != task.tokenizer.image_shape:
        raise InputError(
            f"the data's images are {data.image_shape}, but the tokenizer takes "
            f"{task.tokenizer.image_shape}"
        )
    loader = make_loader(data, batch_size, seed)
    images = {"train": len(loader.train_source), "held_out": len(loader.held_out_source)}
    fields = {k: v for k, v in config_tree.to_dict(data).items() if k not in LOCATION_FIELDS}
    described = data.describe()
    pixels = described.pop("pixels", None)
    about = {
        "tokenizer_identity": tokenizer_identity,
        "latent_spec": spec_to_json(task.tokenizer.latent_spec, dtype),
        "data": described,
        "settings": {"kind": type(data).__name__} | fields,
        "classes": data.classes,
        "image_shape": list(data.image_shape),
        "seed": seed,
        "images": images,
        "augmentations": {"train": augmentations, "held_out": 1},
        "shards": {split: _shards(images, split, shards) for split in images},
    }
    path = as_path(out)
    # Older versions did not record it.
    if not (path / ABOUT_FILE).exists() or "pixels" in files.read_json(path / ABOUT_FILE):
        about["pixels"] = pixels
    folders.claim_folder(path, ABOUT_FILE, about)
    all_shards = LatentShard.all(path, about)
    lines = []
    if mine := [shard for shard in all_shards[index::count] if not shard.path.exists()]:
        for name, error in write_shards(mine, loader, _encoder(task.tokenizer, frozen)).items():
            stored = about["latent_spec"][name]["dtype"]
            lines.append(
                f"{name} as {stored}: off by at most {error.absolute:.2g}, {error.relative:.2g} of "
                "a number"
            )
    if missing := sum(not shard.path.exists() for shard in all_shards):
        said = f"{out}: this process is done, {missing} of {len(all_shards)} files are missing"
    else:
        said = (
            f"{out} is complete: latents of {augmentations} augmentations of {images['train']} "
            f"images, and of {images['held_out']} held out"
        )
    return "\n".join([*lines, said])


def _encoder(tokenizer: LatentEncoder, params: Any) -> EncodeBatch:
    """Encodes uint8 images over all devices of this process."""
    mesh = batch_mesh()
    params = replicate(params, mesh)
    encode = data_parallel(lambda params, _, images: tokenizer.encode(params, images), mesh)
    return lambda image_BHWC: encode(params, None, image_BHWC)


def _shards(images: Mapping[str, int], split: str, asked: int) -> int:
    per_shard = images["train"] / asked if asked else IMAGES_PER_SHARD
    return min(images[split], max(1, round(images[split] / per_shard)))


def main(arguments: list[str]) -> int:
    """Runs the command; returns its exit code."""
    parser = command_parser("varjax cache-latents", __doc__)
    add_config_flags(parser)
    add = parser.add_argument
    add("--out", required=True, metavar="DIR", help="folder for the latents")
    help = "views of each training image (1; 2 if center crops are flipped)"
    add("--augmentations", type=int, help=help)
    add("--batch_size", type=int, default=0, help="images at a time (32 per device)")
    add("--shards", type=int, default=0, help="number of training files (one per 4,096 images)")
    add(
        "--dtype",
        choices=get_args(FloatDtype),
        help="number format of stored floats (the tokenizer's)",
    )
    add_process_flags(parser)

    def action() -> None:
        flags, experiment = config_from_flags(parser, arguments)
        process = connect_by_flags(flags, communicate=False)
        use_compilation_cache()
        summary = cache_latents(
            experiment.task,
            experiment.data,
            experiment.seed,
            flags.batch_size or IMAGES_PER_DEVICE * len(jax.local_devices()),
            flags.out,
            flags.augmentations,
            flags.shards,
            process,
            flags.dtype,
        )
        print(summary)

    return run_command("varjax cache-latents", action, interrupted=INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
