import dataclasses
import pathlib

import pytest

from tests.helpers import tiny
from varjax.config import config_tree
from varjax.data.sources import TFDS, Digits, Folder, Noise, Photos, dataset_of_command
from varjax.errors import InputError


def replaced(*assignments):
    return config_tree.override(tiny.experiment("run"), assignments).data


def test_a_flag_replaces_the_dataset_in_the_syntax_of_a_config_argument():
    pathlib.Path("a, b").mkdir()
    data = replaced("data=folder:a, b,held_out=0.3")
    assert data == Folder("a, b", (8, 8), channels=1, held_out=0.3)
    assert replaced("data=random,size=16") == Noise((16, 16), 1)
    assert replaced("data=digits", "data.shift=0.5") == Digits(shift=0.5)


def test_a_replaced_dataset_keeps_the_recipe_s_crop_and_flips():
    flipped = Folder("a", 256, crop="center", flip=True)
    mar = dataclasses.replace(tiny.experiment("run"), data=flipped)
    data = config_tree.override(mar, ["data=folder:b"]).data
    assert data == Folder("b", (256, 256), crop="center", flip=True)
    data = config_tree.override(mar, ["data=folder:b,flip=false,crop=random"]).data
    assert data == Folder("b", (256, 256), crop="random", flip=False)
    photos = config_tree.override(mar, ["data=photos,size=64"]).data
    assert photos == Photos((64, 64), flip=True)


def test_commands_take_dataset_fields_except_those_that_they_set():
    pathlib.Path("a, b").mkdir()
    data = dataset_of_command("folder:a, b,held_out=test", 8, 1, "center")
    assert data == Folder("a, b", 8, channels=1, crop="center", held_out="test")
    data = dataset_of_command("tfds:cifar10,train=train[:9%],held_out=test", 32)
    assert data == TFDS("cifar10", train="train[:9%]", held_out="test", size=32)
    with pytest.raises(InputError, match="crop=center in folder:a,crop=center: is set by the com"):
        dataset_of_command("folder:a,crop=center", 8)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("folder", "data is 'folder'; give folder:PATH"),
        ("digits,size=9", "digits are 8 by 8 pixels, not"),
        ("folder:a,size=small", "size='small': must be the side"),
        ("folder:a,hold_out=1", "Folder has no field 'hold_out'; did you mean 'held_out'"),
    ],
)
def test_invalid_datasets_are_refused_with_advice(text, message):
    with pytest.raises(InputError, match=message):
        replaced(f"data={text}")
