import dataclasses
import json
from typing import Literal, Protocol

import numpy as np
import pytest

from varjax.config import config_tree
from varjax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Leaf:
    rate: float = 0.5
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[int, float] = (1, 2.0)
    mode: Literal["fast", "slow"] = "fast"
    limit: int | None = None
    on: bool = False
    name: str = "x"


@dataclasses.dataclass(frozen=True)
class Other:
    depth: int = 3


class Part(Protocol):
    depth: int


@dataclasses.dataclass(frozen=True)
class Root:
    leaf: Leaf = Leaf()
    choice: Leaf | Other | None = None
    part: Part = Other()
    leaves: tuple[Leaf, ...] = ()


def test_a_json_round_trip_keeps_the_settings():
    root = Root(Leaf(rate=2, sizes=(), limit=4), Other(7), leaves=(Leaf(name="y"),))
    data = json.loads(json.dumps(config_tree.to_dict(root)))
    assert data["part"] == {"_type": "Other", "depth": 3}
    data.pop("part")
    assert config_tree.from_dict(Root, data) == root


def test_changed_fields_identify_configs_and_ignore_fields_added_later():
    leaf = Leaf(rate=2, sizes=())
    changed = config_tree.changed_fields(Root(leaf, Other(7), leaves=(leaf, Leaf())))
    assert changed == {
        "_type": "Root",
        "leaf": {"_type": "Leaf", "rate": 2, "sizes": []},
        "choice": {"_type": "Other", "depth": 7},
        "leaves": [{"_type": "Leaf", "rate": 2, "sizes": []}, {"_type": "Leaf"}],
    }
    later = dataclasses.make_dataclass("Leaf", [("new", int, 3)], bases=(Leaf,), frozen=True)
    assert config_tree.changed_fields(later(2, ())) == changed["leaf"]


def test_a_protocol_field_cannot_be_rebuilt_but_its_value_can():
    data = config_tree.to_dict(Root(part=Other(9)))
    with pytest.raises(ValueError, match="Root.part is annotated by a Protocol"):
        config_tree.from_dict(Root, data)
    assert config_tree.from_dict(Other, data["part"]) == Other(9)
    with pytest.raises(ValueError, match="holds a Other, not a Leaf"):
        config_tree.from_dict(Leaf, data["part"])


@pytest.mark.parametrize(
    "data",
    [{"rate": "1"}, {"rate": True}, {"limit": 1.5}, {"on": 1}, {"sizes": [1, "2"]}, {"sizes": 3}]
    + [{"mode": "other"}, {"pair": [1]}, {"name": None}, {"speed": 1}],
)
def test_wrong_types_and_unknown_fields_are_refused_by_name(data):
    with pytest.raises(ValueError, match=next(iter(data))):
        config_tree.from_dict(Leaf, data)


@pytest.mark.parametrize(
    ("root", "says"),
    [
        (Root(Leaf(mode="Fast")), "^leaf.mode must be one of .'fast', 'slow'., not 'Fast'"),
        (Root(choice=Leaf(mode="Fast")), "^choice.mode must be one of"),
        (Root(part=Leaf(mode="Fast")), "^part.mode must be one of"),
        (Root(leaves=(Leaf(), Leaf(mode="Fast"))), r"^leaves\[1\].mode must be one of"),
        (Root(Leaf(sizes=[1, 2])), r"^leaf.sizes must be tuple\[int, ...\], not \[1, 2\]"),
        (Root(Leaf(rate="1")), "^leaf.rate must be float"),
        (Root(choice=Root()), r"^choice must be Leaf \| Other \| none, not a Root"),
    ],
)
def test_wrong_types_are_found_anywhere_in_the_tree(root, says):
    with pytest.raises(InputError, match=says):
        config_tree.check_types(root)


def test_values_that_fit_their_annotations_pass():
    leaf = Leaf(rate=2, sizes=(), limit=4)
    config_tree.check_types(Root(leaf, Other(7), Leaf(rate=np.float64(0.1)), (leaf, Leaf())))


def test_an_integer_in_a_float_field_becomes_a_float():
    assert type(config_tree.from_dict(Leaf, {"rate": 1}).rate) is float


@pytest.mark.parametrize(
    ("assignment", "field", "value"),
    [
        ("leaf.rate=3e-4", "rate", 3e-4),
        ("leaf.sizes=(1,2,3)", "sizes", (1, 2, 3)),
        ("leaf.sizes=1,2,3", "sizes", (1, 2, 3)),
        ("leaf.mode=slow", "mode", "slow"),
        ("leaf.limit=5", "limit", 5),
        ("leaf.on=true", "on", True),
        ("leaf.name=3", "name", "3"),
        ("leaf.name=a=b", "name", "a=b"),
        ("leaf.name=", "name", ""),
    ],
)
def test_an_override_is_parsed_by_its_annotation(assignment, field, value):
    changed = config_tree.override(Root(), [assignment])
    assert getattr(changed.leaf, field) == value
    assert changed == Root(dataclasses.replace(Leaf(), **{field: value}))


def test_an_override_reaches_protocol_and_optional_fields():
    assert config_tree.override(Root(), ["part.depth=8"]).part == Other(8)
    assert config_tree.override(Root(Leaf(limit=1)), ["leaf.limit=none"]).leaf.limit is None
    root = Root(choice=Other(9))
    assert config_tree.override(root, ["choice.depth=8"]).choice == Other(8)
    assert config_tree.override(root, ["choice=none"]).choice is None


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("leaf.rat=1", "did you mean 'rate'"),
        ("leaf.x=1", "its fields are .*'rate'"),
        ("leaf.rate=fast", "leaf.rate must be float, not 'fast'"),
        ("leaf.mode=other", "one of .'fast', 'slow'."),
        ("leaf=1", "group of settings"),
        ("leaf.rate", "no value"),
        ("leaf.rate.x=1", "float has no field"),
        ("choice.depth=1", "choice.depth: choice is none in this config"),
    ],
)
def test_a_wrong_override_says_what_is_allowed(assignment, message):
    with pytest.raises(ValueError, match=message):
        config_tree.override(Root(), [assignment])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("leaf.rate=1e999", "leaf.rate must be a finite number, at most 3.40282e.38, not inf"),
        ("leaf.rate=1e39", "leaf.rate must be a finite number"),
        ("leaf.rate=nan", "leaf.rate must be float"),
        ("leaf.sizes=1,5000000000", r"leaf.sizes\[1\] must be a number -2147483647 … 4294967295"),
        ("part.depth=18446744073709551616", "part.depth must be a number"),
    ],
)
def test_numbers_that_jax_would_truncate_are_refused(text, says):
    with pytest.raises(ValueError, match=says):
        config_tree.override(Root(), [text])


@pytest.mark.parametrize("rate", [float("nan"), float("-inf"), 1e39, 10**400])
def test_numbers_in_files_that_jax_would_truncate_are_refused(rate):
    with pytest.raises(ValueError, match="Leaf.rate must be a finite number"):
        config_tree.from_dict(Leaf, {"rate": rate})
