"""Names of a model's classes: what label 207 shows, and which label "golden retriever" is."""

import collections
import dataclasses
import difflib
import functools
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any, overload

import numpy as np

from varjax.checkpoints.weights import WeightsDir
from varjax.errors import InputError, StorageError
from varjax.storage import files

IMAGENET_FILE = pathlib.Path(__file__).parent / "imagenet_classes.txt"
IMAGENET_CLASSES = 1000
SUGGESTIONS = 3
SHOWN_NAMES = 10  # of many, in the text of `ClassNames`


@dataclasses.dataclass(frozen=True, repr=False)
class ClassNames(Sequence[str]):
    """The names of a model's classes, in the order of their labels.

        model.labels[207]  # "golden retriever"
        model.labels.number("golden retriever")  # 207
        [i for i, name in enumerate(model.labels) if "retriever" in name]

    Attributes:
        names: name of each class.
        synsets: ImageNet's identifier of each class, such as "n02099601", which is understood as a
            name too; () for other data.
    """

    names: tuple[str, ...]
    synsets: tuple[str, ...] = ()

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> tuple[str, ...]: ...
    def __getitem__(self, index):
        return self.names[index]

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        if self.names == tuple(map(str, range(len(self)))):
            return f"0 … {len(self) - 1}"
        shown = [f"{i} {name}" for i, name in enumerate(self.names[:SHOWN_NAMES])]
        more = len(self) - SHOWN_NAMES
        return ", ".join(shown) + (f" … ({more:,} more)" if more > 0 else "")

    @functools.cached_property
    def _exact(self) -> dict[str, int]:
        return _unique(self.synsets) | _unique(self.names)

    @functools.cached_property
    def _in_lower_case(self) -> dict[str, int]:
        return _unique([name.casefold() for name in self.names])

    def number(self, name: str) -> int:
        """Returns the label of a class by its name, in upper or lower case, or its digits.

        Digits are a label, never a name. Raises InputError, with similar names, if there is none,
        and if several classes have the name.
        """
        text = name.strip()
        if re.fullmatch(r"[0-9]+", text):
            return int(text)
        label = self._exact.get(text, self._in_lower_case.get(text.casefold()))
        if label is not None:
            return label
        if same := [i for i, other in enumerate(self.names) if other.casefold() == text.casefold()]:
            raise InputError(
                f"label {name!r} names several classes: "
                f"{', '.join(f'{i} {self.names[i]}' for i in same)}; give a number"
            )
        similar = difflib.get_close_matches(text.casefold(), self._in_lower_case, SUGGESTIONS)
        labels = [self._in_lower_case[name] for name in similar]
        nearest = " or ".join(f"{self.names[label]!r} ({label})" for label in labels)
        raise InputError(
            f"label {name!r}: the model has no class of this name; "
            + (f"similar are {nearest}" if nearest else f"its classes are {self!r}")
        )

    def numbers(self, labels: Any) -> Any:
        """Returns labels with numbers in place of names, also in mixes; others are unchanged.

            model.labels.numbers([3, "goldfish", "tench:0.5+goldfish:0.5"])  # [3, 1, "0:0.5+1:0.5"]

        Raises InputError for a name that no class has.
        """
        if isinstance(labels, str):
            labels = [labels]
        if isinstance(labels, np.ndarray) and labels.dtype.kind in "OU":
            labels = labels.tolist()
        return [*map(self._number_of, labels)] if isinstance(labels, list | tuple) else labels

    def _number_of(self, label: Any) -> Any:
        """Returns a label, or a mix as text, by numbers."""
        if isinstance(label, Mapping) and any(isinstance(name, str) for name in label):
            pairs = [(str(name), weight) for name, weight in label.items()]
        elif not isinstance(label, str):
            return label
        elif ":" not in label or label.strip() in self._exact:
            return self.number(label)
        else:
            parts = [part.rpartition(":") for part in label.split("+")]
            pairs = [(name, weight) for name, _, weight in parts]
        if not all(name for name, _ in pairs):
            return label  # `checked_labels` says how a mix is written
        return "+".join(f"{self.number(name)}:{weight}" for name, weight in pairs)


def numbered_classes(classes: int) -> ClassNames:
    """Names classes by their numbers, for a model whose classes have no known names."""
    return ClassNames(tuple(map(str, range(classes))))


@functools.cache
def imagenet_classes() -> ClassNames:
    """Reads the names of ImageNet's 1,000 classes (ILSVRC 2012), in the order of the labels."""
    text = IMAGENET_FILE.read_text("utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("#")]
    synsets, names = zip(*(line.split(" ", 1) for line in lines), strict=True)
    return ClassNames(names, synsets)


def read_class_names(weights: WeightsDir, classes: int) -> ClassNames:
    """Finds the names of a model's classes.

    They are those of a run's data, ImageNet's for other converted models of 1,000 classes, and
    otherwise numbers. Folders that are named by ImageNet's identifiers get ImageNet's names.

    Args:
        weights: training run or converted directory of the model.
        classes: number of classes of the model.
    """
    names = stored_names(weights)
    if names is None and weights.task is None and classes == IMAGENET_CLASSES:
        return imagenet_classes()
    if names is None or len(names) != classes:
        return numbered_classes(classes)
    return known_class_names(names)


def known_class_names(names: Sequence[str]) -> ClassNames:
    """Names classes as a dataset does; ImageNet's identifiers (n02099601) become ImageNet's names.

    Args:
        names: name of each class in the dataset.
    """
    words = dict(zip(imagenet_classes().synsets, imagenet_classes().names, strict=True))
    if all(name in words for name in names):
        return ClassNames(tuple(words[name] for name in names), tuple(names))
    return ClassNames(tuple(names))


def different_class(a: ClassNames, b: ClassNames) -> int | None:
    """Finds the first label that means different classes in two models of equally many classes.

    Returns None if there is none, and if the names of either model are only assumed: numbers, or
    ImageNet's.
    """
    assumed = numbered_classes(len(a)), imagenet_classes()
    if a in assumed or b in assumed:
        return None
    pairs = enumerate(zip(a, b, strict=True))
    return next((label for label, (name, other) in pairs if name != other), None)


def stored_names(weights: WeightsDir) -> list[str] | None:
    """Returns the names in a run's data.json or a converted directory's config.json, or None."""
    about = weights.config
    if weights.task is not None:
        try:
            about = files.read_json(weights.path / "data.json")
        except StorageError:
            raise
        except (InputError, OSError):
            return None  # names are a convenience: the run samples without them
    names = about.get("class_names")
    return [*map(str, names)] if isinstance(names, list) else None


def _unique(names: Sequence[str]) -> dict[str, int]:
    """Returns the position of each name that occurs once."""
    counts = collections.Counter(names)
    return {name: i for i, name in enumerate(names) if counts[name] == 1}
