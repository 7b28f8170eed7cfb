"""Tests that each varjax command in README and docs is accepted by its parser.

Commands end after parsing, because official weights, datasets and clusters are not available here.
tests/training/test_sharding.py also lays out the mesh of each training command.
"""

import argparse
import importlib
import re
import shlex

import pytest

import sample
from tests.helpers.paths import ROOT
from varjax.cli import main as varjax

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = re.compile(
    r"(?:varjax [a-z-]+|python sample\.py|python -m varjax(?:\.[\w.]+)?)(?= --| \w|$)"
)


class Parsed(BaseException):
    """Ends a command once its parser has accepted the arguments."""


def commands():
    for page in PAGES:
        text = page.read_text()
        blocks = "\n".join(re.findall(r"^```bash\n(.*?)^```", text, re.S | re.M))
        lines = re.sub(r" *\\\n *", " ", blocks).splitlines()
        for line in dict.fromkeys(lines):
            command = re.sub(r"\s+#.*", "", line).strip()
            if OURS.match(command) and "=" in command and "…" not in command:
                yield page.name, command


def test_documented_commands_have_valid_flags(monkeypatch):
    parse = argparse.ArgumentParser.parse_known_args

    def parse_only(self, *args, **kwargs):
        flags, unknown = parse(self, *args, **kwargs)
        if not self.add_help:  # this parser only looks for the config
            return flags, unknown
        assert all(word.startswith("--config.") for word in unknown), unknown
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_only)
    monkeypatch.chdir(ROOT)
    checked = 0
    for page, command in commands():
        match shlex.split(command):
            case ["python", "sample.py", *arguments]:
                main = sample.main
            case ["varjax", *arguments] | ["python", "-m", "varjax", *arguments]:
                main = varjax.main
            case ["python", "-m", module, *arguments]:
                known = [path for path, _ in varjax.COMMANDS.values()]
                path = next((p for p in known if f"{p}.".startswith(f"{module}.")), module)
                main = importlib.import_module(path).main
            case words:
                pytest.fail(f"{page}: {words}")
        try:
            code = main(arguments)
        except Parsed:
            checked += 1
        except SystemExit as error:
            pytest.fail(f"{page}: {command} is refused ({error})")
        else:
            pytest.fail(f"{page}: {command} ended with {code} before its flags were read")
    assert checked > 30
