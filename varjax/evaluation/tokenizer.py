"""Measures a tokenizer's reconstructions of held-out images: figures and pictures.

varjax evaluate-tokenizer --weights=DIR --data=folder:/data/images [--inception=DIR] [--out=DIR]
varjax evaluate-tokenizer --weights=DIR --data=idx:/data/fashion --features=CLASSIFIER

The metrics cover the whole held-out split and do not depend on the batch size:

psnr        in dB, mean over images         sharpness   mean gradient of the reconstructions
ssim        with an 11×11 Gaussian window               divided by that of the originals
l1          for values in [0, 1]            lpips       with --lpips=DIR (docs/convert.md)

With --inception=DIR (docs/evaluation.md): rFID, sFID, Inception Score, precision, recall and KID of
the reconstructions, against the held-out images, cropped as for the tokenizer. For small images,
--features=DIR of a classifier (varjax train-classifier) measures them in its features, and how many
reconstructions it still classifies correctly.

For a VQ tokenizer: same_in_bfloat16, _tf32, _bfloat16_3x and _tf32_3x, the fraction of tokens that
do not change if the encoder multiplies in that precision. After each scale: psnr; rest, the
fraction of the features' squares that is still missing; the perplexity of the codes; the number of
codes used; and that number divided by the largest possible one (the vocabulary size or the number
of tokens).

For a KL tokenizer: kl of an image's latents; posterior_std, the mean of their standard deviations;
latent_std, the standard deviation of samples of all latents; latent_scale, 1 / latent_std;
stored_latent_std, the value stored with the weights.

DIR gets evaluation.json, scales.png (held-out images, each above its reconstruction, or above those
from its first 1 … K scales) and worst.png (lowest PSNR: original, reconstruction, difference). A
DIR with the report of another tokenizer, or of other images or metrics, is refused.
"""

import argparse
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from varjax import trees
from varjax.checkpoints.weights import WeightsDir
from varjax.config import config_tree
from varjax.data.sources import Folder, dataset_of_command
from varjax.errors import InputError
from varjax.evaluation.image_crop import (
    AUTO,
    CROP_HELP,
    CROPS,
    choose_crop,
    describe_crop,
)
from varjax.metrics.features import (
    FeatureArrays,
    FeatureExtractor,
    FeatureNetwork,
    feature_network,
    feature_sizes,
)
from varjax.metrics.references import reference_of_features
from varjax.metrics.report import SampleMetrics, add_label_accuracy, measure, metrics_table
from varjax.models import open_model, read_tokenizer
from varjax.runtime.commands import command_parser, run_command
from varjax.runtime.compilation_cache import use_compilation_cache
from varjax.runtime.messages import say
from varjax.storage import files, image_io
from varjax.storage.buckets import as_path
from varjax.storage.captioned_grid import Captions, captioned_grid
from varjax.storage.folders import check_same_request, check_writable
from varjax.tokenizers.contract import check_image_shape
from varjax.tokenizers.losses.lpips import check_lpips_images, load_lpips
from varjax.tokenizers.reconstruction_metrics import (
    Reconstruction,
    measure_split,
    report_lines,
)
from varjax.training.previews import reconstruction_names

REPORT, SCALES_PICTURE, WORST_PICTURE = "evaluation.json", "scales.png", "worst.png"
PICTURES = 8  # columns of both pictures


