"""Captions pictures with model, options and classes."""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from varjax.checkpoints.class_names import ClassNames
from varjax.sampling.option_sweep import option_text
from varjax.storage.buckets import short_path


def picture_title(flags: argparse.Namespace, options: Any, **others: Any) -> str:
    """Returns the title of a picture: "runs/digits · guidance 2 · seed 0".

    Args:
        flags: flags of the command, which name the model, models that help it, and the seed.
        options: sampling options of the model, a frozen dataclass.
        others: further words by name; those that are None are left out.
    """
    guidance = dataclasses.asdict(options).get("guidance")
    given = {name: getattr(flags, name) for name in ("guide", "refiner")}
    helpers = {name: short_path(location) for name, location in given.items() if location}
    shown = {"guidance": guidance, **helpers, **others}
    words = [f"{name} {option_text(value)}" for name, value in shown.items() if value is not None]
    return " · ".join([short_path(flags.weights or ""), *words, f"seed {flags.seed}"])


def class_titles(labels: Sequence[int | str] | np.ndarray, names: ClassNames) -> list[str]:
    """Returns what to call classes on a picture: "3", "207 golden retriever", "3:0.5 + 8:0.5".

    Args:
        labels: classes by number, or mixes of classes as text.
        names: names of the model's classes, whose number itself means "no class".
    """
    return [_class_title(label, names) for label in labels]


def _class_title(label: int | str, names: ClassNames) -> str:
    if isinstance(label, str) and "+" not in label:  # a job with mixes writes class 3 as "3:1"
        label = int(label.partition(":")[0])
    if isinstance(label, str):
        return label.replace("+", " + ")  # a line breaks at spaces
    if label >= len(names):
        return "no class"
    name = names[int(label)]
    return name if name == str(label) else f"{label} {name}"
