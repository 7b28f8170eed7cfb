"""Reports the quality of the digits of `make demo` and `make demo-mar`, with pictures.

python -m varjax.evaluation.digits_report --run=runs/digits --samples=runs/digits/samples.npz
python -m varjax.evaluation.digits_report --run=runs/digits --samples seed0.npz seed1.npz seed2.npz

With several files, such as those of several seeds, metrics are means ± standard deviations.

The classifier is an SVM on the pixels, which trains in a tenth of a second. A network that
`varjax train-classifier` makes would take longer and recognize no more digits.
"""

import pathlib
import sys
from collections.abc import Sequence

import numpy as np
from scipy.spatial.distance import cdist, pdist

from varjax.analysis.plot import draw_curves
from varjax.analysis.run_log import read_run_log
from varjax.data.sources import Digits
from varjax.errors import InputError
from varjax.metrics.fid import Moments, frechet_distance
from varjax.metrics.image_sets import NpzImages
from varjax.metrics.report import mean_and_deviation
from varjax.runtime.commands import command_parser, run_command
from varjax.storage import files, image_io
from varjax.storage.buckets import short_path
from varjax.storage.captioned_grid import Captions, captioned_grid
from varjax.storage.npz import NpzArchive

DIGIT_SIZE, CLASSES = (8, 8), 10
SHOWN = 10  # samples of each class in the picture


def digits_report(samples_NHWC: np.ndarray, label_N: np.ndarray) -> dict[str, dict[str, float]]:
    """Computes metrics of samples, and the same metrics of real held-out digits.

    Args:
        samples_NHWC: uint8, 8 by 8 gray.
        label_N: classes of the samples.

    Returns:
        {"samples": {name: value}, "real held-out digits": {name: value}}; names as in MEANINGS.
    """
    train, held_out = Digits().source("train"), Digits().source("held_out")
    x_NC, train_NC, held_NC = (
        images.reshape(len(images), -1) / 255.0
        for images in (samples_NHWC, train.images_NHWC, held_out.images_NHWC)
    )
    from sklearn.svm import SVC  # a second; the digits above need scikit-learn as well

    classifier = SVC(C=10).fit(train_NC, train.labels_N)
    train_diversity = class_diversity(train_NC, train.labels_N)
    return {
        "samples": {
            "label accuracy": float(classifier.score(x_NC, label_N)),
            "diversity": class_diversity(x_NC, label_N) / train_diversity,
            "copying": copying_fraction(x_NC, train_NC),
            "Fréchet distance": frechet_distance(Moments.of(x_NC), Moments.of(held_NC)),
        },
        "real held-out digits": {
            "label accuracy": float(classifier.score(held_NC, held_out.labels_N)),
            "diversity": class_diversity(held_NC, held_out.labels_N) / train_diversity,
            "copying": copying_fraction(held_NC, train_NC),
            "Fréchet distance": frechet_distance(Moments.of(train_NC), Moments.of(held_NC)),
        },
    }


MEANINGS = {
    "label accuracy": "fraction that a classifier of real digits assigns to the requested class",
    "diversity": "mean distance between two digits of a class, relative to real training digits",
    "copying": "fraction closer to its nearest training digit than any other training digit is",
    "Fréchet distance": "between Gaussians of the pixels of samples (real: of training digits) and "
    "of held-out digits",
}


def class_diversity(x_NC: np.ndarray, label_N: np.ndarray) -> float:
    """Computes the mean distance between two images of a class, averaged over the classes."""
    return float(np.mean([pdist(x_NC[label_N == label]).mean() for label in np.unique(label_N)]))


def copying_fraction(x_NC: np.ndarray, train_NC: np.ndarray) -> float:
    """Computes the fraction of images closer to a training image than any other training image."""
    within_NN = cdist(train_NC, train_NC)
    np.fill_diagonal(within_NN, np.inf)
    to_train_NN = cdist(x_NC, train_NC)
    nearest_N = to_train_NN.argmin(axis=1)
    return float(np.mean(to_train_NN.min(axis=1) < within_NN.min(axis=1)[nearest_N]))


def samples_and_real(samples_NHWC: np.ndarray, label_N: np.ndarray, title: str) -> np.ndarray:
    """Draws ten samples of each class in a row, and ten real digits to their right.

    Args:
        samples_NHWC: uint8, 8 by 8 gray.
        label_N: classes of the samples.
        title: text above the samples.
    """
    real = Digits().source("held_out")
    halves = []
    for images, labels, words in (
        (samples_NHWC, label_N, title),
        (real.images_NHWC, real.labels_N, "real held-out digits"),
    ):
        chosen = [images[labels == label][:SHOWN] for label in range(CLASSES)]
        captions = Captions(words, rows=[str(label) for label in range(CLASSES)])
        halves.append(captioned_grid(np.concatenate(chosen), captions, columns=SHOWN))
    return np.concatenate(halves, axis=1)