def evaluate_tokenizer(
    weights: str,
    data: str,
    out: str,
    batch_size: int = 32,
    ema: bool | None = None,
    lpips: str = "",
    inception: str = "",
    features: str = "",
    crop: str = AUTO,
) -> dict[str, Any]:
    """Measures all held-out images, and writes evaluation.json, scales.png and worst.png.

    Args:
        weights: location of the tokenizer; see `load_tokenizer`.
        data: dataset of the images, as on the command line: "folder:DIR,held_out=0.1".
        out: folder of the three output files.
        batch_size: images at a time, over all devices.
        ema: True evaluates a run's EMA weights, False the others; None chooses as
            `restore_weights` does.
        lpips: directory of LPIPS's weights; "" to skip LPIPS.
        inception: directory of Inception's weights, for FID; "" for none.
        features: directory of a classifier, or "pixels", for FID in other features; "" for
            Inception's; give `inception` or this. With neither, FID is skipped.
        crop: kind of crop of photographs, as `choose_crop` takes it.

    Returns:
        The data of evaluation.json.

    Raises:
        InputError: the request is invalid, or `out` has the report of another one; raised before
            any long work.
    """
    directory = open_model(weights)
    config, params = read_tokenizer(directory, ema)
    dataset_crop = choose_crop(crop, directory)
    images = dataset_of_command(data, config.image_shape[:2], config.image_channels, dataset_crop)
    check_image_shape(config, images.image_shape)
    if isinstance(images, Folder):
        images.check_outside("out", out)
    say_other_splits(directory, images)
    lpips_params = None
    if lpips:
        check_lpips_images(config.image_shape)
        lpips_params = load_lpips(lpips)
    pairs = None
    if inception or features:
        network = feature_network(features or "inception", inception)
        feature_sizes(network, config.image_shape)  # refuses images without features
        pairs = FeaturePairs(network, images.classes)
    loader = images.make(batch_size, 0)
    count = len(loader.held_out_source)
    if pairs is not None and count < 2:
        raise InputError(f"{data} has {count} held-out images; FID needs two or more")
    request = {
        **config.identity(params),
        "images": {"kind": type(images).__name__} | images.describe()["held_out"],
        "crop": dataset_crop,
        "lpips": trees.digest(lpips_params) if lpips else None,
        **(pairs.network.identity if pairs is not None else {}),
    }
    folder = as_path(out)
    _check_report(folder, request)
    check_writable(folder)
    with tqdm(total=count, unit=" images", file=sys.stderr, disable=None) as bar:

        def progress(batches):
            for batch in batches:
                yield batch
                bar.update(int(batch["valid_B"].sum()))

        show = set(np.linspace(0, count - 1, min(PICTURES, count)).astype(int).tolist())
        add = None if pairs is None else pairs.add
        split = measure_split(config, params, loader, lpips_params, show, PICTURES, progress, add)
    report = {"weights": str(weights), "data": data, "crop": describe_crop(data, dataset_crop)}
    report |= split.summary()
    if pairs is not None:
        measured = pairs.measure()
        report |= {"reconstructions": measured.metrics, "left_out": measured.left_out}
        report |= {"notices": measured.notices}
        report["reconstructions_against"] = "the same held-out images, cropped alike"
        report["features"] = pairs.network.identity["features"]
    report["request"] = request
    files.write_json(folder / REPORT, report)
    title = f"{weights} · held-out images of {data}"
    image_io.write_png(folder / SCALES_PICTURE, scales_picture(split.shown, title))
    image_io.write_png(folder / WORST_PICTURE, worst_picture(split.worst, f"{title} · the worst"))
    return report


def _check_report(folder: pathlib.Path, request: Mapping[str, Any]) -> None:
    """Raises InputError if a report of another tokenizer, other images or metrics would be lost.

    So would pictures without a report, which is written before them.
    """
    path = folder / REPORT
    if not path.exists():
        if pictures := [x for x in (SCALES_PICTURE, WORST_PICTURE) if (folder / x).exists()]:
            raise InputError(
                f"{folder} has {' and '.join(pictures)} and no {REPORT}, so they are of something "
                "else; move them, or choose another out"
            )
        return
    existing = files.read_json(path).get("request")
    if not isinstance(existing, dict):  # older versions did not say what they had measured
        raise InputError(
            f"{path} exists, and does not say which weights were measured; delete it, or choose "
            "another out"
        )
    check_same_request(path, existing, request)


def say_other_splits(weights: WeightsDir, data: Any) -> None:
    """Prints a note if a run was trained on other splits of the same dataset."""
    run, here = weights.config.get("data"), config_tree.to_dict(data)
    if not isinstance(run, dict) or run.get("_type") != type(data).__name__:
        return
    if any(run.get(name) != here.get(name) for name in ("root", "name")):
        return
    names = [n for n in ("train", "held_out") if n in run and n in here and run[n] != here[n]]
    if names:
        splits = ", ".join(f"{name}={run[name]}" for name in names)
        say(
            f"note: {weights.path} was trained with {splits}, so some of the images that are held "
            "out here may be among its training images; give its splits after the dataset's name"
        )


