"""Tests class labels on the command line: numbers, names and mixes."""

import pytest

from varjax.checkpoints.class_names import ClassNames, imagenet_classes, numbered_classes
from varjax.cli.captions import class_titles
from varjax.cli.sample import choose_labels
from varjax.errors import InputError

CLOTHES = ClassNames(("T-shirt/top", "Bag", "coat, long"))


def test_default_labels_are_spread_over_the_classes():
    assert choose_labels(None, numbered_classes(10)) == tuple(range(10))
    spread = choose_labels(None, numbered_classes(1000))
    assert len(spread) == 10 and spread[0] == 0 and spread[-1] == 999


@pytest.mark.parametrize(
    "text, labels",
    [
        ("all", (0, 1, 2)),
        ("2,0", (2, 0)),
        ("none,1,none", (3, 1, 3)),
        ("bag,T-shirt/top,0", (1, 0, 0)),
        (r"coat\, long,bag", (2, 1)),
        ("1,bag:0.5+0:0.5", (1, "1:0.5+0:0.5")),
    ],
)
def test_labels_are_numbers_names_or_mixes(text, labels):
    assert choose_labels(text, CLOTHES) == labels


def test_titles_of_mixes_have_spaces_for_line_breaks():
    labels = [0, "1:0.5+0:0.25", "1:1", "3:1"]  # a job with mixes writes class 1 as "1:1"
    titles = ["0 T-shirt/top", "1:0.5 + 0:0.25", "1 Bag", "no class"]
    assert class_titles(labels, CLOTHES) == titles


def test_imagenet_names_and_wordnet_ids():
    assert choose_labels("7,golden retriever,n02509815", imagenet_classes()) == (7, 207, 387)


@pytest.mark.parametrize(
    "text, message",
    [
        ("3", "0 … 2"),
        ("bags", "similar are 'Bag' .1."),
        ("", "no class of this name"),
        ("bag,,0", "no class of this name"),
        ("shoe:0.5+bag:0.5", "shoe"),
        ("bag:x", "bag:x|1:x"),
    ],
)
def test_unknown_classes_are_refused(text, message):
    with pytest.raises(InputError, match=message):
        choose_labels(text, CLOTHES)
