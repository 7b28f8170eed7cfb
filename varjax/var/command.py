"""The command line of sample.py."""

import argparse
import dataclasses

import numpy as np
from tqdm import tqdm

from varjax import pictures
from varjax.var.load import load
from varjax.var.output import open_output


@dataclasses.dataclass(frozen=True)
class Request:
    """What was asked for; None stands for the model's own choice."""

    weights: str
    labels: str | None
    count: int
    cfg: float | None
    top_k: int | None
    top_p: float | None
    smooth: bool
    seed: int
    batch_size: int
    out: str


def parse(arguments: list[str]) -> Request:
    """Reads the command line; exits with its usage if it cannot be read."""
    parser = argparse.ArgumentParser("sample.py", description="Draws images from a transformer.")
    parser.add_argument("--weights", required=True, help="a training run")
    parser.add_argument("--labels", help="classes, 0,1,2 or all (default: some, evenly spread)")
    parser.add_argument("--count", type=int, default=4, help="images of each class (4)")
    parser.add_argument("--cfg", type=float, help="guidance at the last scale; 0 turns it off")
    parser.add_argument("--top_k", type=int, help="draw from the likeliest codes only; 0: from all")
    parser.add_argument("--top_p", type=float, help="draw from this much of the mass; 0: from all")
    parser.add_argument("--smooth", action="store_true", help="mix codes: smoother pictures")
    parser.add_argument("--seed", type=int, default=0, help="another seed, other images (0)")
    parser.add_argument("--batch_size", type=int, default=32, help="images at a time (32)")
    parser.add_argument(
        "--out", default="samples.png", help="FILE.png (a grid), FILE.npz or FOLDER"
    )
    return Request(**vars(parser.parse_args(arguments)))


def run(request: Request) -> None:
    """Samples and writes; raises ValueError before any long work for what cannot be done."""
    for name in ("count", "batch_size"):
        if getattr(request, name) < 1:
            raise ValueError(f"{name}={getattr(request, name)}: must be 1 or more")
    output = open_output(request.out, request.count if request.count > 1 else None)
    model = load(request.weights)
    label_N = np.repeat(choose_labels(request.labels, model.var.classes), request.count)
    options = {n: getattr(request, n) for n in ("cfg", "top_k", "top_p")}
    options["smooth"] = request.smooth or None
    model.options(**options)
    batch = min(request.batch_size, len(label_N))
    with tqdm(total=len(label_N), unit="image", desc="sampling") as bar:
        for start in range(0, len(label_N), batch):
            # The last batch is filled up, so that one compilation serves all.
            index_B = np.arange(start, start + batch)
            label_B = label_N[index_B % len(label_N)]
            images_BHWC = model.sample(label_B, request.seed, index=index_B, **options)
            kept = min(batch, len(label_N) - start)
            output.add(pictures.to_uint8(np.asarray(images_BHWC)[:kept]), label_B[:kept])
            bar.update(kept)
    print(output.close())


def choose_labels(text: str | None, classes: int) -> np.ndarray:
    """The classes of "0,1,2" or "all"; without text up to ten, evenly spread."""
    if text is None:
        return np.unique(np.linspace(0, classes - 1, min(classes, 10)).astype(int))
    if text == "all":
        return np.arange(classes)
    try:
        labels = [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"labels={text}: give numbers like 0,1,2, or all") from None
    if bad := [label for label in labels if not 0 <= label < classes]:
        raise ValueError(f"labels {bad}: allowed are 0 … {classes - 1}")
    return np.array(labels)