class FeaturePairs:
    """Keeps the features of images and of their reconstructions, to compare them as sets.

    Args:
        network: network that computes the features.
        classes: number of the images' classes.
    """

    def __init__(self, network: FeatureNetwork, classes: int):
        self.network, self._classes = network, classes
        self._extract = FeatureExtractor(network)
        self._pairs: list[tuple[FeatureArrays, FeatureArrays]] = []
        self._labels: list[np.ndarray] = []

    def add(self, images_NHWC: np.ndarray, rebuilt_NHWC: np.ndarray, label_N: np.ndarray) -> None:
        """Adds uint8 images, their reconstructions and their classes."""
        self._pairs.append((self._extract(images_NHWC), self._extract(rebuilt_NHWC)))
        self._labels.append(label_N)

    def measure(self) -> SampleMetrics:
        """Measures the reconstructions against the images; InputError for fewer than two."""
        originals, rebuilt = (
            {name: np.concatenate([features[name] for features in side]) for name in side[0]}
            for side in zip(*self._pairs, strict=True)
        )
        # Held-out images are sorted by class, but the Inception Score needs them mixed.
        order_N = np.random.default_rng(0).permutation(len(rebuilt["pool_ND"]))
        rebuilt = {name: x[order_N] for name, x in rebuilt.items()}
        measured = measure(rebuilt, reference_of_features(originals))
        label_N = np.concatenate(self._labels)[order_N]
        add_label_accuracy(measured, rebuilt, label_N, self._classes, self.network.classes)
        return measured


def scales_picture(shown: Sequence[Reconstruction], title: str) -> np.ndarray:
    """Draws a column for each image: the original, and below it the image after each scale."""
    rows = np.stack([reconstruction.rows for reconstruction in shown], axis=1)
    captions = Captions(title, rows=reconstruction_names(len(rows)))
    return captioned_grid(rows.reshape(-1, *rows.shape[2:]), captions, columns=len(shown))


def worst_picture(shown: Sequence[Reconstruction], title: str) -> np.ndarray:
    """Draws a column for each image: original, reconstruction, and their difference (× 4)."""
    originals = np.stack([reconstruction.rows[0] for reconstruction in shown])
    rebuilt = np.stack([reconstruction.rows[-1] for reconstruction in shown])
    errors = 4 * np.abs(originals.astype(int) - rebuilt)
    rows = np.concatenate([originals, rebuilt, np.minimum(errors, 255).astype(np.uint8)])
    names = "original", "reconstruction", "4 x difference"
    columns = [f"{reconstruction.psnr:.1f} dB" for reconstruction in shown]
    return captioned_grid(rows, Captions(title, names, columns), columns=len(shown))


def report_table(report: dict[str, Any]) -> str:
    """Formats the report as text."""
    cropped = f", {report['crop']}" if report["crop"] else ""
    first = f"{report['images']:,} held-out images of {report['data']}{cropped}"
    lines = [first, *report_lines(report)]
    if "reconstructions" in report:
        lines += ["", f"reconstructions against {report['reconstructions_against']};"]
        lines += [f"features: {report['features']}"]
        lines.append(
            metrics_table(
                SampleMetrics(report["reconstructions"], report["left_out"], report["notices"])
            )
        )
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    parser = command_parser("varjax evaluate-tokenizer", __doc__)
    add = parser.add_argument
    add("--weights", required=True, help="training run or converted directory")
    datasets = "folder:PATH, idx:PATH, tfds:NAME, photos, digits or random"
    fields = "fields may follow, as in folder:PATH,held_out=0.1"
    add("--data", required=True, help=f"dataset: {datasets}; {fields}")
    add("--out", help="folder for the results (evaluation/NAME, by the name of the weights)")
    add("--batch_size", type=int, default=32, help="images at a time, over all devices (32)")
    add("--ema", action=argparse.BooleanOptionalAction, help="use a run's EMA weights")
    add("--lpips", default="", metavar="DIR", help="converted weights of LPIPS")
    add("--inception", default="", metavar="DIR", help="converted weights of Inception")
    add("--features", default="", metavar="DIR", help="directory of a classifier, or pixels")
    add("--crop", default=AUTO, choices=(AUTO, *CROPS), help=CROP_HELP)
    flags = parser.parse_args(arguments)

    def action():
        if flags.out is None:
            flags.out = os.path.join("evaluation", pathlib.PurePath(flags.weights).name)
        print(report_table(evaluate_tokenizer(**vars(flags))))

    use_compilation_cache()
    message = "stopped; nothing was written"
    return run_command("varjax evaluate-tokenizer", action, interrupted=message)
