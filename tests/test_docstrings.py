"""Tests that descriptions of fields, arguments and flags make sense alone, as in --help."""

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator

import pytest

from tests.helpers.paths import ROOT
from varjax.config.config_flags import describe, load_config

FILES = sorted([*ROOT.glob("varjax/**/*.py"), *ROOT.glob("configs/*.py")])
FRAGMENT = re.compile(r"(of|as|the same)\b", re.IGNORECASE)
ENTRY = re.compile(r"(\w+(?:, \w+)*)(?: \([^)]*\))?:(?: (.*))?")
HELP = re.compile(r"help|about|\w+_help|\w+_HELP")  # variables that hold a flag's help
LEAST_WORDS = 3


def fault(description: str) -> str | None:
    """Returns why a description does not make sense alone; None if it does."""
    if FRAGMENT.match(description):
        return "begins in the middle of a phrase"
    if len(description.split()) < LEAST_WORDS:
        return f"has fewer than {LEAST_WORDS} words"
    return None


def described(docstring: str) -> Iterator[tuple[str, str]]:
    """Yields (name, text on one line) of each entry in the sections Attributes and Args."""
    for section in inspect.cleandoc(docstring).split("\n\n"):
        title, _, body = section.partition("\n")
        if title not in ("Attributes:", "Args:"):
            continue
        texts: list[tuple[str, str]] = []
        for line in textwrap.dedent(body).splitlines():
            if line.startswith(" "):
                name, text = texts.pop()
                texts.append((name, f"{text} {line.strip()}".strip()))
            else:
                entry = ENTRY.fullmatch(line)
                assert entry is not None, f"{line!r} is no entry 'name: text'"
                texts.append((entry[1], entry[2] or ""))
        yield from texts


def descriptions(source: str) -> Iterator[tuple[str, str, str]]:
    """Yields (owner, name, text) of each description in docstrings and in the help of flags."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            for name, text in described(ast.get_docstring(node) or ""):
                yield node.name, name, text
        match node:
            case ast.keyword(arg="help", value=ast.Constant(value=str(text))):
                yield "help", "help", text
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                if HELP.fullmatch(name):
                    yield "help", name, text
            case ast.Call(func=ast.Name(id="option_field"), args=[_, ast.Constant(value=text)]):
                yield "option_field", "help", str(text)


def test_no_description_is_a_fragment():
    count, found = 0, []
    for file in FILES:
        for owner, name, text in descriptions(file.read_text()):
            count += 1
            if problem := fault(text):
                found.append(f"{file.relative_to(ROOT)}: {owner}: {name}: {text!r} {problem}")
    assert not found
    assert count > 1000  # the search finds descriptions at all


EXAMPLE = '''
class Config:
    """Settings.

    Attributes:
        width (int): {}
        a, b: number of
            the layers.

    Raises an error.
    """

def function(width):
    """Does it.

    Args:
        width: {}

    Returns:
        Of both.
    """

parser.add_argument("--width", help="{}")
about = "{}"
parser.add_argument("--height", help=about)
width: int = option_field(3, "{}", static=True)
'''


@pytest.mark.parametrize("text", ["of both.", "the same.", "As there, but wide.", "the file.", ""])
def test_a_fragment_is_found_in_each_kind_of_description(text):
    whole = "channels of a token."
    for position in range(5):
        texts = [text if i == position else whole for i in range(5)]
        found = [fault(text) for *_, text in descriptions(EXAMPLE.format(*texts))]
        assert len(found) == 6 and sum(map(bool, found)) == 1, texts
    assert not any(fault(text) for *_, text in descriptions(EXAMPLE.format(*[whole] * 5)))


def test_continuation_lines_belong_to_an_entry():
    assert ("Config", "a, b", "number of the layers.") in descriptions(EXAMPLE)


CONFIGS = (
    "var:d16",
    "mar:b",
    "tokenizer:256",
    "kl_tokenizer:256",
    "photos_tokenizer:adversarial",
    "digits",
    "digits_mar:codes",
)


@pytest.mark.parametrize("config", CONFIGS)
def test_help_describes_every_field_of_a_config(config):
    lines = describe(load_config(config)).splitlines()
    fields = [i for i, line in enumerate(lines) if line[2] != " "]
    assert len(fields) > 50
    assert not [lines[i] for i in fields if not lines[i + 1 : i + 2] or i + 1 in fields]