def read_samples(path: pathlib.Path) -> tuple[np.ndarray, np.ndarray]:
    """Reads images (N, 8, 8, 1), uint8, and their classes from an .npz.

    Raises InputError for images of another size, and for fewer than ten of a class, which the
    picture shows.
    """
    images = NpzImages(path)
    if images.shape[1:3] != DIGIT_SIZE:
        height, width = images.shape[1:3]
        raise InputError(f"{path} has images of {height}x{width} pixels; digits have 8x8")
    if images.label_N is None:
        raise InputError(f"{path} has no labels; use a file that varjax sample wrote")
    count_V = np.array([np.sum(images.label_N == label) for label in range(CLASSES)])
    if count_V.min() < SHOWN or count_V.sum() < images.shape[0]:
        raise InputError(
            f"{path} has {count_V.min()} to {count_V.max()} samples of the classes 0 to 9, and "
            f"{images.shape[0] - count_V.sum()} of others; {SHOWN} or more of each are needed "
            f"(varjax sample --count={SHOWN}), and no others"
        )
    return NpzArchive(path).read("arr_0")[..., :1], images.label_N


def write_report(
    run: pathlib.Path,
    tokenizer: pathlib.Path,
    samples: Sequence[pathlib.Path],
    compare: pathlib.Path | None = None,
) -> None:
    """Prints the report, and writes it and its pictures into the runs.

    Args:
        run: directory of the transformer's run.
        tokenizer: directory of the tokenizer's run.
        samples: .npz files written by `varjax sample`, such as one for each seed. The picture shows
            the first.
        compare: another run, whose report is also printed if it exists.

    Raises:
        InputError: the samples, or a metrics.jsonl of the runs, do not exist yet, or the samples
            are no digits; see `read_samples`.
    """
    for path in (*samples, run / "metrics.jsonl", tokenizer / "metrics.jsonl"):
        if not path.is_file():
            raise InputError(f"{path} does not exist; run make demo or make demo-mar")
    sets = [read_samples(path) for path in samples]
    tables = [digits_report(*images_and_labels) for images_and_labels in sets]
    means, deviations = mean_and_deviation([table["samples"] for table in tables])
    table = tables[0] | {"samples": means}
    if deviations:
        table["standard deviation"] = deviations
    files.write_json(run / "report.json", table)
    images_NHWC, label_N = sets[0]
    title = f"samples of {short_path(run)}"
    image_io.write_png(run / "samples.png", samples_and_real(images_NHWC, label_N, title))
    for directory in (tokenizer, run):
        draw_curves([read_run_log(directory)], directory / "curves.png")

    columns = {run.name: table["samples"]}
    if compare is not None and (other := compare / "report.json").is_file():
        columns[compare.name] = files.read_json(other)["samples"]
    columns["real"] = table["real held-out digits"]
    first_name, *names = (f"{name:>12}" for name in columns)
    gap = " " * 8 if deviations else ""
    print("\n" + " " * 18 + first_name + gap + "".join(names))
    for name, meaning in MEANINGS.items():
        first, *others = (f"{column[name]:12.3f}" for column in columns.values())
        cells = first + (f" ± {deviations[name]:.3f}" if deviations else "") + "".join(others)
        print(f"{name:18}{cells}   {meaning}")
    previews = sorted((tokenizer / "previews").glob("*.png"))
    print(f"\nsamples (left) and real digits (right): {run / 'samples.png'}")
    print(f"reconstructions of held-out digits: {previews[-1] if previews else 'none'}")
    print(f"loss curves: {tokenizer / 'curves.png'}, {run / 'curves.png'}")
    print(f"this report: {run / 'report.json'}")


def main(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 0, 1 (error), 2 (wrong usage), 130 (Ctrl-C)."""
    parser = command_parser("python -m varjax.evaluation.digits_report", __doc__)
    add, folder = parser.add_argument, pathlib.Path("runs/digits")
    add("--run", type=pathlib.Path, default=folder, help="run of the transformer (runs/digits)")
    add(
        "--tokenizer",
        type=pathlib.Path,
        default=pathlib.Path("runs/digits_tokenizer"),
        help="run of the tokenizer (runs/digits_tokenizer)",
    )
    add(
        "--samples",
        type=pathlib.Path,
        nargs="+",
        default=[folder / "samples.npz"],
        metavar="NPZ",
        help="outputs of varjax sample, such as one for each seed (runs/digits/samples.npz)",
    )
    add("--compare", type=pathlib.Path, help="run to compare with, if it has a report")
    flags = parser.parse_args(arguments)
    return run_command("digits_report", lambda: write_report(**vars(flags)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
