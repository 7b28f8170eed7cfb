"""How good are the digits? The report and the pictures at the end of `make demo`.

python -m varjax.evaluation.digits_report --run=runs/digits --samples=runs/digits/samples.npz
"""

import argparse
import pathlib
import sys

import numpy as np
from scipy.spatial.distance import cdist, pdist
from sklearn.svm import SVC

from varjax.analysis.curves import draw
from varjax.analysis.run_log import read_run
from varjax.core import files, image_io
from varjax.data.sources import Digits


def report(
    samples_NHWC: np.ndarray, label_N: np.ndarray
) -> dict[str, dict[str, float] | dict[str, str]]:
    """Figures of uint8 digits and the labels asked for, each beside the same of real digits."""
    train, held_out = Digits().source("train"), Digits().source("held_out")
    x_ND, train_ND, held_ND = (
        images.reshape(len(images), -1) / 255.0
        for images in (samples_NHWC, train.images_NHWC, held_out.images_NHWC)
    )
    classifier = SVC(C=10).fit(train_ND, train.labels_N)
    spread = diversity(train_ND, train.labels_N)
    return {
        "samples": {
            "label accuracy": float(classifier.score(x_ND, label_N)),
            "diversity": diversity(x_ND, label_N) / spread,
            "copying": copying(x_ND, train_ND),
            "Fréchet distance": frechet(x_ND, held_ND),
        },
        "real held-out digits": {
            "label accuracy": float(classifier.score(held_ND, held_out.labels_N)),
            "diversity": diversity(held_ND, held_out.labels_N) / spread,
            "copying": copying(held_ND, train_ND),
            "Fréchet distance": frechet(train_ND, held_ND),
        },
    }


EXPLAINED = {
    "label accuracy": "share that a classifier of training digits reads as the class asked for",
    "diversity": "mean distance of two digits of a class, over that of real training digits",
    "copying": "share nearer to some training digit than that digit's nearest other",
    "Fréchet distance": "of the pixels' Gaussians, to held-out digits (beside: of training digits)",
}


def diversity(x_ND: np.ndarray, label_N: np.ndarray) -> float:
    """The mean distance of two images of the same class, averaged over the classes."""
    return float(np.mean([pdist(x_ND[label_N == label]).mean() for label in np.unique(label_N)]))


def copying(x_ND: np.ndarray, train_ND: np.ndarray) -> float:
    """The share of images whose nearest training image is nearer to them than to its own kin."""
    within_NN = cdist(train_ND, train_ND)
    np.fill_diagonal(within_NN, np.inf)
    to_train_NN = cdist(x_ND, train_ND)
    nearest_N = to_train_NN.argmin(axis=1)
    return float(np.mean(to_train_NN.min(axis=1) < within_NN.min(axis=1)[nearest_N]))


def frechet(a_ND: np.ndarray, b_ND: np.ndarray) -> float:
    """|μa-μb|² + tr(Σa + Σb - 2 (Σa Σb)^½), the Fréchet distance of two Gaussians."""
    covariance_a, covariance_b = np.cov(a_ND.T), np.cov(b_ND.T)
    # The eigenvalues of Σa Σb are real and not negative; some pixels are always black, so 0.
    eigenvalues = np.linalg.eigvals(covariance_a @ covariance_b).real
    root = np.sqrt(np.clip(eigenvalues, 0, None)).sum()
    mean = np.sum((a_ND.mean(axis=0) - b_ND.mean(axis=0)) ** 2)
    return float(mean + np.trace(covariance_a) + np.trace(covariance_b) - 2 * root)


def beside_real(samples_NHWC: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Ten samples of each class, row by row, and to the right of them ten real ones."""
    real = Digits().source("held_out")
    halves = []
    for images, labels in ((samples_NHWC, label_N), (real.images_NHWC, real.labels_N)):
        chosen = [images[labels == label][:10] for label in range(10)]
        halves.append(image_io.grid(np.concatenate(chosen), columns=10))
    gap = np.full((halves[0].shape[0], 40, 1), 255, np.uint8)
    return np.concatenate([halves[0], gap, halves[1]], axis=1)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        "varjax.evaluation.digits_report", description="Reports on the demo's digits."
    )
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/digits"))
    parser.add_argument("--tokenizer", type=pathlib.Path, default="runs/digits_tokenizer")
    parser.add_argument("--samples", type=pathlib.Path, default="runs/digits/samples.npz")
    flags = parser.parse_args(arguments)
    for path in (flags.samples, flags.run / "metrics.jsonl", flags.tokenizer / "metrics.jsonl"):
        if not path.is_file():
            print(
                f"varjax.evaluation.digits_report: {path} does not exist; run make demo",
                file=sys.stderr,
            )
            return 1
    with np.load(flags.samples) as samples:
        images_NHWC, label_N = samples["arr_0"][..., :1], samples["labels"]
    table = report(images_NHWC, label_N)
    files.write_json(flags.run / "report.json", table)
    image_io.write_png(flags.run / "samples.png", beside_real(images_NHWC, label_N))
    for run in (flags.tokenizer, flags.run):
        draw([read_run(run)], run / "curves.png")

    print(f"\n{'':18}{'samples':>10}{'real':>10}")
    for name, meaning in EXPLAINED.items():
        values = [table[column][name] for column in table]
        print(f"{name:18}{values[0]:10.3f}{values[1]:10.3f}   {meaning}")
    previews = sorted((flags.tokenizer / "previews").glob("*.png"))
    print(f"\nsamples (left) beside real digits: {flags.run / 'samples.png'}")
    print(f"reconstructions, scale by scale:   {previews[-1] if previews else 'none'}")
    print(f"loss curves: {flags.tokenizer / 'curves.png'}, {flags.run / 'curves.png'}")
    print(f"this report: {flags.run / 'report.json'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
