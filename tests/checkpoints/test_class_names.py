import json

import numpy as np
import pytest

from varjax.checkpoints.class_names import (
    ClassNames,
    imagenet_classes,
    numbered_classes,
    read_class_names,
)
from varjax.checkpoints.weights import WeightsDir
from varjax.errors import InputError

IMAGENET = imagenet_classes()


def test_imagenet_has_a_thousand_names_in_the_order_of_its_synsets():
    assert len(IMAGENET) == len(set(IMAGENET)) == 1000
    assert list(IMAGENET.synsets) == sorted(set(IMAGENET.synsets))
    # Labels shown in papers on class-conditional generation.
    known = {0: "tench", 88: "macaw", 207: "golden retriever", 387: "lesser panda", 980: "volcano"}
    assert {label: IMAGENET[label] for label in known} == known


@pytest.mark.parametrize("label", [0, 134, 207, 264, 474, 999])
def test_a_name_in_any_case_and_a_synset_find_their_label(label):
    name = IMAGENET[label]
    spellings = (name, name.upper(), f" {name} ", IMAGENET.synsets[label], str(label))
    assert {IMAGENET.number(text) for text in spellings} == {label}


def test_an_unknown_name_is_refused_with_suggestions():
    with pytest.raises(InputError, match=r"'golden retreiver'.*'golden retriever' \(207\)"):
        IMAGENET.number("golden retreiver")
    with pytest.raises(InputError, match="'x'.*its classes are 0 … 1"):
        numbered_classes(2).number("x")


def test_names_that_differ_only_in_case_need_the_exact_case():
    names = ClassNames(("Mouse", "mouse", "cat"))
    assert [names.number(name) for name in ("Mouse", "mouse", "CAT")] == [0, 1, 2]
    with pytest.raises(InputError, match="MOUSE"):
        names.number("MOUSE")


def test_digits_are_labels_even_if_names_are_digits():
    folders = ClassNames(("0", "1", "10", "2"))
    assert folders.number("2") == 2


@pytest.mark.parametrize(
    ("labels", "numbers"),
    [
        ("goldfish", [1]),
        ([3, "tench"], [3, 0]),
        (["tench:0.5+goldfish:0.5", {"tench": 1, 7: 2}], ["0:0.5+1:0.5", "0:1+7:2"]),
        (np.array(["tench", "goldfish"]), [0, 1]),
        ([{1: 0.5}, None, "tench+goldfish:1"], [{1: 0.5}, None, "tench+goldfish:1"]),
        (7, 7),
    ],
)
def test_names_become_numbers_even_in_mixes(labels, numbers):
    assert IMAGENET.numbers(labels) == numbers


def test_a_name_that_looks_like_a_mix_is_a_name():
    assert ClassNames(("a:1+b:2", "c")).numbers(["a:1+b:2"]) == [0]


def test_arrays_of_numbers_are_not_copied():
    labels = np.arange(3)
    assert IMAGENET.numbers(labels) is labels


@pytest.mark.parametrize(
    ("about", "names"),
    [
        ({"class_names": ["bag", "shirt"]}, ["bag", "shirt"]),
        ({"class_names": ["n01440764", "n02099601"]}, ["tench", "golden retriever"]),
        ({"class_names": ["bag"]}, ["0", "1"]),
        ({"class_names": 3}, ["0", "1"]),
        ({}, ["0", "1"]),
        (None, ["0", "1"]),
    ],
)
def test_a_run_has_the_class_names_of_its_data(tmp_path, about, names):
    if about is not None:
        (tmp_path / "data.json").write_text(json.dumps(about))
    found = read_class_names(WeightsDir(tmp_path, {"task": {"_type": "VARTask"}}), 2)
    assert list(found) == names
    assert [found.number(name) for name in names] == [0, 1]


def test_a_converted_model_of_1000_classes_has_imagenet_names(tmp_path):
    converted = WeightsDir(tmp_path, {"sources": {}})
    assert read_class_names(converted, 1000) is imagenet_classes()
    assert list(read_class_names(converted, 3)) == ["0", "1", "2"]


def test_a_converted_run_keeps_the_names_of_its_data(tmp_path):
    converted = WeightsDir(tmp_path, {"sources": {}, "class_names": ["bag", "shirt"]})
    assert list(read_class_names(converted, 2)) == ["bag", "shirt"]


def test_repr_shows_only_the_first_names():
    assert repr(IMAGENET).startswith("0 tench, 1 goldfish, ")
    assert repr(IMAGENET).endswith("9 ostrich … (990 more)")
    assert repr(ClassNames(("bag", "shirt"))) == "0 bag, 1 shirt"
