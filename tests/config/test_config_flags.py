import argparse
import dataclasses
import errno
import importlib.machinery
import json
from typing import Literal, Protocol

import pytest

from varjax.config.config_flags import (
    add_config_flags,
    config_from_flags,
    describe,
    field_docs,
    load_config,
)
from varjax.errors import InputError, StorageError

CONFIG = """
from __future__ import annotations

import dataclasses

@dataclasses.dataclass(frozen=True)
class Run:
    '''A run.

    Attributes:
        steps: how long,
            in updates.
    '''

    steps: int = 3
    name: str | None = None

def get_config(arg: str = "3") -> Run:
    return Run(int(arg))
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    return f"--config={tmp_path / 'c.py'}"


def read(*arguments):
    parser = argparse.ArgumentParser("varjax try", allow_abbrev=False)
    add_config_flags(parser)
    parser.add_argument("--out", required=True)
    return config_from_flags(parser, list(arguments))


def test_config_files_are_loaded_with_their_argument(tmp_path):
    file = tmp_path / "c.py"
    file.write_text("def get_config(arg='d'):\n    return arg\n")
    assert load_config(str(file)) == "d"
    assert load_config(f"{file}:d20") == "d20"
    file.write_text("def get_config():\n    return 1\n")
    with pytest.raises(ValueError, match="takes no argument"):
        load_config(f"{file}:d20")
    with pytest.raises(ValueError, match="no config file"):
        load_config(str(tmp_path / "none.py"))


@pytest.mark.parametrize("more", [["--out=b"], ["--print_config"], ["--help"]])
def test_values_in_a_config_file_must_fit_their_fields(tmp_path, config, more):
    (tmp_path / "c.py").write_text(CONFIG.replace("Run(int(arg))", "Run(name=['a'])"))
    with pytest.raises(InputError, match=r"name must be str \| none, not .'a'."):
        read(config, *more)
    assert read(config, "--out=b", "--config.name=a")[1].name == "a"


@pytest.mark.parametrize("failures", [1, 100])
def test_a_failed_read_of_a_config_file_is_retried(tmp_path, monkeypatch, failures):
    (tmp_path / "failing.py").write_text("def get_config(): return 1")
    read, left = importlib.machinery.SourceFileLoader.get_data, [failures]

    def fail(loader, path):
        if path.endswith("failing.py") and left[0]:
            left[0] -= 1
            raise OSError(errno.EIO, "Input/output error", path)
        return read(loader, path)

    monkeypatch.setattr(importlib.machinery.SourceFileLoader, "get_data", fail)
    if failures == 1:
        assert load_config(str(tmp_path / "failing.py")) == 1
    else:
        with pytest.raises(StorageError, match="failing.py cannot be read now"):
            load_config(str(tmp_path / "failing.py"))


def test_a_config_file_is_executed_once(tmp_path):
    """An OSError from the config's own code is not a failed read, so it is not retried."""
    file = tmp_path / "config.py"
    file.write_text(
        "import os\nos.mkdir(__file__ + '.executed')\nraise OSError(5, 'of the config')\n"
    )
    with pytest.raises(OSError, match="of the config"):  # a second time, mkdir would fail
        load_config(str(file))


def test_shipped_configs_are_found_by_name():
    assert load_config("digits").run_dir == "runs/digits"
    with pytest.raises(ValueError, match="no config file 'digit'; did you mean 'digits'"):
        load_config("digit")
    with pytest.raises(ValueError, match="no config file 'xyz'; use FILE.py or one of digits, "):
        load_config("xyz")


def test_configs_in_one_folder_can_import_each_other(tmp_path):
    (tmp_path / "first.py").write_text("def get_config(arg='d'):\n    return arg\n")
    (tmp_path / "second.py").write_text("from .first import get_config\n")
    assert load_config(f"{tmp_path / 'second.py'}:x") == "x"


def test_flags_and_changed_fields_may_be_in_any_order(config):
    flags, run = read("--config.name=a", f"{config}:7", "--out=b", "--config.name=c")
    assert (flags.out, run.steps, run.name) == ("b", 7, "c")


def test_a_value_may_follow_after_a_space(config):
    flags, run = read("--config.name", "a b, c", config, "--out=b", "--config.steps", "-3")
    assert (flags.out, run.steps, run.name) == ("b", -3, "a b, c")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config.step=1"], "Run has no field 'step'; did you mean 'steps'"),
        (["--config.steps=long"], "steps must be int, not 'long'"),
        (["--config.rate=1"], "Run has no field 'rate'; its fields are .*'steps'"),
        (["--config.steps"], "'steps' has no value; write steps=value"),
        (["--config.steps", "--out=c"], "'steps' has no value; write steps=value"),
        (["--config.steps", "3", "4"], "unknown arguments .'4'.; settings are --config.FIELD=VA"),
        (["--outt=c"], "unknown arguments .'--outt=c'.*did you mean '--out'"),
        (
            ["--confg.steps=1"],
            "unknown arguments .'--confg.steps=1'.; settings are --config.FIELD=VALUE",
        ),
    ],
)
def test_wrong_flags_are_refused_with_advice(config, arguments, message):
    with pytest.raises(ValueError, match=message):
        read(config, "--out=b", *arguments)


def test_print_config_prints_what_would_run(config, capsys):
    with pytest.raises(SystemExit, match="0"):
        read("--print_config", f"{config}:7", "--config.name=a")
    assert json.loads(capsys.readouterr().out) == {"steps": 7, "name": "a"}


def test_help_lists_the_flags_and_every_field(config, capsys):
    with pytest.raises(SystemExit, match="0"):
        read(config, "--config.steps=9", "--help")
    out = capsys.readouterr().out
    assert "--out" in out and "steps: int = 9\n        how long, in updates." in out
    assert "name: str | none = none" in out
    with pytest.raises(SystemExit, match="0"):
        read("--help")
    assert "FILE.py[:ARGUMENT]" in capsys.readouterr().out


class Part(Protocol):
    rate: float


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A part.

    rate: for a batch
        of 256 images.

    Not a field: of this class.
    """

    rate: float = 0.5
    mode: Literal["fast", "slow"] = "fast"
    sizes: tuple[int | tuple[int, int], ...] = (1, 2)


@dataclasses.dataclass(frozen=True)
class Root:
    """The whole.

    Attributes:
        part: the part.
        flip, on (bool): whether
            it flips.

    Raises:
        ValueError: never.
    """

    part: Part = Leaf()
    flip: bool = False
    on: bool = True
    leaf: Leaf | None = None


def test_field_docs_are_read_from_both_forms_of_docstrings():
    assert field_docs(Leaf) == {"rate": "for a batch of 256 images."}
    both = "whether it flips."
    assert field_docs(Root) == {"part": "the part.", "flip": both, "on": both}


def test_every_leaf_is_described_with_path_type_and_value():
    assert describe(Root()).splitlines() == [
        "  part.rate: float = 0.5",
        "        for a batch of 256 images.",
        "  part.mode: 'fast' | 'slow' = \"fast\"",
        "  part.sizes: tuple[int | tuple[int, int], ...] = 1,2",
        "  flip: bool = false",
        "        whether it flips.",
        "  on: bool = true",
        "        whether it flips.",
        "  leaf: Leaf | none = none",
    ]
